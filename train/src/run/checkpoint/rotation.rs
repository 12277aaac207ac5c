//! Saving, listing and deleting checkpoints of a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{Disk, SystemDisk};
use super::manifest::seal;
use super::{CheckpointError, TrainerState, verify};
use crate::process::files::UNFINISHED;

/// Checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
    keep_best: bool,
    disk: Arc<dyn Disk>,
}

/// Prefix of the name of a checkpoint.
const STEP: &str = "step-";
/// Prefix of the name of a checkpoint that is being replaced by another of the same step.
const REPLACED: &str = "replaced-";
/// Prefix of the name of a checkpoint later than the one that a run was resumed from.
const SUPERSEDED: &str = "superseded-";

impl Checkpoints {
    /// Manages checkpoints in `dir`: the newest `keep_last` are kept and, with `keep_best`, the one with the lowest
    /// validation loss.
    pub fn new(dir: PathBuf, keep_last: usize, keep_best: bool) -> Self {
        Self { dir, keep_last: keep_last.max(1), keep_best, disk: Arc::new(SystemDisk) }
    }

    /// Saves a checkpoint: `fill` writes weights and optimizer into a folder and completes the state; the folder gets
    /// its name when everything is on disk. A failure leaves earlier checkpoints unchanged.
    pub fn save(
        &self,
        mut state: TrainerState,
        fill: impl FnOnce(&Path, &mut TrainerState) -> Result<(), CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        let name = format!("{STEP}{:06}", state.step);
        let beside = self.dir.join(format!("{UNFINISHED}{name}"));
        self.clean()?;
        self.disk.create_folder(&beside).map_err(CheckpointError::io(&beside))?;
        let place = self.dir.join(name);
        let written = fill(&beside, &mut state)
            .and_then(|()| state.write(&beside, self.disk.as_ref()))
            .and_then(|()| seal(&beside, self.disk.as_ref()))
            .and_then(|()| self.put(&beside, &place));
        if let Err(error) = written {
            // The first error is the one to report; remains are removed at the next start.
            let _ = self.disk.remove(&beside);
            return Err(error);
        }
        self.rotate(&state)?;
        Ok(place)
    }

    /// Complete-looking checkpoints, oldest first.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
        let mut found: Vec<(u64, PathBuf)> =
            self.names()?.into_iter().filter_map(|(name, path)| Some((step_of(&name)?, path))).collect();
        found.sort();
        Ok(found)
    }

    /// Newest checkpoint, verified; none if there are none. An unusable checkpoint is an error: skipping it would lose
    /// the steps since the one before, which is for the user to decide.
    pub fn newest(&self) -> Result<Option<PathBuf>, CheckpointError> {
        let mut all = self.list()?;
        let Some((_, newest)) = all.pop() else { return Ok(None) };
        match verify(&newest) {
            Ok(_) => Ok(Some(newest)),
            Err(reason) => {
                let good = all.into_iter().rev().map(|(_, path)| path).find(|path| verify(path).is_ok());
                let cure = match good.as_deref().and_then(Path::file_name) {
                    Some(name) => format!("--resume-from {} goes back on purpose", name.to_string_lossy()),
                    None => "there is no earlier one to go back to with --resume-from".into(),
                };
                Err(CheckpointError::Newest { path: newest, reason: Box::new(reason), cure })
            }
        }
    }

    /// Checkpoint with this path, name such as `step-000100`, or number of steps, verified.
    pub fn named(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        let all = self.list()?;
        let last = Path::new(name).file_name().unwrap_or_default().to_string_lossy();
        let step = step_of(&last).or_else(|| last.parse().ok());
        if let Some((_, path)) = all.iter().find(|(found, _)| Some(*found) == step) {
            verify(path)?;
            return Ok(path.clone());
        }
        let known: Vec<String> = all.iter().map(|(step, _)| format!("{STEP}{step:06}")).collect();
        let known = if known.is_empty() { "there is none".into() } else { format!("there are {}", known.join(", ")) };
        Err(CheckpointError::Unknown { name: name.to_string(), dir: self.dir.clone(), known })
    }

    /// Renames the checkpoints after a step, since a run that resumes before them continues differently; none is
    /// deleted. Returns their new names.
    pub fn set_aside(&self, step: u64) -> Result<Vec<PathBuf>, CheckpointError> {
        let mut set_aside = Vec::new();
        for (later, path) in self.list()?.into_iter().filter(|(later, _)| *later > step) {
            let place = (1..).map(|number| match number {
                1 => self.dir.join(format!("{SUPERSEDED}{STEP}{later:06}")),
                number => self.dir.join(format!("{SUPERSEDED}{number}-{STEP}{later:06}")),
            });
            let Some(place) = place.into_iter().find(|place| !place.exists()) else { continue };
            self.disk.rename(&path, &place).map_err(CheckpointError::io(&path))?;
            set_aside.push(place);
        }
        self.sync()?;
        Ok(set_aside)
    }

    /// Removes the unfinished files of a killed run, and restores the name of a checkpoint that it was replacing.
    pub fn clean(&self) -> Result<(), CheckpointError> {
        for (name, path) in self.names()? {
            let Some(unfinished) = name.strip_prefix(UNFINISHED) else { continue };
            let replaced = unfinished.strip_prefix(REPLACED).map(|name| self.dir.join(name));
            match replaced.filter(|place| !place.exists()) {
                Some(place) => self.disk.rename(&path, &place),
                None => self.disk.remove(&path),
            }
            .map_err(CheckpointError::io(&path))?;
        }
        Ok(())
    }

    /// Names and paths of all entries.
    fn names(&self) -> Result<Vec<(String, PathBuf)>, CheckpointError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(CheckpointError::io(&self.dir))?,
        };
        let named = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.map_err(CheckpointError::io(&self.dir))?;
            Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
        };
        entries.map(named).collect()
    }

    fn put(&self, beside: &Path, place: &Path) -> Result<(), CheckpointError> {
        let mut replaced = None;
        if place.exists() {
            let name = place.file_name().unwrap_or_default().to_string_lossy();
            let old = self.dir.join(format!("{UNFINISHED}{REPLACED}{name}"));
            self.disk.rename(place, &old).map_err(CheckpointError::io(place))?;
            replaced = Some(old);
        }
        if let Err(error) = self.disk.rename(beside, place) {
            if let Some(old) = &replaced {
                // The first error is the one to report; the next start repairs a failure here.
                let _ = self.disk.rename(old, place);
            }
            return Err(CheckpointError::io(place)(error));
        }
        self.sync()?;
        if let Some(old) = replaced {
            self.disk.remove(&old).map_err(CheckpointError::io(&old))?;
        }
        Ok(())
    }

    /// Deletes checkpoints that are neither among the newest nor the best.
    fn rotate(&self, state: &TrainerState) -> Result<(), CheckpointError> {
        let mut past = self.list()?;
        past.retain(|(step, _)| *step <= state.step);
        let surplus = past.len().saturating_sub(self.keep_last);
        let best = state.best_step.filter(|_| self.keep_best);
        for (step, path) in past.into_iter().take(surplus).filter(|(step, _)| Some(*step) != best) {
            // Renamed first, so that a half-deleted folder is not a checkpoint.
            let beside = self.dir.join(format!("{UNFINISHED}{STEP}{step:06}"));
            self.disk.rename(&path, &beside).map_err(CheckpointError::io(&path))?;
            self.disk.remove(&beside).map_err(CheckpointError::io(&beside))?;
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), CheckpointError> {
        match self.dir.exists() {
            true => self.disk.sync(&self.dir).map_err(CheckpointError::io(&self.dir)),
            false => Ok(()),
        }
    }
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix(STEP)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

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
        assert_eq!(checkpoints.newest().unwrap(), Some(first));
        assert_eq!(std::fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 1);
    }

    #[test]
    fn a_newest_checkpoint_that_cannot_be_used_stays_and_stops_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 9, false);
        let paths: Vec<_> = (1..=4).map(|step| save(&checkpoints, step, None).unwrap()).collect();
        let message = || checkpoints.newest().unwrap_err().to_string();
        std::fs::write(paths[3].join("weights"), vec![4; 999]).unwrap();
        let text = message();
        assert!(
            ["step-000004", "999 bytes", "--resume-from step-000003"].iter().all(|part| text.contains(part)),
            "{text}"
        );
        std::fs::write(paths[3].join("weights"), vec![4; 1000]).unwrap();
        assert_eq!(checkpoints.newest().unwrap().as_ref(), Some(&paths[3]));

        let manifest = std::fs::read_to_string(paths[3].join("manifest.json")).unwrap();
        let newer = manifest.replace("\"version\": 1", "\"version\": 7").replace("\"files\"", "\"parts\"");
        std::fs::write(paths[3].join("manifest.json"), newer).unwrap();
        assert!(message().contains("format version 7"), "{}", message());
        let mut flipped = vec![3; 1000];
        flipped[500] ^= 1;
        std::fs::write(paths[2].join("weights"), flipped).unwrap();
        std::fs::remove_file(paths[1].join("weights")).unwrap();
        assert!(message().contains("--resume-from step-000001"), "{}", message());

        for name in ["1", "step-000001", "somewhere/step-000001"] {
            assert_eq!(checkpoints.named(name).unwrap(), paths[0]);
        }
        assert!(checkpoints.named("2").is_err() && checkpoints.named("4").is_err());
        assert!(checkpoints.named("9").unwrap_err().to_string().contains("step-000004"));
        assert_eq!(checkpoints.set_aside(1).unwrap().len(), 3);
        assert_eq!(steps(&checkpoints), [1]);
        save(&checkpoints, 2, None).unwrap();
        assert_eq!(checkpoints.set_aside(1).unwrap()[0], dir.path().join("superseded-2-step-000002"));
        assert!(dir.path().join("superseded-step-000004/manifest.json").exists(), "nothing is deleted");
    }

    #[test]
    fn leftovers_of_a_killed_run_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 1, false);
        std::fs::create_dir(dir.path().join(".unfinished-step-000007")).unwrap();
        save(&checkpoints, 8, None).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// Disk on which one operation fails, and after a kill all later ones too.
    #[derive(Debug)]
    struct Breaking {
        at: usize,
        kill: bool,
        done: AtomicUsize,
    }

    impl Breaking {
        fn new(at: usize, kill: bool) -> Self {
            Self { at, kill, done: AtomicUsize::new(0) }
        }

        fn operation(&self, path: &Path, work: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
            let number = self.done.fetch_add(1, Ordering::Relaxed);
            match number == self.at || self.kill && number > self.at {
                true => Err(std::io::Error::other(format!("operation {number} on {}", path.display()))),
                false => work(),
            }
        }
    }

    impl Disk for Breaking {
        fn create_folder(&self, path: &Path) -> std::io::Result<()> {
            self.operation(path, || SystemDisk.create_folder(path))
        }

        fn write(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
            // A failing write may have written a part.
            for part in [0, bytes.len() / 2, bytes.len()] {
                self.operation(path, || SystemDisk.write(path, &bytes[..part]))?;
            }
            Ok(())
        }

        fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
            self.operation(from, || SystemDisk.rename(from, to))
        }

        fn remove(&self, path: &Path) -> std::io::Result<()> {
            // A folder is removed file by file.
            if path.is_dir() {
                for entry in std::fs::read_dir(path)? {
                    let inside = entry?.path();
                    self.operation(&inside, || SystemDisk.remove(&inside))?;
                }
            }
            self.operation(path, || SystemDisk.remove(path))
        }

        fn sync(&self, path: &Path) -> std::io::Result<()> {
            self.operation(path, || SystemDisk.sync(path))
        }
    }

    /// Saves a step in a folder with checkpoints of steps 1 and 2 and fails at one operation. Returns the number of
    /// operations.
    fn broken_save(step: u64, at: usize, kill: bool) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let whole = Checkpoints::new(dir.path().join("checkpoints"), 2, false);
        save(&whole, 1, None).unwrap();
        save(&whole, 2, None).unwrap();
        let disk = Arc::new(Breaking::new(at, kill));
        let broken = Checkpoints { disk: disk.clone(), ..whole.clone() };
        let written = broken.save(TrainerState { step, ..TrainerState::default() }, |dir, _| {
            for name in ["weights", "optimizer"] {
                let path = dir.join(name);
                disk.write(&path, &[step as u8; 100]).map_err(CheckpointError::io(&path))?;
            }
            Ok(())
        });
        let done = disk.done.load(Ordering::Relaxed);
        assert!(at >= done || written.is_err() || !kill, "operation {at} of {done} was to fail");
        // The next process.
        whole.clean().unwrap();
        let newest = whole.newest().unwrap().expect("a checkpoint");
        assert!(
            [2, step].contains(&step_of(&newest.file_name().unwrap().to_string_lossy()).unwrap()),
            "{at}: {newest:?}"
        );
        if written.is_ok() {
            assert!(newest.ends_with(format!("step-{step:06}")), "{at}: saved and lost");
        }
        save(&whole, 4, None).unwrap();
        let names: Vec<_> =
            std::fs::read_dir(dir.path().join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{at}: {names:?}");
        done
    }

    #[test]
    fn a_save_that_fails_or_is_killed_at_any_operation_loses_nothing() {
        for step in [3, 2] {
            let operations = broken_save(step, usize::MAX, false);
            assert!(operations > 20, "{operations}");
            for at in 0..operations {
                broken_save(step, at, false);
                broken_save(step, at, true);
            }
        }
    }
}
