//! File operations of saving, behind a trait so that a test can let any one of them fail.

use std::fmt::Debug;
use std::fs::File;
use std::io::{Result, Write};
use std::path::Path;

use crate::process::files;

/// Operations on files and folders that a save is made of, in the order in which they reach the disk.
pub(super) trait Disk: Debug + Send + Sync {
    /// Makes a folder and the missing ones above it.
    fn create_folder(&self, path: &Path) -> Result<()>;

    /// Writes a new file.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()>;

    /// Gives a file or folder another name.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a file, or a folder with all that is in it; nothing to remove is no failure.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Brings a file, or a folder's list of names, to the disk.
    fn sync(&self, path: &Path) -> Result<()>;
}

/// The system's files.
#[derive(Clone, Copy, Debug)]
pub(super) struct SystemDisk;

impl Disk for SystemDisk {
    fn create_folder(&self, path: &Path) -> Result<()> {
        std::fs::create_dir_all(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        File::create(path)?.write_all(bytes)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        files::remove_if_there(path)
    }

    fn sync(&self, path: &Path) -> Result<()> {
        files::sync(path)
    }
}
