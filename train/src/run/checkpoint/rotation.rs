//! Saving, finding and deleting checkpoints of a run.

use std::path::{Path, PathBuf};

use super::manifest::{seal, sync};
use super::{CheckpointError, TrainerState, verify};

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
    keep_best: bool,
}

/// A folder with this start is not complete.
const UNFINISHED: &str = ".unfinished-";

impl Checkpoints {
    /// Checkpoints in `dir`, of which the newest `keep_last` stay and, with `keep_best`, the one with the lowest validation loss.
    pub fn new(dir: PathBuf, keep_last: usize, keep_best: bool) -> Self {
        Self { dir, keep_last: keep_last.max(1), keep_best }
    }

    /// Saves a checkpoint: `fill` writes weights and optimizer into a folder and completes the state; the folder gets its name when all is
    /// on the disk. A failure leaves earlier checkpoints as they were.
    pub fn save(
        &self,
        mut state: TrainerState,
        fill: impl FnOnce(&Path, &mut TrainerState) -> Result<(), CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        let name = format!("step-{:06}", state.step);
        let beside = self.dir.join(format!("{UNFINISHED}{name}"));
        self.clean()?;
        std::fs::create_dir_all(&beside).map_err(CheckpointError::io(&beside))?;
        let place = self.dir.join(name);
        let written = fill(&beside, &mut state)
            .and_then(|()| state.write(&beside))
            .and_then(|()| seal(&beside))
            .and_then(|()| self.put(&beside, &place));
        if let Err(error) = written {
            // The first error is the one to tell; what is left is removed at the next start.
            let _ = std::fs::remove_dir_all(&beside);
            return Err(error);
        }
        self.rotate(&state)?;
        Ok(place)
    }

    /// Complete-looking checkpoints, oldest first.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
        let mut found = Vec::new();
        if !self.dir.exists() {
            return Ok(found);
        }
        for entry in std::fs::read_dir(&self.dir).map_err(CheckpointError::io(&self.dir))? {
            let path = entry.map_err(CheckpointError::io(&self.dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
                found.push((step, path));
            }
        }
        found.sort();
        Ok(found)
    }

    /// The newest checkpoint that is as it was saved, and the newer ones that are not with the reason.
    pub fn newest_good(&self) -> Result<(Option<PathBuf>, Vec<CheckpointError>), CheckpointError> {
        let mut bad = Vec::new();
        for (_, path) in self.list()?.into_iter().rev() {
            match verify(&path) {
                Ok(_) => return Ok((Some(path), bad)),
                Err(error) => bad.push(error),
            }
        }
        Ok((None, bad))
    }

    /// Removes what a killed run left.
    pub fn clean(&self) -> Result<(), CheckpointError> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Ok(());
        };
        for entry in entries {
            let path = entry.map_err(CheckpointError::io(&self.dir))?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED)) {
                std::fs::remove_dir_all(&path).map_err(CheckpointError::io(&path))?;
            }
        }
        Ok(())
    }

    fn put(&self, beside: &Path, place: &Path) -> Result<(), CheckpointError> {
        if place.exists() {
            let old = self.dir.join(format!("{UNFINISHED}old"));
            std::fs::rename(place, &old).map_err(CheckpointError::io(place))?;
            std::fs::rename(beside, place).map_err(CheckpointError::io(place))?;
            std::fs::remove_dir_all(&old).map_err(CheckpointError::io(&old))?;
        } else {
            std::fs::rename(beside, place).map_err(CheckpointError::io(place))?;
        }
        sync(&self.dir)
    }

    fn rotate(&self, state: &TrainerState) -> Result<(), CheckpointError> {
        let all = self.list()?;
        // Checkpoints of later steps remain when an earlier one was resumed; they are of another past.
        let (past, future): (Vec<_>, Vec<_>) = all.into_iter().partition(|(step, _)| *step <= state.step);
        let surplus = past.len().saturating_sub(self.keep_last);
        let best = state.best_step.filter(|_| self.keep_best);
        let old = past.into_iter().take(surplus).filter(|(step, _)| Some(*step) != best);
        for (_, path) in old.chain(future) {
            std::fs::remove_dir_all(&path).map_err(CheckpointError::io(&path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn save(checkpoints: &Checkpoints, step: u64, best: Option<u64>) -> Result<PathBuf, CheckpointError> {
        let state = TrainerState { step, best_step: best, ..TrainerState::default() };
        checkpoints.save(state, |dir, _| {
            std::fs::write(dir.join("weights"), vec![step as u8; 1000]).map_err(CheckpointError::io(dir))
        })
    }

    fn steps(checkpoints: &Checkpoints) -> Vec<u64> {
        checkpoints.list().unwrap().into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn keeps_the_last_and_the_best() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().join("checkpoints"), 2, true);
        for (step, best) in [(10, 10), (20, 20), (30, 20), (40, 20), (50, 20)] {
            save(&checkpoints, step, Some(best)).unwrap();
        }
        assert_eq!(steps(&checkpoints), [20, 40, 50]);
        save(&checkpoints, 50, Some(50)).unwrap();
        assert_eq!(steps(&checkpoints), [40, 50]);
    }

    #[test]
    fn a_failed_save_leaves_the_earlier_ones() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().join("checkpoints"), 1, false);
        let first = save(&checkpoints, 1, None).unwrap();
        let failed = checkpoints.save(TrainerState { step: 2, ..TrainerState::default() }, |dir, _| {
            std::fs::write(dir.join("weights"), [1; 10]).unwrap();
            Err(CheckpointError::damaged(dir, "the disk is full"))
        });
        assert!(failed.unwrap_err().to_string().contains("the disk is full"));
        assert_eq!(checkpoints.newest_good().unwrap().0, Some(first));
        assert_eq!(std::fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 1);
    }

    #[test]
    fn damaged_checkpoints_are_passed_over_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 9, false);
        let paths: Vec<_> = (1..=4).map(|step| save(&checkpoints, step, None).unwrap()).collect();
        std::fs::write(paths[3].join("weights"), vec![4; 999]).unwrap();
        let mut flipped = vec![3; 1000];
        flipped[500] ^= 1;
        std::fs::write(paths[2].join("weights"), flipped).unwrap();
        std::fs::remove_file(paths[1].join("weights")).unwrap();
        let (good, bad) = checkpoints.newest_good().unwrap();
        assert_eq!(good.as_ref(), Some(&paths[0]));
        let reasons: Vec<String> = bad.iter().map(ToString::to_string).collect();
        assert!(reasons[0].contains("999 bytes") && reasons[1].contains("SHA-256"), "{reasons:?}");
        assert_eq!(reasons.len(), 3);
    }

    #[test]
    fn leftovers_of_a_killed_run_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 1, false);
        std::fs::create_dir(dir.path().join(".unfinished-step-000007")).unwrap();
        save(&checkpoints, 8, None).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
