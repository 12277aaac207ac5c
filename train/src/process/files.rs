//! Files that are written completely or not at all, and synced to disk.

use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::path::{Path, PathBuf};

/// Prefix of the names of incomplete files and folders. Any process that finds one after a crash may remove it.
pub const UNFINISHED: &str = ".unfinished-";

/// Temporary path next to `path` where it is written before it gets its name.
pub fn unfinished(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{UNFINISHED}{name}"))
}

/// Writes a file completely or not at all, with the permissions that the umask leaves, and syncs it to disk.
///
/// One process at a time may write a path; a symbolic link in its place is replaced, not followed.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = WholeFile::create(path)?;
    file.write_all(bytes)?;
    file.finish()
}

/// File that is written in parts as [`write_whole`] does it: it gets its name when it is finished, and is removed when it
/// is dropped before.
#[derive(Debug)]
pub struct WholeFile {
    file: BufWriter<File>,
    path: PathBuf,
    finished: bool,
}

impl WholeFile {
    /// Begins a file that will have this path.
    pub fn create(path: &Path) -> Result<Self> {
        let beside = unfinished(path);
        // Remains of a killed process; a newly created file follows no link.
        remove_if_there(&beside)?;
        let file = BufWriter::new(File::create_new(&beside)?);
        Ok(Self { file, path: path.to_path_buf(), finished: false })
    }

    /// Syncs the file and gives it its name.
    pub fn finish(mut self) -> Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        std::fs::rename(unfinished(&self.path), &self.path)?;
        self.finished = true;
        sync_parent(&self.path)
    }
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if !self.finished {
            // The first error is the one to report.
            let _ = std::fs::remove_file(unfinished(&self.path));
        }
    }
}

/// Syncs a file or a folder's list of names to disk.
pub fn sync(path: &Path) -> Result<()> {
    // Only on Unix can a folder be opened and synced.
    if cfg!(unix) || path.is_file() { File::open(path)?.sync_all() } else { Ok(()) }
}

/// Syncs all files of a folder and the folder itself to disk.
pub fn sync_folder(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { sync_folder(&path)? } else { sync(&path)? }
    }
    sync(dir)
}

/// Syncs the parent folder of `path`, so that a change of names survives a power failure.
pub fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync(Path::new(".")),
        Some(parent) => sync(parent),
        None => Ok(()),
    }
}

/// Removes a file, or a folder with its contents, if it exists.
pub fn remove_if_there(path: &Path) -> Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the unfinished files of killed processes in a folder.
pub fn remove_unfinished(dir: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            remove_if_there(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_replaces_a_link_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a.json"), dir.path().join("other"));
        std::fs::write(&other, "untouched").unwrap();
        #[cfg(unix)]
        for link in [&path, &unfinished(&path)] {
            std::os::unix::fs::symlink(&other, link).unwrap();
        }
        write_whole(&path, b"new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "untouched");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn permissions_follow_the_umask() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        std::fs::write(dir.path().join("plain"), "").unwrap();
        write_whole(&dir.path().join("whole"), b"").unwrap();
        assert_eq!(mode("whole"), mode("plain"));
    }

    #[test]
    fn what_is_unfinished_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(".unfinished-folder")).unwrap();
        std::fs::write(dir.path().join(".unfinished-folder/a"), "").unwrap();
        std::fs::write(dir.path().join(".unfinished-file"), "").unwrap();
        std::fs::write(dir.path().join("kept"), "").unwrap();
        remove_unfinished(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        remove_unfinished(&dir.path().join("nowhere")).unwrap();
    }
}
