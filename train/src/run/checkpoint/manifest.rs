//! Sizes and hashes of the files of a checkpoint.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::CheckpointError;
use super::disk::Disk;
use super::optimizer::is_state;

/// Name of the manifest's file.
const NAME: &str = "manifest.json";
/// Version of the format.
const VERSION: u32 = 1;

/// Files of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub version: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// Every file except the manifest.
    pub files: BTreeMap<String, FileEntry>,
}

/// The part of a manifest that all versions share.
#[derive(Deserialize)]
struct Format {
    version: u32,
    #[serde(default)]
    program: String,
}

/// Size and hash of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in hexadecimal digits.
    pub sha256: String,
}

/// Writes the manifest of a folder and syncs all its files to disk.
pub(super) fn seal(dir: &Path, disk: &dyn Disk) -> Result<(), CheckpointError> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(CheckpointError::io(dir))? {
        let path = entry.map_err(CheckpointError::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, hash(&path)?);
        disk.sync(&path).map_err(CheckpointError::io(&path))?;
    }
    let manifest = Manifest { version: VERSION, program: env!("CARGO_PKG_VERSION").into(), files };
    let path = dir.join(NAME);
    let text = match serde_json::to_string_pretty(&manifest) {
        Ok(text) => text,
        Err(error) => unreachable!("a map of texts and numbers is JSON: {error}"),
    };
    disk.write(&path, text.as_bytes()).map_err(CheckpointError::io(&path))?;
    disk.sync(&path).map_err(CheckpointError::io(&path))?;
    disk.sync(dir).map_err(CheckpointError::io(dir))
}

/// Checks size and hash of every file of a checkpoint. Additional files are ignored.
pub fn verify(dir: &Path) -> Result<Manifest, CheckpointError> {
    let path = dir.join(NAME);
    let text = std::fs::read_to_string(&path).map_err(CheckpointError::io(&path))?;
    let damaged = |error: serde_json::Error| CheckpointError::damaged(&path, error.to_string());
    // The version comes first: the remaining content of a newer manifest may have another format.
    let Format { version, program } = serde_json::from_str(&text).map_err(damaged)?;
    if version != VERSION {
        return Err(CheckpointError::Version { path, found: version, known: VERSION, program });
    }
    let manifest: Manifest = serde_json::from_str(&text).map_err(damaged)?;
    for (name, entry) in &manifest.files {
        let path = dir.join(name);
        let size = std::fs::metadata(&path).map_err(CheckpointError::io(&path))?.len();
        if size != entry.size {
            let reason = format!("has {size} bytes instead of {}", entry.size);
            return Err(CheckpointError::damaged(&path, reason));
        }
        if hash(&path)? != *entry {
            return Err(CheckpointError::damaged(&path, "has another content than was saved (SHA-256 differs)"));
        }
    }
    Ok(manifest)
}

/// SHA-256, in hexadecimal digits, of the names and contents of configuration and weights in the folder of a model or
/// an adapter, or of the content of a model that is one file.
pub fn folder_hash(dir: &Path) -> Result<String, CheckpointError> {
    if dir.is_file() {
        return Ok(hash(dir)?.sha256);
    }
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(CheckpointError::io(dir))? {
        let path = entry.map_err(CheckpointError::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if ["config.json", "adapter_config.json"].contains(&name.as_str())
            || name.ends_with(".safetensors") && !is_state(&name)
        {
            files.insert(name, hash(&path)?.sha256);
        }
    }
    let mut hasher = Sha256::new();
    files.iter().for_each(|(name, sha256)| hasher.update(format!("{name} {sha256}\n")));
    Ok(format!("{:x}", hasher.finalize()))
}

fn hash(path: &Path) -> Result<FileEntry, CheckpointError> {
    let mut file = File::open(path).map_err(CheckpointError::io(path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        match file.read(&mut buffer).map_err(CheckpointError::io(path))? {
            0 => break,
            count => {
                hasher.update(&buffer[..count]);
                size += count as u64;
            }
        }
    }
    Ok(FileEntry { size, sha256: format!("{:x}", hasher.finalize()) })
}
