//! Files of a model that say how texts become tokens.

use std::path::Path;

use lowrank_models::hub::companion;

use super::DataError;

/// Content of a file of a model folder, such as `DIR/tokenizer.json`; none if there is no such file. In place of the folder
/// there may be a GGUF file, whose metadata says the same.
pub(super) fn model_file(path: &Path) -> Result<Option<Vec<u8>>, DataError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(companion(path.parent().unwrap_or(Path::new("")), &name)?)
}

/// Text of such a file.
pub(super) fn model_text(path: &Path) -> Result<Option<String>, DataError> {
    let bytes = model_file(path)?;
    let text = bytes.map(|bytes| {
        String::from_utf8(bytes).map_err(|error| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, error.utf8_error());
            DataError::read(path)(source)
        })
    });
    text.transpose()
}
