use super::{DataError, Progress, Stage};
use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum number of tokens in one file, unless a [`ShardWriter`] is given another one.
pub const TOKENS_PER_FILE: u64 = 64 << 20;

/// Number of tokens written at a time.
const TOGETHER: usize = 1 << 20;
const MANIFEST: &str = "manifest.json";
const VERSION: u32 = 1;

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

    fn token_bytes(&self) -> usize {
        if self.vocab_size <= 1 << 16 { 2 } else { 4 }
    }

    fn digest(&self) -> Result<String, serde_json::Error> {
        let bare = Self { sha256: String::new(), ..self.clone() };
        Ok(hex(&Sha256::digest(serde_json::to_vec(&bare)?)))
    }
}

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

/// Temporary folder in which `folder` is prepared.
pub(super) fn partial_of(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}.partial"))
}

pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let mut file = File::create(path).map_err(DataError::write(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(DataError::write(path))
}

/// Syncs the parent folder of `path`, so that a rename into it survives a power failure.
pub(super) fn sync_parent(path: &Path) -> Result<(), DataError> {
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

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests;
