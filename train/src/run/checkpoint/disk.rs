//! File operations of saving, behind a trait so that a test can make any of them fail.

use std::fmt::Debug;
use std::fs::File;
use std::io::{Result, Write};
use std::path::Path;

use crate::process::files;

/// Operations on files and folders that make up a save, in the order in which they reach the disk.
pub(super) trait Disk: Debug + Send + Sync {
    /// Creates a folder and its missing parents.
    fn create_folder(&self, path: &Path) -> Result<()>;

    /// Writes a new file.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()>;

    /// Renames a file or folder.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a file, or a folder with its contents; a missing path is not an error.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Syncs a file, or a folder's list of names, to disk.
    fn sync(&self, path: &Path) -> Result<()>;
}

/// File system of the operating system.
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
