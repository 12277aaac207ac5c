//! Files written from models.

use std::path::Path;

use safetensors::View;
use serde_json::Value;

use super::architecture::Architecture;
use super::config;
use super::names::{Heads, interleaved, to_gguf};
use super::rope;
use super::tokenizer::{self, Texts};
use super::types::{BlockType, TensorType};
use super::write::{Entry, Metadata, Written, write};
use crate::error::ModelError;
use crate::hub::FileTypes;
use crate::hub::companions::{CHAT_TEMPLATE, companion};
use crate::hub::names::CONFIG;
use crate::hub::write::{Names, collected};
use crate::llama::Llama;

/// Result of writing a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GgufReport {
    /// Tensors that were not written in the type asked for, because no block divides their rows, with their types.
    pub others: Vec<(String, TensorType)>,
}

/// Writes a dense model with tokenizer and chat template of its folder `from`, vectors in f32, matrices in a type.
///
/// The embedding and the head keep 8 bits where the matrices have fewer. An interruption leaves part of the file: use a new name and
/// rename it.
pub fn save_gguf(
    model: &Llama,
    kind: TensorType,
    from: &Path,
    name: &str,
    path: &Path,
) -> Result<GgufReport, ModelError> {
    let llama = model.config();
    let architecture = Architecture::of(llama);
    architecture.check(llama)?;
    let mut metadata = Metadata::default();
    metadata.put(config::ARCHITECTURE, Entry::Text(architecture.name.into()));
    metadata.put("general.type", Entry::Text("model".into()));
    metadata.put("general.name", Entry::Text(name.into()));
    metadata.put("general.quantization_version", Entry::U32(2));
    metadata.put("general.file_type", Entry::U32(kind.file_type()));
    config::write(llama, &mut metadata)?;
    let texts = tokenizer::metadata(&texts(from)?, llama.vocab_size)
        .map_err(|reason| ModelError::File { path: from.join("tokenizer.json"), reason })?;
    metadata.extend(texts);
    let heads = Heads::of(llama);
    let mut report = GgufReport::default();
    let mut tensors = Vec::new();
    if let Some(divisors) = rope::divisors(llama) {
        let shape = vec![divisors.len()];
        let values = Box::new(move || Ok(divisors));
        tensors.push(Written { name: rope::DIVISORS.into(), shape, kind: TensorType::F32, values });
    }
    for (path, stored) in collected(model, &Names::default(), &FileTypes::default())? {
        let Some(name) = to_gguf(&path, llama.features.norms_after) else {
            return Err(ModelError::Config(format!(
                "{path} has no place in GGUF; export the model as a dense one first"
            )));
        };
        let shape = stored.shape().to_vec();
        let own = kind_of(kind, &name, &shape);
        if own != kind && shape.len() > 1 && own != TensorType::Blocks(BlockType::Q8_0) {
            report.others.push((name.clone(), own));
        }
        let values = Box::new(move || {
            let values = stored.values();
            Ok(match heads.reordered(&path) {
                Some(heads) => interleaved(&values, heads, stored.shape()[0]),
                None => values,
            })
        });
        tensors.push(Written { name, shape, kind: own, values });
    }
    write(path, &metadata, tensors)?;
    Ok(report)
}

/// Type in which a tensor is written.
fn kind_of(kind: TensorType, name: &str, shape: &[usize]) -> TensorType {
    let outside = !name.starts_with("blk.");
    let kind = match kind {
        TensorType::Blocks(BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1) if outside => {
            TensorType::Blocks(BlockType::Q8_0)
        }
        kind => kind,
    };
    match shape {
        [_, row] if row.is_multiple_of(kind.block_values()) => kind,
        [_, _] => TensorType::F16,
        _ => TensorType::F32,
    }
}

/// The files of a folder that say how texts become tokens.
fn texts(from: &Path) -> Result<Texts, ModelError> {
    let json = |name: &str| -> Result<Value, ModelError> {
        let Some(bytes) = companion(from, name)? else { return Ok(Value::Null) };
        serde_json::from_slice(&bytes)
            .map_err(|error| ModelError::File { path: from.join(name), reason: format!("not JSON: {error}") })
    };
    let template = companion(from, CHAT_TEMPLATE)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Texts {
        tokenizer: json("tokenizer.json")?,
        settings: json("tokenizer_config.json")?,
        model: json(CONFIG)?,
        generation: json("generation_config.json")?,
        template,
    })
}
