//! Folder of a run.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::process::files;

/// Folder of a run, locked by this process until dropped. Of several processes that train together the first locks it
/// and writes for all.
#[derive(Debug)]
pub struct RunFolder {
    dir: PathBuf,
    /// None for a process that only reads.
    lock: Option<File>,
}

/// Folder that cannot be used for a run.
#[derive(Debug, thiserror::Error)]
pub enum RunFolderError {
    /// Failure of a system operation.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Reason given by the system.
        source: std::io::Error,
    },
    /// Folder in which another process trains.
    #[error("{path} is in use by process {process}; wait for it, stop it, or choose another --out")]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Process id as written by that process.
        process: String,
    },
    /// Folder that already holds results of a run.
    #[error(
        "{path} already holds a run ({found}); continue it with --resume, choose another --out, or replace it with --overwrite"
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// Results that were found.
        found: String,
    },
    /// Folder without a run to continue.
    #[error("{path} holds no run to resume; check --out, or start one without --resume")]
    NoRun {
        /// The folder.
        path: PathBuf,
    },
    /// Folder whose lock is not a regular file of its own.
    #[error("{path} is a symbolic link, not the lock of a run; remove it, or choose another --out")]
    Link {
        /// Path of the lock.
        path: PathBuf,
    },
}

/// Purpose for which a folder is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// A new run; a folder with results of another one is rejected.
    New,
    /// A new run that replaces the one in the folder, if any.
    Overwrite,
    /// The run in the folder.
    Resume,
}

/// Files of results.
const RESULTS: [&str; 3] = ["config.toml", "summary.json", "metrics.jsonl"];
/// Folders of results, with the prefix of the names in them.
const RESULT_FOLDERS: [(&str, &str); 2] = [("checkpoints", "step-"), ("tensorboard", "events.out.tfevents")];

impl RunFolder {
    /// Opens a folder and locks it. Results that are to be overwritten stay until [`RunFolder::clear`].
    pub fn open(dir: &Path, opening: Opening) -> Result<Self, RunFolderError> {
        if opening == Opening::Resume && !dir.join("config.toml").exists() {
            return Err(RunFolderError::NoRun { path: dir.to_path_buf() });
        }
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let path = dir.join("lock");
        if std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) {
            return Err(RunFolderError::Link { path });
        }
        let mut lock =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(io(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut process = String::new();
                lock.read_to_string(&mut process).map_err(io(&path))?;
                return Err(RunFolderError::Locked { path: dir.to_path_buf(), process: process.trim().into() });
            }
            Err(TryLockError::Error(source)) => return Err(RunFolderError::Io { path, source }),
        }
        if opening == Opening::New
            && let Some(found) = results(dir).first()
        {
            let found = found.strip_prefix(dir).unwrap_or(found).display().to_string();
            return Err(RunFolderError::Occupied { path: dir.to_path_buf(), found });
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(io(&path))?;
        files::remove_unfinished(dir).map_err(io(dir))?;
        Ok(Self { dir: dir.to_path_buf(), lock: Some(lock) })
    }

    /// The folder in which another process trains together with this one, to read only.
    pub fn follow(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), lock: None }
    }

    /// Creates and opens the next free `PARENT/NAME-001`. Of several processes that do so at the same time, each gets a
    /// folder of its own.
    pub fn create_next(parent: &Path, name: &str) -> Result<Self, RunFolderError> {
        std::fs::create_dir_all(parent).map_err(io(parent))?;
        let mut number = 1u32;
        loop {
            let dir = parent.join(format!("{name}-{number:03}"));
            match std::fs::create_dir(&dir) {
                Ok(()) => return Self::open(&dir, Opening::New),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(source) => return Err(RunFolderError::Io { path: dir, source }),
            }
        }
    }

    /// Removes the results of the run in the folder, and nothing else.
    pub fn clear(&self) -> Result<(), RunFolderError> {
        if self.lock.is_none() {
            return Ok(());
        }
        for path in results(&self.dir) {
            files::remove_if_there(&path).map_err(io(&path))?;
        }
        Ok(())
    }

    /// Most recently changed run in `parent`.
    pub fn newest(parent: &Path) -> Option<PathBuf> {
        let entries = std::fs::read_dir(parent).ok()?;
        let runs =
            entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.join("config.toml").exists());
        runs.max_by_key(|path| std::fs::metadata(path.join("metrics.jsonl")).and_then(|data| data.modified()).ok())
    }

    /// Path of the folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Path of a file or folder in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a file completely or not at all, and syncs it to disk.
    pub fn write(&self, name: &str, text: &str) -> Result<(), RunFolderError> {
        if self.lock.is_none() {
            return Ok(());
        }
        let path = self.dir.join(name);
        files::write_whole(&path, text.as_bytes()).map_err(io(&path))
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> RunFolderError {
    let path = path.to_path_buf();
    move |source| RunFolderError::Io { path, source }
}

/// Files and folders of a run's results in its folder. An empty file of metrics is ignored.
fn results(dir: &Path) -> Vec<PathBuf> {
    let is_result = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() > 0);
    let mut found: Vec<PathBuf> = RESULTS.iter().map(|name| dir.join(name)).filter(is_result).collect();
    for (folder, start) in RESULT_FOLDERS {
        let Ok(entries) = std::fs::read_dir(dir.join(folder)) else { continue };
        let mut inside: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        inside.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start)));
        inside.sort();
        found.extend(inside);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_serves_one_run_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        assert!(matches!(RunFolder::open(&path, Opening::Resume), Err(RunFolderError::NoRun { .. })));
        let folder = RunFolder::open(&path, Opening::New).unwrap();
        folder.write("config.toml", "x = 1").unwrap();
        let message = RunFolder::open(&path, Opening::Resume).unwrap_err().to_string();
        assert!(message.contains(&std::process::id().to_string()), "{message}");
        drop(folder);
        RunFolder::open(&path, Opening::Resume).unwrap();
        assert_eq!(RunFolder::newest(dir.path()), Some(path));
    }

    #[test]
    fn results_of_another_run_are_refused_or_overwritten_on_demand() {
        for name in [
            "config.toml",
            "summary.json",
            "metrics.jsonl",
            "checkpoints/step-000004",
            "tensorboard/events.out.tfevents.1",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "a result").unwrap();
            std::fs::write(dir.path().join("notes.txt"), "of the user").unwrap();
            let message = RunFolder::open(dir.path(), Opening::New).unwrap_err().to_string();
            assert!([name, "--resume", "--out", "--overwrite"].iter().all(|part| message.contains(part)), "{message}");
            let folder = RunFolder::open(dir.path(), Opening::Overwrite).unwrap();
            assert!(path.exists(), "nothing is removed before the new run is ready");
            folder.clear().unwrap();
            assert!(!path.exists() && dir.path().join("notes.txt").exists());
        }
    }

    #[test]
    fn simultaneous_starts_get_folders_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let start = || RunFolder::create_next(dir.path(), "run").unwrap();
        let folders: Vec<RunFolder> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            starts.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let mut names: Vec<_> = folders.iter().map(|folder| folder.path().to_path_buf()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 8);
    }

    #[cfg(unix)]
    #[test]
    fn a_lock_that_is_a_link_is_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("precious");
        std::fs::write(&other, "untouched").unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        std::os::unix::fs::symlink(&other, run.join("lock")).unwrap();
        assert!(matches!(RunFolder::open(&run, Opening::New), Err(RunFolderError::Link { .. })));
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "untouched");
    }
}
