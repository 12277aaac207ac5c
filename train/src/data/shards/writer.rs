//! Writing of token files.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::format::{MANIFEST, Manifest, ShardFile, VERSION, hex, partial_of, sync_parent, write_synced};
use crate::data::DataError;

/// Number of tokens written at a time.
const TOGETHER: usize = 1 << 20;

/// Writes token files into a temporary folder, which gets its final name only when everything is complete.
pub struct ShardWriter {
    folder: PathBuf,
    partial: PathBuf,
    tokens_per_file: u64,
    manifest: Manifest,
    open: Option<(BufWriter<File>, Sha256)>,
    buffer: Vec<u8>,
    finished: bool,
}

impl ShardWriter {
    /// Starts token files that will be in `folder`, which must not exist. Removes the remains of an interrupted writer.
    pub fn create(
        folder: &Path,
        vocab_size: u32,
        separator: u32,
        tokenizer: String,
        tokens_per_file: u64,
    ) -> Result<Self, DataError> {
        if folder.exists() {
            return Err(DataError::Exists { path: folder.to_path_buf() });
        }
        let partial = partial_of(folder);
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(DataError::write(&partial))?;
        }
        fs::create_dir_all(&partial).map_err(DataError::write(&partial))?;
        Ok(Self {
            folder: folder.to_path_buf(),
            partial,
            tokens_per_file: tokens_per_file.max(1),
            manifest: Manifest {
                version: VERSION,
                vocab_size,
                separator,
                tokenizer,
                files: Vec::new(),
                sha256: String::new(),
            },
            open: None,
            buffer: Vec::new(),
            finished: false,
        })
    }

    /// Appends one document: its tokens, the separator first, and the size of its text in bytes.
    pub fn push(&mut self, tokens: &[u32], text_bytes: u64) -> Result<(), DataError> {
        self.write(tokens, Some(text_bytes))
    }

    /// Appends further tokens of the document that was pushed last.
    pub fn extend(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.write(tokens, None)
    }

    fn write(&mut self, tokens: &[u32], mut text_bytes: Option<u64>) -> Result<(), DataError> {
        let mut rest = tokens;
        while !rest.is_empty() {
            if self.open.is_none() {
                self.begin_file()?;
            }
            let Some(entry) = self.manifest.files.last_mut() else {
                break;
            };
            if let Some(text_bytes) = text_bytes.take() {
                entry.documents += 1;
                entry.text_bytes += text_bytes;
            }
            let room = self.tokens_per_file - entry.tokens;
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(TOGETHER);
            let (now, later) = rest.split_at(rest.len().min(room));
            let path = self.partial.join(&entry.name);
            self.buffer.clear();
            for (i, &token) in now.iter().enumerate() {
                if token >= self.manifest.vocab_size {
                    return Err(DataError::OutOfVocabulary {
                        path,
                        position: entry.tokens + i as u64,
                        token,
                        vocab_size: self.manifest.vocab_size,
                    });
                }
                if self.manifest.vocab_size <= 1 << 16 {
                    self.buffer.extend_from_slice(&(token as u16).to_le_bytes());
                } else {
                    self.buffer.extend_from_slice(&token.to_le_bytes());
                }
            }
            entry.tokens += now.len() as u64;
            let full = entry.tokens == self.tokens_per_file;
            if let Some((file, hash)) = &mut self.open {
                file.write_all(&self.buffer).map_err(DataError::write(&path))?;
                hash.update(&self.buffer);
            }
            if full {
                self.end_file()?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Completes the files and moves the folder into place.
    pub fn finish(mut self) -> Result<Manifest, DataError> {
        self.end_file()?;
        let path = self.partial.join(MANIFEST);
        self.manifest.sha256 = self.manifest.digest().map_err(|e| DataError::write(&path)(e.into()))?;
        let text = serde_json::to_vec_pretty(&self.manifest).map_err(|e| DataError::write(&path)(e.into()))?;
        write_synced(&path, &text)?;
        fs::rename(&self.partial, &self.folder).map_err(DataError::write(&self.folder))?;
        self.finished = true;
        sync_parent(&self.folder)?;
        Ok(self.manifest.clone())
    }

    fn begin_file(&mut self) -> Result<(), DataError> {
        let name = format!("tokens-{:05}.bin", self.manifest.files.len());
        let path = self.partial.join(&name);
        let file = File::create(&path).map_err(DataError::write(&path))?;
        self.open = Some((BufWriter::new(file), Sha256::new()));
        self.manifest.files.push(ShardFile { name, tokens: 0, documents: 0, text_bytes: 0, sha256: String::new() });
        Ok(())
    }

    fn end_file(&mut self) -> Result<(), DataError> {
        let Some((file, hash)) = self.open.take() else {
            return Ok(());
        };
        let Some(entry) = self.manifest.files.last_mut() else {
            return Ok(());
        };
        let path = self.partial.join(&entry.name);
        entry.sha256 = hex(&hash.finalize());
        file.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all()).map_err(DataError::write(&path))
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Remains of this attempt are removed by the next writer.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}
