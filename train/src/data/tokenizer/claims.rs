//! Check of a `tokenizer.json` before anything is allocated for its ids.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Maximum number of missing ids in a vocabulary; more than in any tokenizer in use.
const GAPS: u64 = 1 << 20;

/// Rejects ids that far exceed the number of tokens: tables have a row for every id up to the highest.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        model: Model,
        #[serde(default)]
        added_tokens: Vec<Added>,
        /// Read for its errors, at which the library panics.
        #[serde(default, rename = "decoder")]
        _decoder: serde_json::Value,
    }
    #[derive(Default, serde::Deserialize)]
    struct Model {
        #[serde(default)]
        vocab: Ids,
    }
    #[derive(serde::Deserialize)]
    struct Added {
        #[serde(default)]
        id: u64,
    }
    let file: File = serde_json::from_slice(json).map_err(|error| format!("not a tokenizer: {error}"))?;
    let tokens = file.model.vocab.tokens + file.added_tokens.len() as u64;
    let highest = file.added_tokens.iter().map(|added| added.id).fold(file.model.vocab.highest, u64::max);
    if highest > tokens + GAPS {
        return Err(format!(
            "has the id {highest}, though it has only {tokens} tokens; its ids must be nearly consecutive"
        ));
    }
    Ok(())
}

/// Number of tokens in a vocabulary, and its highest id.
#[derive(Default)]
struct Ids {
    tokens: u64,
    highest: u64,
}

impl<'de> Deserialize<'de> for Ids {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = Ids;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ids, A::Error> {
                let mut ids = Ids::default();
                while let Some((IgnoredAny, id)) = map.next_entry::<IgnoredAny, u64>()? {
                    ids = Ids { tokens: ids.tokens + 1, highest: ids.highest.max(id) };
                }
                Ok(ids)
            }

            // Pieces of a unigram model: their indices are the ids.
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Ids, A::Error> {
                let mut tokens = 0;
                while let Some(IgnoredAny) = seq.next_element()? {
                    tokens += 1;
                }
                Ok(Ids { tokens, highest: tokens })
            }

            fn visit_unit<E>(self) -> Result<Ids, E> {
                Ok(Ids::default())
            }
        }
        deserializer.deserialize_any(Walk)
    }
}
