//! Files that go with the weights of a model: tokenizer, chat template, settings of generation and of images.

use std::path::Path;

use super::gguf::{GgufFile, files};
use super::open::open;
use crate::error::ModelError;

/// Name of a chat template in a file of its own.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Folder of further chat templates.
pub const FURTHER_TEMPLATES: &str = "additional_chat_templates";

/// Files that go with the weights unchanged.
const COMPANIONS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    "generation_config.json",
    "preprocessor_config.json",
    "vocab.json",
    "merges.txt",
];

/// Content of a file of a model folder, such as `tokenizer.json`; none if there is no such file. `model` may be a GGUF file, whose
/// metadata says the same.
pub fn companion(model: &Path, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
    if model.is_file() {
        let mut files = files(&GgufFile::open(model)?)?;
        return Ok(files.remove(name).map(String::into_bytes));
    }
    let path = model.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut open(&path)?, &mut bytes).map_err(ModelError::io(&path))?;
    Ok(Some(bytes))
}

/// Copies tokenizer, chat templates, generation and image settings of one model, if present, into the folder of another.
pub fn copy_companions(from: &Path, to: &Path) -> Result<(), ModelError> {
    for name in COMPANIONS {
        if let Some(bytes) = companion(from, name)? {
            // Written instead of copied, so that the umask determines the permissions.
            std::fs::write(to.join(name), bytes).map_err(ModelError::io(to.join(name)))?;
        }
    }
    let further = from.join(FURTHER_TEMPLATES);
    if further.is_dir() {
        let into = to.join(FURTHER_TEMPLATES);
        std::fs::create_dir_all(&into).map_err(ModelError::io(&into))?;
        for entry in std::fs::read_dir(&further).map_err(ModelError::io(&further))? {
            let name = entry.map_err(ModelError::io(&further))?.file_name();
            if let (true, Some(bytes)) = (is_template(&name), companion(&further, &name.to_string_lossy())?) {
                std::fs::write(into.join(&name), bytes).map_err(ModelError::io(into.join(&name)))?;
            }
        }
    }
    Ok(())
}

fn is_template(name: &std::ffi::OsStr) -> bool {
    Path::new(name).extension().is_some_and(|end| end == "jinja")
}
