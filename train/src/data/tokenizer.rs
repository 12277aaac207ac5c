//! From text to token ids and back.

use std::io::Write;
use std::path::Path;

use lowrank_models::hub::HubConfig;
use sha2::{Digest, Sha256};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, TokenizerBuilder, TokenizerImpl};

use super::{DataError, Document};

/// A tokenizer: byte level, trained here, or any `tokenizer.json`.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    name: String,
    separator: u32,
}

/// The special token that begins every document.
const SEPARATOR: &str = "<|endoftext|>";

/// What begins a document with a tokenizer from elsewhere: the first of these that it has.
const SEPARATORS: [&str; 6] = [SEPARATOR, "<s>", "<|begin_of_text|>", "<|im_start|>", "</s>", "[CLS]"];

type BytePair = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

impl Tokenizer {
    /// One token a byte, with the byte as id, and the separator as id 256.
    pub fn bytes() -> Result<Self, DataError> {
        let vocabulary: Vocab = (0..=255u8).map(|byte| (byte_character(byte).to_string(), u32::from(byte))).collect();
        let model = BPE::builder().vocab_and_merges(vocabulary, Vec::new()).build();
        let model = model.map_err(|error| failure("bytes", error))?;
        let mut tokenizer = byte_pair(model)?;
        tokenizer.add_special_tokens([separator_token()]).map_err(|error| failure("bytes", error))?;
        Self::new(tokenizer.into(), "bytes".into())
    }

    /// Reads a `tokenizer.json`. Truncation and padding that it asks for are not applied: documents keep their length.
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(DataError::read(path))?;
        let name = path.display().to_string();
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| failure(&name, error))?;
        inner.with_padding(None).with_truncation(None).map_err(|error| failure(&name, error))?;
        Self::new(inner, name)
    }

    /// Learns byte-level byte-pair encoding with `vocab_size` ids, the 256 bytes and the separator among them.
    ///
    /// "Neural Machine Translation of Rare Words with Subword Units" (arXiv 1508.07909). Fewer ids come out when the text has no more pairs.
    pub fn train(
        documents: impl Iterator<Item = Result<Document, DataError>> + Send,
        vocab_size: usize,
    ) -> Result<Self, DataError> {
        if vocab_size < 257 {
            return Err(DataError::Setting {
                key: "tokenizer.vocab_size",
                value: vocab_size.to_string(),
                problem: "must be at least 257: the 256 bytes and the separator".into(),
            });
        }
        let mut tokenizer = byte_pair(BPE::default())?;
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![separator_token()])
            .build();
        let mut refused = None;
        // The trainer takes texts alone: an error ends them and is told afterwards.
        let texts = documents.map_while(|document| match document {
            Ok(document) => Some(document.text),
            Err(error) => {
                refused = Some(error);
                None
            }
        });
        tokenizer.train(&mut trainer, texts).map_err(|error| failure("training", error))?;
        match refused {
            Some(error) => Err(error),
            None => Self::new(tokenizer.into(), "trained on the data".into()),
        }
    }

    fn new(mut inner: tokenizers::Tokenizer, name: String) -> Result<Self, DataError> {
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some_and(|probability| probability > 0.0)
        {
            let problem = "drops merges at random, so that the same text gives other tokens; set `dropout` to null";
            return Err(DataError::Tokenizer { name, problem: problem.into() });
        }
        // Text that spells a special token is text: it must not begin a document.
        inner.set_encode_special_tokens(true);
        let separator =
            SEPARATORS.iter().find_map(|token| inner.token_to_id(token)).ok_or_else(|| DataError::Tokenizer {
                name: name.clone(),
                problem: format!(
                    "has none of the special tokens {}; one must mark where documents begin",
                    SEPARATORS.join(" ")
                ),
            })?;
        Ok(Self { inner, name, separator })
    }

    /// Ids of a text. No special token is added, and text that spells one is encoded as text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| failure(&self.name, error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The same tokenizer for texts in which special tokens mean what they say, as chat templates write them.
    pub(super) fn for_templates(&self) -> Self {
        let mut tokenizer = self.clone();
        tokenizer.inner.set_encode_special_tokens(false);
        tokenizer
    }

    /// Ids of a text, each with the byte at which it begins.
    pub(super) fn encode_at(&self, text: &str) -> Result<Vec<(u32, usize)>, DataError> {
        let encoding = self.inner.encode(text, false).map_err(|error| failure(&self.name, error))?;
        Ok(encoding.get_ids().iter().copied().zip(encoding.get_offsets().iter().map(|(begin, _)| *begin)).collect())
    }

    /// Text of ids; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        self.inner.decode(ids, true).map_err(|error| failure(&self.name, error))
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        // Ids of added tokens may leave gaps: an embedding needs a row for the highest.
        let highest = self.inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        self.inner.get_vocab_size(true).max(highest)
    }

    /// The id that begins every document.
    pub fn separator(&self) -> u32 {
        self.separator
    }

    /// The token before each text of a model, where it wants one: models of this program learned that a text begins with the separator; others say
    /// so in their configuration.
    pub fn begins(&self, hub: &HubConfig) -> Option<u32> {
        Some(self.separator).filter(|separator| hub.tokens("bos_token_id").first() == Some(separator))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into a folder, each whole or not at all.
    pub fn save(&self, dir: &Path) -> Result<(), DataError> {
        let token = self.inner.id_to_token(self.separator).unwrap_or_default();
        let config = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token,
            "eos_token": token,
            "clean_up_tokenization_spaces": false,
        });
        for (name, text) in [("tokenizer.json", self.json()?), ("tokenizer_config.json", format!("{config:#}\n"))] {
            let path = dir.join(name);
            let written = tempfile::NamedTempFile::new_in(dir).and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.persist(&path).map_err(|error| error.error)
            });
            written.map_err(DataError::write(&path))?;
        }
        Ok(())
    }

    /// SHA-256 of the tokenizer in hexadecimal digits.
    pub fn fingerprint(&self) -> Result<String, DataError> {
        // Through a value: the order of its keys does not change from one process to the next.
        let value: serde_json::Value =
            serde_json::from_str(&self.json()?).map_err(|error| failure(&self.name, error.into()))?;
        Ok(format!("{:x}", Sha256::digest(value.to_string())))
    }

    fn json(&self) -> Result<String, DataError> {
        self.inner.to_string(false).map_err(|error| failure(&self.name, error))
    }
}

fn failure(name: &str, error: tokenizers::Error) -> DataError {
    DataError::Tokenizer { name: name.to_string(), problem: error.to_string() }
}

fn separator_token() -> AddedToken {
    AddedToken::from(SEPARATOR, true)
}

fn byte_pair(model: BPE) -> Result<BytePair, DataError> {
    let byte_level = ByteLevel::new(false, true, true);
    TokenizerBuilder::new()
        .with_model(model)
        .with_normalizer(None)
        .with_pre_tokenizer(Some(PreTokenizerWrapper::from(byte_level)))
        .with_post_processor(Some(PostProcessorWrapper::from(byte_level)))
        .with_decoder(Some(DecoderWrapper::from(byte_level)))
        .build()
        .map_err(|error| failure("byte level", error))
}

/// The printable character that stands for a byte in byte-level vocabularies: itself, or one from 256 on for the others in order.
fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let place = (0..byte).filter(|other| !printable(*other)).count() as u32;
            char::from_u32(256 + place).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "fn main() {\n\tprintln!(\"größe ≥ 日本語 🦀\");\n}\r\n  \u{0}";

    fn trained() -> Tokenizer {
        let documents = (0..50).map(|i| Ok(Document { name: i.to_string(), text: format!("{TEXT} number {i}") }));
        Tokenizer::train(documents, 300).unwrap()
    }

    #[test]
    fn bytes_are_their_own_ids() {
        let tokenizer = Tokenizer::bytes().unwrap();
        let ids: Vec<u32> = TEXT.bytes().map(u32::from).collect();
        assert_eq!(tokenizer.encode(TEXT).unwrap(), ids);
        assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
        assert_eq!((tokenizer.vocab_size(), tokenizer.separator()), (257, 256));
        assert!(tokenizer.decode(&[0xff, 65]).unwrap().ends_with('A'));
    }

    #[test]
    fn training_is_deterministic_and_lossless() {
        let (a, b) = (trained(), trained());
        assert_eq!(a.fingerprint().unwrap(), b.fingerprint().unwrap());
        assert_eq!(a.vocab_size(), 300);
        let ids = a.encode(TEXT).unwrap();
        assert!(ids.len() < TEXT.len());
        assert_eq!(a.decode(&ids).unwrap(), TEXT);
        assert!(Tokenizer::train(std::iter::empty(), 256).is_err());
    }

    #[test]
    fn files_give_the_same_tokenizer_back() {
        let dir = tempfile::tempdir().unwrap();
        for tokenizer in [Tokenizer::bytes().unwrap(), trained()] {
            tokenizer.save(dir.path()).unwrap();
            let read = Tokenizer::from_file(&dir.path().join("tokenizer.json")).unwrap();
            assert_eq!(read.fingerprint().unwrap(), tokenizer.fingerprint().unwrap());
            assert_eq!(read.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
        }
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        assert!(Tokenizer::from_file(&dir.path().join("tokenizer.json")).is_err());
    }

    #[test]
    fn text_that_spells_a_special_token_stays_text() {
        for tokenizer in [Tokenizer::bytes().unwrap(), trained()] {
            let text = "a <|endoftext|> b";
            let ids = tokenizer.encode(text).unwrap();
            assert!(!ids.contains(&tokenizer.separator()));
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn a_file_neither_shortens_nor_pads_nor_changes_at_random() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let trained = trained();
        let mut json: serde_json::Value = serde_json::from_str(&trained.json().unwrap()).unwrap();
        json["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        });
        json["padding"] = serde_json::json!({
            "strategy": { "Fixed": 500 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        });
        std::fs::write(&path, json.to_string()).unwrap();
        let read = Tokenizer::from_file(&path).unwrap();
        assert_eq!(read.encode(TEXT).unwrap(), trained.encode(TEXT).unwrap());
        json["model"]["dropout"] = 0.1.into();
        std::fs::write(&path, json.to_string()).unwrap();
        let message = Tokenizer::from_file(&path).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json") && message.contains("dropout"), "{message}");
    }
}
