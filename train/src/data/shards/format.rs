//! Format of a folder of token files, and how its files are written to stay.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::DataError;

/// Maximum number of tokens in one file, unless a [`ShardWriter`](super::ShardWriter) is given another one.
pub const TOKENS_PER_FILE: u64 = 64 << 20;

pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const VERSION: u32 = 1;

/// Contents of a folder of token files; stored in the folder as `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub version: u32,
    /// Number of ids; a token is stored in two bytes for up to 65,536 of them and in four above, little endian.
    pub vocab_size: u32,
    /// Id at the start of every document.
    pub separator: u32,
    /// Fingerprint of the tokenizer that made the tokens.
    pub tokenizer: String,
    /// The token files, in order.
    pub files: Vec<ShardFile>,
    /// SHA-256 of this manifest with this field empty.
    pub sha256: String,
}

/// One token file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardFile {
    /// File name inside the folder.
    pub name: String,
    /// Tokens in the file, separators included.
    pub tokens: u64,
    /// Documents that start in the file.
    pub documents: u64,
    /// Bytes of text of the documents that start in the file.
    pub text_bytes: u64,
    /// SHA-256 of the file.
    pub sha256: String,
}

impl Manifest {
    /// Tokens in all files, separators included.
    pub fn tokens(&self) -> u64 {
        self.files.iter().map(|f| f.tokens).sum()
    }

    pub(super) fn token_bytes(&self) -> usize {
        if self.vocab_size <= 1 << 16 { 2 } else { 4 }
    }

    pub(super) fn digest(&self) -> Result<String, serde_json::Error> {
        let bare = Self { sha256: String::new(), ..self.clone() };
        Ok(hex(&Sha256::digest(serde_json::to_vec(&bare)?)))
    }
}

/// Temporary folder in which `folder` is prepared.
pub(in crate::data) fn partial_of(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}.partial"))
}

pub(in crate::data) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let mut file = File::create(path).map_err(DataError::write(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(DataError::write(path))
}

/// Syncs the parent folder of `path`, so that a rename into it survives a power failure.
pub(in crate::data) fn sync_parent(path: &Path) -> Result<(), DataError> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    // Only on Unix can a folder be opened and synced.
    if cfg!(unix) {
        File::open(parent).and_then(|folder| folder.sync_all()).map_err(DataError::write(parent))?;
    }
    Ok(())
}

pub(in crate::data) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
