//! Token files: written once, then mapped into memory.

mod format;
mod writer;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{DataError, Progress, Stage};
use format::{MANIFEST, VERSION};
pub(super) use format::{hex, partial_of, sync_parent, write_synced};

pub use format::{Manifest, ShardFile, TOKENS_PER_FILE};
pub use writer::ShardWriter;

/// Memory-mapped token files: the operating system loads the pages in use and evicts others, so they may be larger than
/// memory.
///
/// Cloning shares the mapping.
#[derive(Clone)]
pub struct Shards {
    folder: PathBuf,
    manifest: Arc<Manifest>,
    maps: Arc<[Mmap]>,
    /// Position of the first token of each file, and of the end.
    begins: Arc<[u64]>,
}

impl std::fmt::Debug for Shards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shards").field("folder", &self.folder).field("tokens", &self.len()).finish()
    }
}

impl Shards {
    /// Returns true if `folder` looks like one made by [`ShardWriter`].
    pub fn is_at(folder: &Path) -> bool {
        folder.join(MANIFEST).is_file()
    }

    /// Opens a folder made by [`ShardWriter`]; checks the manifest and the size of every file.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(MANIFEST);
        let text = fs::read(&path).map_err(DataError::read(&path))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|e| DataError::shard(&path, format!("not a manifest of token files ({e})")))?;
        let digest = manifest.digest().map_err(|e| DataError::shard(&path, e.to_string()))?;
        if manifest.version != VERSION {
            let problem = format!("version {} is not the known {VERSION}", manifest.version);
            return Err(DataError::shard(&path, problem));
        }
        if manifest.sha256 != digest {
            return Err(DataError::shard(&path, "its own hash does not fit: the file was changed"));
        }
        if manifest.vocab_size > i32::MAX as u32 || manifest.separator >= manifest.vocab_size {
            return Err(DataError::shard(&path, "the vocabulary or the separator is out of range"));
        }
        let mut maps = Vec::with_capacity(manifest.files.len());
        let mut begins = vec![0];
        let mut end = 0u64;
        for entry in &manifest.files {
            let path = folder.join(&entry.name);
            let file = File::open(&path).map_err(DataError::read(&path))?;
            let bytes = file.metadata().map_err(DataError::read(&path))?.len();
            let expected = entry.tokens.saturating_mul(manifest.token_bytes() as u64);
            if bytes != expected {
                let problem = format!("{bytes} bytes instead of {expected}: truncated or changed");
                return Err(DataError::shard(&path, problem));
            }
            // SAFETY: the mapping is read-only, and token files are renamed into place complete and never written again by
            // this program. Another program that truncates one while it is in use would end the process with SIGBUS.
            let map = unsafe { Mmap::map(&file) }.map_err(DataError::read(&path))?;
            maps.push(map);
            end += entry.tokens;
            begins.push(end);
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            manifest: Arc::new(manifest),
            maps: maps.into(),
            begins: begins.into(),
        })
    }

    /// Reads everything: checks the SHA-256 of every file and that every token is in the vocabulary.
    pub fn verify(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), DataError> {
        let total: u64 = self.maps.iter().map(|m| m.len() as u64).sum();
        let mut done = 0;
        let group = rayon::current_num_threads().max(1);
        for first in (0..self.maps.len()).step_by(group) {
            let group = first..self.maps.len().min(first + group);
            // Results are collected before checking, so that the first damaged file in order is reported.
            let results: Vec<_> = group.clone().into_par_iter().map(|f| self.verify_file(f)).collect();
            results.into_iter().collect::<Result<(), _>>()?;
            done += group.map(|f| self.maps[f].len() as u64).sum::<u64>();
            progress(Progress { stage: Stage::Verify, done, total });
        }
        Ok(())
    }

    fn verify_file(&self, file: usize) -> Result<(), DataError> {
        let (entry, map) = (&self.manifest.files[file], &self.maps[file]);
        if hex(&Sha256::digest(map)) != entry.sha256 {
            let path = self.folder.join(&entry.name);
            return Err(DataError::shard(&path, "SHA-256 does not fit: the content was changed"));
        }
        self.copy(self.begins[file], entry.tokens, |_| ())
    }

    /// Bytes of the token files.
    pub fn mapped_bytes(&self) -> u64 {
        self.maps.iter().map(|map| map.len() as u64).sum()
    }

    /// Rejects token ids beyond the rows of the model's embedding.
    pub fn check_ids(&self, rows: usize) -> Result<(), DataError> {
        for (file, entry) in self.manifest.files.iter().enumerate() {
            let mut found = None;
            let mut position = 0;
            self.copy(self.begins[file], entry.tokens, |token| {
                if token as usize >= rows && found.is_none() {
                    found = Some((position, token));
                }
                position += 1;
            })?;
            if let Some((position, token)) = found {
                let path = self.folder.join(&entry.name);
                return Err(DataError::OutOfVocabulary { path, position, token, vocab_size: rows as u32 });
            }
        }
        Ok(())
    }

    /// Folder of the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Contents of the folder.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of tokens, separators included.
    pub fn len(&self) -> u64 {
        self.begins.last().copied().unwrap_or(0)
    }

    /// Returns true if there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.manifest.files.iter().map(|f| f.documents).sum()
    }

    /// Bytes of the text (UTF-8) that the tokens came from.
    pub fn text_bytes(&self) -> u64 {
        self.manifest.files.iter().map(|f| f.text_bytes).sum()
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> u32 {
        self.manifest.vocab_size
    }

    /// Id at the start of every document.
    pub fn separator(&self) -> u32 {
        self.manifest.separator
    }

    /// Fingerprint of the tokenizer that made the tokens.
    pub fn tokenizer_fingerprint(&self) -> &str {
        &self.manifest.tokenizer
    }

    /// Copies the tokens starting at `start` into `out`.
    ///
    /// # Errors
    /// The range reaches beyond the end, or a token is outside the vocabulary (the file is damaged).
    pub fn read(&self, start: u64, out: &mut [u32]) -> Result<(), DataError> {
        let mut slots = out.iter_mut();
        let len = slots.len() as u64;
        self.copy(start, len, |token| {
            if let Some(slot) = slots.next() {
                *slot = token;
            }
        })
    }

    /// Passes the tokens `start..start + len` to `sink`, in order and without allocating.
    pub(super) fn copy(&self, start: u64, len: u64, mut sink: impl FnMut(u32)) -> Result<(), DataError> {
        let end = match start.checked_add(len) {
            Some(end) if end <= self.len() => end,
            _ => {
                let problem = format!("{len} tokens from position {start} were asked for, there are {}", self.len());
                return Err(DataError::shard(&self.folder, problem));
            }
        };
        let width = self.manifest.token_bytes();
        let mut position = start;
        let mut file = self.begins.partition_point(|&b| b <= start).saturating_sub(1);
        while position < end {
            let until = end.min(self.begins[file + 1]);
            let from = (position - self.begins[file]) as usize;
            let count = (until - position) as usize;
            let bytes = &self.maps[file][from * width..(from + count) * width];
            let outside = if width == 2 {
                self.emit(bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b).into()), &mut sink)
            } else {
                self.emit(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)), &mut sink)
            };
            if let Some((offset, token)) = outside {
                return Err(DataError::OutOfVocabulary {
                    path: self.folder.join(&self.manifest.files[file].name),
                    position: (from + offset) as u64,
                    token,
                    vocab_size: self.manifest.vocab_size,
                });
            }
            position = until;
            file += 1;
        }
        Ok(())
    }

    /// Returns the first token outside the vocabulary with its offset; all tokens before it were passed to `sink`.
    fn emit(&self, tokens: impl Iterator<Item = u32>, sink: &mut impl FnMut(u32)) -> Option<(usize, u32)> {
        for (offset, token) in tokens.enumerate() {
            if token >= self.manifest.vocab_size {
                return Some((offset, token));
            }
            sink(token);
        }
        None
    }
}

#[cfg(test)]
mod tests;
