//! Text to token files, once.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use flate2::Compression;
use flate2::write::GzEncoder;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

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
    /// Part of the documents held out.
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
    /// Documents passed over.
    pub skipped: Skipped,
}

/// Name of the file of [`Facts`].
const FACTS: &str = "facts.json";
/// Changes when the same options would give other files.
const VERSION: u32 = 1;
/// Documents are encoded together until they have so many bytes.
const ENCODE_TOGETHER: usize = 4 << 20;

/// Prepares text in a folder of the cache, or opens it when that was done before.
pub fn prepare(
    options: &PrepareOptions,
    cache: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared, DataError> {
    if let Some(folder) = shards_folder(&options.source) {
        return open(&folder);
    }
    let dir = cache.join(&key(options)?[..16]);
    if !dir.join(FACTS).exists() {
        tokenize(options, &dir, progress)?;
    }
    open(&dir)
}

/// The folder of token files that the source names, if it does.
fn shards_folder(source: &Source) -> Option<PathBuf> {
    let [folder] = source.paths.as_slice() else {
        return None;
    };
    let named =
        source.format == Format::Shards || (source.format == Format::Auto && Shards::is_at(&folder.join("train")));
    named.then(|| folder.clone())
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
    if dir.exists() {
        return Err(DataError::Exists { path: dir.to_path_buf() });
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(DataError::write(parent))?;
    // Removed with everything in it unless it gets its name.
    let beside =
        tempfile::Builder::new().prefix(".unfinished-").tempdir_in(parent).map_err(DataError::write(parent))?;
    let total = options.source.files()?.iter().filter_map(|(file, _)| Some(std::fs::metadata(file).ok()?.len())).sum();

    let tokenizer = match &options.tokenizer {
        TokenizerChoice::Bytes => Tokenizer::bytes()?,
        TokenizerChoice::File(path) => Tokenizer::from_file(path)?,
        TokenizerChoice::Train(vocab_size) => {
            let held_out = held_out(options);
            progress(Progress { stage: Stage::TrainTokenizer, done: 0, total: 0 });
            let documents = options.source.documents()?;
            Tokenizer::train(documents.filter(|document| !document.as_ref().is_ok_and(&held_out)), *vocab_size)?
        }
    };
    tokenizer.save(beside.path())?;
    let fingerprint = tokenizer.fingerprint()?;
    let writer = |name: &str| {
        let vocab_size = tokenizer.vocab_size() as u32;
        ShardWriter::create(
            &beside.path().join(name),
            vocab_size,
            tokenizer.separator(),
            fingerprint.clone(),
            TOKENS_PER_FILE,
        )
    };
    let mut sides = [writer("train")?, writer("validation")?];
    let facts = encode_all(options, &tokenizer, &mut sides, total, progress)?;
    let [train, validation] = sides;
    for (name, side) in [("training", train), ("validation", validation)] {
        if side.finish()?.files.is_empty() {
            return Err(DataError::Split {
                problem: format!(
                    "no document is left for {name}; give more documents (one file or line is one), or change data.validation_fraction or train.seed"
                ),
            });
        }
    }
    let path = beside.path().join(FACTS);
    let text = serde_json::to_string_pretty(&facts).map_err(|error| DataError::write(&path)(error.into()))?;
    std::fs::write(&path, text).map_err(DataError::write(&path))?;
    let beside = beside.keep();
    std::fs::rename(&beside, dir).or_else(|error| {
        // Another process was first: what it made is the same.
        let first = dir.join(FACTS).exists();
        let _ = std::fs::remove_dir_all(&beside);
        if first { Ok(()) } else { Err(DataError::write(dir)(error)) }
    })
}

fn encode_all(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    sides: &mut [ShardWriter; 2],
    total: u64,
    progress: &mut dyn FnMut(Progress),
) -> Result<Facts, DataError> {
    let held_out = held_out(options);
    let mut documents = options.source.documents()?;
    let mut gzip = GzEncoder::new(Counter(0), Compression::best());
    let (mut held_out_bytes, mut done) = (0, 0);
    loop {
        let mut group = Vec::new();
        let mut bytes = 0;
        while bytes < ENCODE_TOGETHER
            && let Some(document) = documents.next()
        {
            let document = document?;
            bytes += document.text.len();
            group.push(document);
        }
        if group.is_empty() {
            break;
        }
        let encoded: Vec<Result<(Vec<u32>, bool), DataError>> = group
            .par_iter()
            .map(|document| {
                let mut tokens = vec![tokenizer.separator()];
                tokens.extend(tokenizer.encode(&document.text)?);
                Ok((tokens, held_out(document)))
            })
            .collect();
        for (document, encoded) in group.iter().zip(encoded) {
            let (tokens, held_out) = encoded?;
            if held_out {
                held_out_bytes += document.text.len() as u64;
                gzip.write_all(document.text.as_bytes()).map_err(DataError::write(Path::new("gzip")))?;
            }
            sides[usize::from(held_out)].push(&tokens, document.text.len() as u64)?;
        }
        done += bytes as u64;
        progress(Progress { stage: Stage::Encode, done, total });
    }
    if done == 0 {
        let paths: Vec<String> = options.source.paths.iter().map(|path| path.display().to_string()).collect();
        let skipped = format!(
            "{} files that are no text and {} empty documents passed over",
            documents.skipped.binary, documents.skipped.empty
        );
        return Err(DataError::Empty { paths: paths.join(", "), skipped });
    }
    let compressed = gzip.finish().map_err(DataError::write(Path::new("gzip")))?.0;
    Ok(Facts { gzip_bits_per_byte: 8.0 * compressed as f64 / held_out_bytes.max(1) as f64, skipped: documents.skipped })
}

/// Whether a document is held out: decided by its text and the seed alone, so that equal texts are on the same side.
fn held_out(options: &PrepareOptions) -> impl Fn(&Document) -> bool + Send + Sync + use<> {
    let (seed, limit) = (options.seed, (options.validation_fraction * 2f64.powi(64)) as u64);
    move |document| {
        let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(&document.text).finalize();
        let (first, _) = digest.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        u64::from_le_bytes(*first) < limit
    }
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
    for (file, _) in options.source.files()? {
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
    fn every_document_is_on_one_side_whatever_the_others_are() {
        let dir = tempfile::tempdir().unwrap();
        let options = corpus(dir.path(), 100);
        let whole = prepare(&options, &dir.path().join("cache"), &mut |_| ()).unwrap();
        assert_eq!(whole.train.documents() + whole.validation.documents(), 100);
        assert!((5..40).contains(&whole.validation.documents()));
        let side = |number: usize| {
            let text = std::fs::read_to_string(dir.path().join(format!("text/{number:03}.txt"))).unwrap();
            held_out(&options)(&Document { name: String::new(), text })
        };
        let alone = (0..100).filter(|number| side(*number)).count() as u64;
        assert_eq!(alone, whole.validation.documents());
        assert!(whole.facts.gzip_bits_per_byte > 0.5 && whole.facts.gzip_bits_per_byte < 8.0);
    }

    #[test]
    fn a_side_without_documents_and_no_text_at_all_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let options = PrepareOptions { tokenizer: TokenizerChoice::Bytes, ..corpus(dir.path(), 1) };
        let message = |options: &PrepareOptions| {
            prepare(options, &dir.path().join("cache"), &mut |_| ()).unwrap_err().to_string()
        };
        assert!(message(&options).contains("no document is left"));
        std::fs::write(dir.path().join("text/000.txt"), "").unwrap();
        assert!(message(&options).contains("1 empty documents"));
    }
}
