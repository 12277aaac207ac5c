//! Opening the files of a folder.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::ModelError;

/// Opens a file. A pipe or a device in its place is rejected: reading one may block forever.
pub(super) fn open(path: &Path) -> Result<File, ModelError> {
    match std::fs::metadata(path).map_err(ModelError::io(path))?.is_file() {
        true => File::open(path).map_err(ModelError::io(path)),
        false => Err(ModelError::File { path: path.to_path_buf(), reason: "is not a regular file".into() }),
    }
}

/// Reads the text of a file; see [`open`].
pub(super) fn read_text(path: &Path) -> Result<String, ModelError> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text).map_err(ModelError::io(path))?;
    Ok(text)
}
