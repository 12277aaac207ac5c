//! Text to token files, once.

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
use super::{
    DataError, Document, Format, Progress, ShardWriter, Shards, Skipped, Source, Stage, TOKENS_PER_FILE, Tokenizer,
};

/// Which tokenizer to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerChoice {
    /// One token a byte.
    Bytes,
    /// A `tokenizer.json`.
    File(PathBuf),
    /// Byte-pair encoding learned from the training documents, with so many ids.
    Train(usize),
}

/// What to prepare.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareOptions {
    /// The text.
    pub source: Source,
    /// The tokenizer.
    pub tokenizer: TokenizerChoice,
    /// Part of the documents held out, between 0 and 1; at least one document is on each side, and a single document is cut
    /// at a line end.
    pub validation_fraction: f64,
    /// Seed of the choice of held-out documents.
    pub seed: u64,
}

/// Tokens ready for training.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Folder with everything.
    pub dir: PathBuf,
    /// Training tokens.
    pub train: Shards,
    /// Held-out tokens.
    pub validation: Shards,
    /// The tokenizer that made them.
    pub tokenizer: Tokenizer,
    /// What was found on the way.
    pub facts: Facts,
}

/// What preparing found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Bits that `gzip -9` needs for each byte of the held-out text.
    pub gzip_bits_per_byte: f64,
    /// What was passed over.
    pub skipped: Skipped,
}

/// Name of the file of [`Facts`].
const FACTS: &str = "facts.json";
/// Changes when the same options would give other files.
const VERSION: u32 = 2;
/// Documents are encoded together until they have so many bytes.
const ENCODE_TOGETHER: usize = 4 << 20;
/// A tokenizer learns from a random part of about so many bytes when there are more, so that the words fit in memory.
const LEARN_FROM: u64 = 256 << 20;

/// Prepares text in a folder of the cache, or opens it when that was done before.
///
/// Several processes may share a cache. A folder of token files is used where it is; its tokens must be those of the tokenizer
/// in the options, unless that is one to be trained.
pub fn prepare(
    options: &PrepareOptions,
    cache: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared, DataError> {
    if let Some(folder) = shards_folder(&options.source)? {
        let prepared = open(folder)?;
        let expected = match &options.tokenizer {
            TokenizerChoice::Bytes => Some(Tokenizer::bytes()?),
            TokenizerChoice::File(path) => Some(Tokenizer::from_file(path)?),
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

/// The folder of token files that the source names, if it does.
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

/// Writes `train/`, `validation/` and the tokenizer into a new folder, which appears when all is done.
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

/// Builds a folder beside its place and moves it there, unless another process does so at the same time, for which it waits.
/// Says whether it was built here.
fn build(options: &PrepareOptions, dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<bool, DataError> {
    let before = key(options)?;
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(DataError::write(parent))?;
    let beside = partial_of(dir);
    let lock = beside.with_extension("lock");
    let held = File::create(&lock).map_err(DataError::write(&lock))?;
    held.lock().map_err(DataError::write(&lock))?;
    // Whoever waits for the lock, or makes a new one, finds the complete folder and leaves it alone: then the lock may go.
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
        // What stays now is removed by the next attempt. The lock is left: another process may wait for it and build.
        let _ = std::fs::remove_dir_all(&beside);
        return Err(error);
    }
    unlock();
    sync_parent(dir)?;
    Ok(true)
}

/// Writes everything into `beside`, instead of what an interrupted process left there.
fn fill(options: &PrepareOptions, beside: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), DataError> {
    if beside.exists() {
        std::fs::remove_dir_all(beside).map_err(DataError::write(beside))?;
    }
    std::fs::create_dir(beside).map_err(DataError::write(beside))?;
    let split = Split::scan(&options.source, options.validation_fraction, options.seed, progress)?;
    let tokenizer = match &options.tokenizer {
        TokenizerChoice::Bytes => Tokenizer::bytes()?,
        TokenizerChoice::File(path) => Tokenizer::from_file(path)?,
        TokenizerChoice::Train(vocab_size) => {
            progress(Progress { stage: Stage::TrainTokenizer, done: 0, total: 0 });
            let learned = |document: Document| {
                let text = split.parts(&document)?.train.filter(|_| split.samples(&document, LEARN_FROM));
                Ok(text.map(str::to_owned).map(|text| Document { text, ..document }))
            };
            let documents = options.source.documents()?;
            Tokenizer::train(documents.filter_map(|document| document.and_then(learned).transpose()), *vocab_size)?
        }
    };
    tokenizer.save(beside)?;
    let fingerprint = tokenizer.fingerprint()?;
    let writer = |name: &str| {
        let (vocab_size, separator) = (tokenizer.vocab_size() as u32, tokenizer.separator());
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

fn encode_all(
    options: &PrepareOptions,
    split: &Split,
    tokenizer: &Tokenizer,
    sides: &mut [ShardWriter; 2],
    progress: &mut dyn FnMut(Progress),
) -> Result<Facts, DataError> {
    let mut documents = options.source.documents()?;
    let mut gzip = GzEncoder::new(Counter(0), Compression::best());
    let (mut held_out_bytes, mut done) = (0, 0);
    loop {
        // Each text with its side: 0 for training, 1 for validation.
        let mut group = Vec::new();
        let mut bytes = 0;
        while bytes < ENCODE_TOGETHER
            && let Some(document) = documents.next()
        {
            let document = document?;
            bytes += document.text.len();
            let parts = split.parts(&document)?;
            let texts = [parts.train, parts.validation].into_iter().enumerate();
            group.extend(texts.filter_map(|(side, text)| Some((side, text?.to_owned()))));
        }
        if group.is_empty() {
            break;
        }
        let encoded: Vec<Result<Vec<u32>, DataError>> =
            group.par_iter().map(|(_, text)| tokenizer.encode(text)).collect();
        for ((side, text), ids) in group.iter().zip(encoded) {
            let mut tokens = vec![tokenizer.separator()];
            tokens.extend(ids?);
            if *side == 1 {
                held_out_bytes += text.len() as u64;
                gzip.write_all(text.as_bytes()).map_err(DataError::write(Path::new("gzip")))?;
            }
            sides[*side].push(&tokens, text.len() as u64)?;
        }
        done += bytes as u64;
        progress(Progress { stage: Stage::Encode, done, total: split.bytes });
    }
    let compressed = gzip.finish().map_err(DataError::write(Path::new("gzip")))?.0;
    // The split leaves text on both sides.
    Ok(Facts { gzip_bits_per_byte: 8.0 * compressed as f64 / held_out_bytes as f64, skipped: documents.skipped })
}

/// Hash of everything that decides what the files become: names, sizes and times of the text, and the options.
fn key(options: &PrepareOptions) -> Result<String, DataError> {
    let mut hasher = Sha256::new();
    let tokenizer = match &options.tokenizer {
        TokenizerChoice::File(path) => Tokenizer::from_file(path)?.fingerprint()?,
        other => format!("{other:?}"),
    };
    let Source { format, field, .. } = &options.source;
    let settings = (VERSION, tokenizer, options.validation_fraction.to_bits(), options.seed, format, field);
    hasher.update(format!("{settings:?}"));
    let (files, _) = options.source.files()?;
    for (file, _) in files {
        let metadata = std::fs::metadata(&file).map_err(DataError::read(&file))?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let path = std::path::absolute(&file).map_err(DataError::read(&file))?;
        hasher.update(format!("{path:?} {} {modified:?}\n", metadata.len()));
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// Counts what is written.
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
mod tests {
    use super::*;

    fn corpus(dir: &Path, documents: usize) -> PrepareOptions {
        let text = dir.join("text");
        std::fs::create_dir_all(&text).unwrap();
        for number in 0..documents {
            std::fs::write(
                text.join(format!("{number:03}.txt")),
                format!("document {number} says hello to {}", number * 7),
            )
            .unwrap();
        }
        PrepareOptions {
            source: Source { paths: vec![text], format: Format::Auto, field: "text".into() },
            tokenizer: TokenizerChoice::Train(270),
            validation_fraction: 0.2,
            seed: 1,
        }
    }

    fn all(shards: &Shards) -> Vec<u32> {
        let mut tokens = vec![0; shards.len() as usize];
        shards.read(0, &mut tokens).unwrap();
        tokens
    }

    #[test]
    fn the_second_time_is_the_cache_and_changed_text_is_prepared_anew() {
        let dir = tempfile::tempdir().unwrap();
        let options = corpus(dir.path(), 60);
        let cache = dir.path().join("cache");
        let mut calls = 0;
        let first = prepare(&options, &cache, &mut |_| calls += 1).unwrap();
        assert!(calls > 0);
        calls = 0;
        let second = prepare(&options, &cache, &mut |_| calls += 1).unwrap();
        assert_eq!((calls, all(&first.train)), (0, all(&second.train)));
        std::fs::write(dir.path().join("text/new.txt"), "one more").unwrap();
        assert_ne!(prepare(&options, &cache, &mut |_| ()).unwrap().dir, first.dir);
        assert!(
            std::fs::read_dir(&cache)
                .unwrap()
                .all(|entry| { !entry.unwrap().file_name().to_string_lossy().starts_with('.') })
        );
        // A folder of token files is data by itself.
        let source = Source { paths: vec![first.dir.clone()], ..options.source.clone() };
        let direct = prepare(&PrepareOptions { source, ..options }, &cache, &mut |_| ()).unwrap();
        assert_eq!(all(&direct.validation), all(&first.validation));
    }

    #[test]
    fn every_document_is_on_one_side() {
        let dir = tempfile::tempdir().unwrap();
        let options = corpus(dir.path(), 100);
        let whole = prepare(&options, &dir.path().join("cache"), &mut |_| ()).unwrap();
        assert_eq!(whole.train.documents() + whole.validation.documents(), 100);
        assert!((5..40).contains(&whole.validation.documents()));
        assert!(whole.facts.gzip_bits_per_byte > 0.5 && whole.facts.gzip_bits_per_byte < 8.0);
    }

    #[test]
    fn a_single_document_serves_both_sides_and_no_text_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let options = PrepareOptions { tokenizer: TokenizerChoice::Bytes, ..corpus(dir.path(), 1) };
        let file = dir.path().join("text/000.txt");
        let text: String = (0..100).map(|line| format!("line {line}\n")).collect();
        std::fs::write(&file, &text).unwrap();
        let cache = dir.path().join("cache");
        let prepared = prepare(&options, &cache, &mut |_| ()).unwrap();
        let sides = [&prepared.train, &prepared.validation].map(|side| prepared.tokenizer.decode(&all(side)).unwrap());
        assert_eq!(sides.concat(), text);
        assert!(sides[1].starts_with("line 80\n"));
        std::fs::write(&file, "").unwrap();
        let message = prepare(&options, &cache, &mut |_| ()).unwrap_err().to_string();
        assert!(message.contains("1 empty documents"), "{message}");
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let options = corpus(dir.path(), 20);
        let cache = dir.path().join("cache");
        let place = cache.join(&key(&options).unwrap()[..16]);
        std::fs::create_dir_all(partial_of(&place).join("train")).unwrap();
        std::fs::write(partial_of(&place).join("train/tokens-00000.bin"), "half").unwrap();
        let prepared = prepare(&options, &cache, &mut |_| ()).unwrap();
        prepared.train.verify(&mut |_| ()).unwrap();
        assert_eq!((&prepared.dir, std::fs::read_dir(&cache).unwrap().count()), (&place, 1));
    }

    #[test]
    fn several_may_prepare_the_same_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let options = corpus(dir.path(), 60);
        let cache = dir.path().join("cache");
        let tokens = || all(&prepare(&options, &cache, &mut |_| ()).unwrap().train);
        std::thread::scope(|scope| {
            let others: Vec<_> = (0..3).map(|_| scope.spawn(tokens)).collect();
            let here = tokens();
            assert!(others.into_iter().all(|other| other.join().unwrap() == here));
        });
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
    }

    #[test]
    fn token_files_go_with_their_own_tokenizer_and_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = corpus(dir.path(), 60);
        let out = dir.path().join("tokens");
        tokenize(&options, &out, &mut |_| ()).unwrap();
        assert!(matches!(tokenize(&options, &out, &mut |_| ()), Err(DataError::Exists { .. })));
        options.source.paths.push(out.clone());
        let cache = dir.path().join("cache");
        let message = prepare(&options, &cache, &mut |_| ()).unwrap_err().to_string();
        assert!(message.contains("give it alone"), "{message}");
        options.source.paths.remove(0);
        options.tokenizer = TokenizerChoice::File(out.join("tokenizer.json"));
        prepare(&options, &cache, &mut |_| ()).unwrap();
        options.tokenizer = TokenizerChoice::Bytes;
        let message = prepare(&options, &cache, &mut |_| ()).unwrap_err().to_string();
        assert!(message.contains("another tokenizer"), "{message}");
        assert!(tokenize(&options, &dir.path().join("other"), &mut |_| ()).is_err());
        assert!(!cache.exists());
    }
}
