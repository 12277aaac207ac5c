//! One-time conversion of text to token files.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use flate2::Compression;
use flate2::write::GzEncoder;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::shards::{partial_of, sync_parent, write_synced};
use super::split::{Split, changed};
use super::text::PIECE;
use super::{
    DataError, Document, Format, HeldOut, Progress, ShardWriter, Shards, Skipped, Source, Stage, TOKENS_PER_FILE,
    Tokenizer,
};

/// Choice of the tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerChoice {
    /// One token per byte.
    Bytes,
    /// A `tokenizer.json`.
    File(PathBuf),
    /// Byte-pair encoding learned from the training documents, with this number of ids.
    Train(usize),
}

/// Options of preparing text.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareOptions {
    /// The text.
    pub source: Source,
    /// The tokenizer.
    pub tokenizer: TokenizerChoice,
    /// Held-out data; for a fraction each side has at least one document, and a single document is split at a line end.
    pub held_out: HeldOut,
    /// Seed of the choice of held-out documents.
    pub seed: u64,
}

/// Tokens ready for training.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Folder of the prepared files.
    pub dir: PathBuf,
    /// Training tokens.
    pub train: Shards,
    /// Held-out tokens.
    pub validation: Shards,
    /// Tokenizer of these tokens.
    pub tokenizer: Tokenizer,
    /// Facts found while preparing.
    pub facts: Facts,
}

impl Prepared {
    /// Bytes of all token files.
    pub fn mapped_bytes(&self) -> u64 {
        self.train.mapped_bytes() + self.validation.mapped_bytes()
    }

    /// Rejects token ids beyond the rows of the model's embedding.
    pub fn check_ids(&self, rows: usize) -> Result<(), DataError> {
        [&self.train, &self.validation].into_iter().try_for_each(|side| side.check_ids(rows))
    }
}

/// Facts found while preparing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Bits that `gzip -9` needs for each byte of the held-out text.
    pub gzip_bits_per_byte: f64,
    /// Files and documents that were skipped.
    pub skipped: Skipped,
}

/// Name of the file of [`Facts`].
const FACTS: &str = "facts.json";
/// Version, to be changed if the same options produce other files.
const VERSION: u32 = 3;
/// Bytes of documents that are encoded together.
const ENCODE_TOGETHER: usize = 4 << 20;
/// Maximum text for training a tokenizer: of more, a random part of about this size is used, so that the words fit in
/// memory.
const LEARN_FROM: u64 = 256 << 20;

/// Prepares text in a folder of the cache, or opens the folder if it exists.
///
/// Several processes may share a cache. A folder of token files is used in place; its tokens must be those of the
/// tokenizer in the options, unless that is one to be trained.
pub fn prepare(
    options: &PrepareOptions,
    cache: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared, DataError> {
    if let Some(folder) = shards_folder(&options.source)? {
        let prepared = open(folder)?;
        if let HeldOut::Source(source) = &options.held_out {
            let path = source.paths.first().map(|path| path.display().to_string());
            return Err(DataError::Setting {
                key: "data.validation",
                value: path.unwrap_or_default(),
                problem: format!(
                    "the token files in {} have a part to measure on already; remove it",
                    folder.display()
                ),
            });
        }
        let expected = match &options.tokenizer {
            TokenizerChoice::Bytes => Some(Tokenizer::bytes()?),
            TokenizerChoice::File(path) => Some(Tokenizer::from_file(path)?.for_documents()?),
            TokenizerChoice::Train(_) => None,
        };
        if let Some(expected) = expected
            && expected.fingerprint()? != prepared.tokenizer.fingerprint()?
        {
            return Err(DataError::shard(folder, "its tokens are of another tokenizer than the one that is asked for"));
        }
        return Ok(prepared);
    }
    let dir = cache.join(&key(options)?[..16]);
    if !dir.exists() {
        build(options, &dir, progress)?;
    }
    open(&dir)
}

/// Folder of token files that the source names, if any.
fn shards_folder(source: &Source) -> Result<Option<&Path>, DataError> {
    let named = |folder: &PathBuf| match source.format {
        Format::Shards => true,
        Format::Auto => Shards::is_at(&folder.join("train")),
        _ => false,
    };
    match source.paths.as_slice() {
        [folder] if named(folder) => Ok(Some(folder)),
        paths => match paths.iter().find(|folder| named(folder)) {
            Some(folder) => Err(DataError::Setting {
                key: "data.path",
                value: folder.display().to_string(),
                problem: "a folder of token files cannot be combined with other data; give it alone".into(),
            }),
            None => Ok(None),
        },
    }
}

fn open(dir: &Path) -> Result<Prepared, DataError> {
    let path = dir.join(FACTS);
    let text = std::fs::read_to_string(&path).map_err(DataError::read(&path))?;
    let facts = serde_json::from_str(&text).map_err(|error| DataError::shard(&path, error.to_string()))?;
    let tokenizer = Tokenizer::from_file(&dir.join("tokenizer.json"))?;
    let prepared = Prepared {
        dir: dir.to_path_buf(),
        train: Shards::open(&dir.join("train"))?,
        validation: Shards::open(&dir.join("validation"))?,
        tokenizer,
        facts,
    };
    let fingerprint = prepared.tokenizer.fingerprint()?;
    for shards in [&prepared.train, &prepared.validation] {
        if shards.tokenizer_fingerprint() != fingerprint {
            return Err(DataError::shard(shards.folder(), "was made with another tokenizer than the one beside it"));
        }
    }
    Ok(prepared)
}

/// Writes `train/`, `validation/` and the tokenizer into a new folder, which appears only when it is complete.
pub fn tokenize(options: &PrepareOptions, dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), DataError> {
    if let Some(folder) = shards_folder(&options.source)? {
        return Err(DataError::Setting {
            key: "data.path",
            value: folder.display().to_string(),
            problem: "these are token files already; give the text".into(),
        });
    }
    match !dir.exists() && build(options, dir, progress)? {
        true => Ok(()),
        false => Err(DataError::Exists { path: dir.to_path_buf() }),
    }
}

/// Builds a folder under a temporary name and moves it into place, unless another process is building it, in which case
/// it waits. Returns true if it was built here.
fn build(options: &PrepareOptions, dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<bool, DataError> {
    let before = key(options)?;
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(DataError::write(parent))?;
    let beside = partial_of(dir);
    let lock = beside.with_extension("lock");
    let held = File::create(&lock).map_err(DataError::write(&lock))?;
    held.lock().map_err(DataError::write(&lock))?;
    // Processes that wait for the lock, or create a new one, find the complete folder and keep it: the lock can then be
    // removed.
    let unlock = || drop(std::fs::remove_file(&lock));
    if dir.exists() {
        unlock();
        return Ok(false);
    }
    let built = fill(options, &beside, progress).and_then(|()| match key(options)? == before {
        true => std::fs::rename(&beside, dir).map_err(DataError::write(dir)),
        false => Err(changed("the data")),
    });
    if let Err(error) = built {
        // Remains are removed by the next attempt. The lock is kept: another process may wait for it and build.
        let _ = std::fs::remove_dir_all(&beside);
        return Err(error);
    }
    unlock();
    sync_parent(dir)?;
    Ok(true)
}

/// Writes everything into `beside`, replacing the remains of an interrupted process.
fn fill(options: &PrepareOptions, beside: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), DataError> {
    if beside.exists() {
        std::fs::remove_dir_all(beside).map_err(DataError::write(beside))?;
    }
    std::fs::create_dir(beside).map_err(DataError::write(beside))?;
    let split = Split::scan(&options.source, &options.held_out, options.seed, progress)?;
    let tokenizer = match &options.tokenizer {
        TokenizerChoice::Bytes => Tokenizer::bytes()?,
        TokenizerChoice::File(path) => Tokenizer::from_file(path)?.for_documents()?,
        TokenizerChoice::Train(vocab_size) => {
            progress(Progress { stage: Stage::TrainTokenizer, done: 0, total: 0 });
            let learned = |document: Document| {
                let text = split.parts(&document)?.train.filter(|_| split.samples(&document, LEARN_FROM));
                Ok(text.map(str::to_owned).map(|text| Document { text, ..document }))
            };
            let documents = options.source.documents()?;
            let documents = documents.filter_map(|document| document.and_then(learned).transpose());
            Tokenizer::train(documents.flat_map(in_pieces), *vocab_size)?
        }
    };
    tokenizer.save(beside)?;
    let fingerprint = tokenizer.fingerprint()?;
    let writer = |name: &str| {
        let (vocab_size, separator) = (tokenizer.vocab_size() as u32, tokenizer.separator().unwrap_or_default());
        ShardWriter::create(&beside.join(name), vocab_size, separator, fingerprint.clone(), TOKENS_PER_FILE)
    };
    let mut sides = [writer("train")?, writer("validation")?];
    let facts = encode_all(options, &split, &tokenizer, &mut sides, progress)?;
    for side in sides {
        side.finish()?;
    }
    let path = beside.join(FACTS);
    let text = serde_json::to_string_pretty(&facts).map_err(|error| DataError::write(&path)(error.into()))?;
    write_synced(&path, text.as_bytes())
}

/// Splits a document into pieces no larger than those of text files: training on a text takes many times its size.
fn in_pieces(document: Result<Document, DataError>) -> Vec<Result<Document, DataError>> {
    let document = match document {
        Ok(document) if document.text.len() > PIECE => document,
        other => return vec![other],
    };
    let (mut pieces, mut rest) = (Vec::new(), document.text.as_str());
    while !rest.is_empty() {
        let end = rest.floor_char_boundary(PIECE.min(rest.len()));
        let end = if end == rest.len() { end } else { rest[..end].rfind(['\n', ' ']).map_or(end, |end| end + 1) };
        let (piece, later) = rest.split_at(end);
        pieces.push(Ok(Document { name: document.name.clone(), text: piece.to_string() }));
        rest = later;
    }
    pieces
}

fn encode_all(
    options: &PrepareOptions,
    split: &Split,
    tokenizer: &Tokenizer,
    sides: &mut [ShardWriter; 2],
    progress: &mut dyn FnMut(Progress),
) -> Result<Facts, DataError> {
    let mut documents = options.source.documents()?;
    // Held-out documents follow the training documents, if they are other data.
    let mut others = match &options.held_out {
        HeldOut::Source(source) => Some(source.documents()?),
        _ => None,
    };
    let mut gzip = GzEncoder::new(Counter(0), Compression::best());
    let (mut held_out_bytes, mut done) = (0, 0);
    loop {
        // Each text with its side: 0 for training, 1 for validation.
        let mut group = Vec::new();
        let mut bytes = 0;
        while bytes < ENCODE_TOGETHER {
            let Some(document) = documents.next() else {
                match others.as_mut().and_then(Iterator::next) {
                    Some(document) => {
                        let document = document?;
                        bytes += document.text.len();
                        group.push((1, document.text));
                        continue;
                    }
                    None => break,
                }
            };
            let document = document?;
            bytes += document.text.len();
            let parts = split.parts(&document)?;
            match (parts.train, parts.validation) {
                (Some(train), Some(validation)) => {
                    group.extend([(0, train.to_owned()), (1, validation.to_owned())]);
                }
                (train, _) => {
                    let side = usize::from(train.is_none());
                    group.push((side, document.text));
                }
            }
        }
        if group.is_empty() {
            break;
        }
        // A text longer than the pieces of text files is encoded in parts.
        let at_once = |text: &String| (text.len() <= PIECE).then(|| tokenizer.encode_whole(text));
        let encoded: Vec<Option<Result<Vec<u32>, DataError>>> =
            group.par_iter().map(|(_, text)| at_once(text)).collect();
        for ((side, text), tokens) in group.iter().zip(encoded) {
            if *side == 1 {
                held_out_bytes += text.len() as u64;
                gzip.write_all(text.as_bytes()).map_err(DataError::write(Path::new("gzip")))?;
            }
            let (out, size) = (&mut sides[*side], text.len() as u64);
            match tokens {
                Some(tokens) => out.push(&tokens?, size)?,
                None => {
                    out.push(tokenizer.begin(), size)?;
                    tokenizer.encode_in_parts(text, |ids| out.extend(ids))?;
                    out.extend(tokenizer.end())?;
                }
            }
        }
        done += bytes as u64;
        progress(Progress { stage: Stage::Encode, done, total: split.bytes });
    }
    let compressed = gzip.finish().map_err(DataError::write(Path::new("gzip")))?.0;
    if held_out_bytes == 0
        && let HeldOut::Source(source) = &options.held_out
    {
        let paths: Vec<String> = source.paths.iter().map(|path| path.display().to_string()).collect();
        let skipped = others.map(|others| others.skipped.to_string()).unwrap_or_default();
        return Err(DataError::Empty { paths: paths.join(", "), skipped });
    }
    Ok(Facts { gzip_bits_per_byte: 8.0 * compressed as f64 / held_out_bytes as f64, skipped: documents.skipped })
}

/// Hash of everything that determines the files: names, sizes and times of the text, and the options.
fn key(options: &PrepareOptions) -> Result<String, DataError> {
    let mut hasher = Sha256::new();
    let tokenizer = match &options.tokenizer {
        TokenizerChoice::File(path) => Tokenizer::from_file(path)?.fingerprint()?,
        other => format!("{other:?}"),
    };
    let (held_out, others) = match &options.held_out {
        HeldOut::Fraction(fraction) => (fraction.to_bits(), None),
        HeldOut::Source(source) => (u64::MAX, Some(source)),
        HeldOut::Everything => (u64::MAX - 1, None),
    };
    hasher.update(format!("{:?}", (VERSION, tokenizer, held_out, options.seed)));
    for source in [Some(&options.source), others].into_iter().flatten() {
        let Source { format, field, .. } = source;
        hasher.update(format!("{format:?} {field:?}\n"));
        for (file, _) in source.files()?.0 {
            let metadata = std::fs::metadata(&file).map_err(DataError::read(&file))?;
            let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            let path = std::path::absolute(&file).map_err(DataError::read(&file))?;
            hasher.update(format!("{path:?} {} {modified:?} {:?}\n", metadata.len(), changed_at(&metadata)));
        }
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// Time of a file's last change of any kind, which programs cannot set: a file can change and keep its size and
/// modification time.
#[cfg(unix)]
fn changed_at(metadata: &std::fs::Metadata) -> (u64, i64, i64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
}

/// Other systems have no such time.
#[cfg(not(unix))]
fn changed_at(_: &std::fs::Metadata) {}

/// Writer that counts bytes.
struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
