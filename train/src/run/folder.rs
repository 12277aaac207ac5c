//! The folder of a run.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// A run's folder, held by this process alone until dropped.
#[derive(Debug)]
pub struct RunFolder {
    dir: PathBuf,
    _lock: File,
}

/// A folder that cannot be used for a run.
#[derive(Debug, thiserror::Error)]
pub enum RunFolderError {
    /// The system refuses.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Another process trains in it.
    #[error("{path} is in use by process {process}; wait for it, stop it, or choose another --out")]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Process id as written by that process.
        process: String,
    },
    /// It holds a run already.
    #[error("{path} already holds a run; continue it with --resume, or choose another --out")]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// It holds no run to continue.
    #[error("{path} holds no run to resume; check --out, or start one without --resume")]
    NoRun {
        /// The folder.
        path: PathBuf,
    },
}

impl RunFolder {
    /// Opens a folder for a new run, or for the one it holds, and locks it.
    pub fn open(dir: &Path, resume: bool) -> Result<Self, RunFolderError> {
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| RunFolderError::Io { path, source }
        };
        if resume && !dir.join("config.toml").exists() {
            return Err(RunFolderError::NoRun { path: dir.to_path_buf() });
        }
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let path = dir.join("lock");
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
        if !resume && dir.join("config.toml").exists() {
            return Err(RunFolderError::Occupied { path: dir.to_path_buf() });
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(io(&path))?;
        Ok(Self { dir: dir.to_path_buf(), _lock: lock })
    }

    /// The next free `PARENT/NAME-001`.
    pub fn next_free(parent: &Path, name: &str) -> PathBuf {
        let numbered = |number: u32| parent.join(format!("{name}-{number:03}"));
        let mut number = 1;
        while numbered(number).exists() {
            number += 1;
        }
        numbered(number)
    }

    /// The run in `parent` that was changed last.
    pub fn newest(parent: &Path) -> Option<PathBuf> {
        let entries = std::fs::read_dir(parent).ok()?;
        let runs =
            entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.join("config.toml").exists());
        runs.max_by_key(|path| std::fs::metadata(path.join("metrics.jsonl")).and_then(|data| data.modified()).ok())
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A file or folder in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a file whole or not at all.
    pub fn write(&self, name: &str, text: &str) -> Result<(), RunFolderError> {
        let path = self.dir.join(name);
        let written = tempfile::NamedTempFile::new_in(&self.dir).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        });
        written.map_err(|source| RunFolderError::Io { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_serves_one_run_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        assert!(matches!(RunFolder::open(&path, true), Err(RunFolderError::NoRun { .. })));
        let folder = RunFolder::open(&path, false).unwrap();
        folder.write("config.toml", "x = 1").unwrap();
        let message = RunFolder::open(&path, true).unwrap_err().to_string();
        assert!(message.contains(&std::process::id().to_string()), "{message}");
        drop(folder);
        assert!(matches!(RunFolder::open(&path, false), Err(RunFolderError::Occupied { .. })));
        RunFolder::open(&path, true).unwrap();
        assert_eq!(RunFolder::next_free(dir.path(), "run"), dir.path().join("run-001"));
        assert_eq!(RunFolder::newest(dir.path()), Some(path));
    }
}
