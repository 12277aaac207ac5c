//! Updates added to the weights of a model folder of any architecture, tensor by tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{bf16, f16};
use lowrank_adapters::compose::Matrix;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::error::ModelError;
use crate::hub::names::{CONFIG, INDEX, WEIGHTS};
use crate::hub::open::read_text;
use crate::hub::spool::TensorSpool;
use crate::hub::{FileType, TensorFiles, copy_companions};

/// Writes the model of a folder with updates added to its linear layers into an existing folder, with tokenizer and settings. Sums are computed in
/// f64 and written in `dtype`, or in the type that each tensor has in the model's files; other tensors are copied.
///
/// `update` gives the update `[d_out, d_in]` of the layer with a path, if it has one; `layers` are the paths that have one, each with its `[d_in, d_out]`, and
/// `embeddings` those of them whose weight is stored as `[d_in, d_out]`. Weights that the model does not have, or of other sides, and an embedding that
/// serves as head too are rejected.
pub fn merge_into(
    model: &Path,
    layers: &BTreeMap<String, [usize; 2]>,
    embeddings: &BTreeSet<String>,
    dtype: Option<FileType>,
    out: &Path,
    max_shard_bytes: u64,
    mut update: impl FnMut(&str) -> Result<Option<Matrix>, ModelError>,
) -> Result<(), ModelError> {
    let mut files = TensorFiles::open(model)?;
    let shapes: Vec<(String, Vec<usize>)> =
        files.shapes().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect();
    let known: BTreeMap<&str, &[usize]> =
        shapes.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    let path = model.join(CONFIG);
    let mut config: Map<String, Value> = serde_json::from_str(&read_text(&path)?)
        .map_err(|error| ModelError::File { path, reason: format!("not a JSON object: {error}") })?;
    let tied = config.get("tie_word_embeddings") == Some(&Value::Bool(true)) || !known.contains_key("lm_head.weight");
    for (path, [d_in, d_out]) in layers {
        let tensor = format!("{path}.weight");
        let reason = match known.get(tensor.as_str()) {
            Some(shape) if embeddings.contains(path) && **shape == [*d_in, *d_out] => match tied {
                false => continue,
                true => "serves as head too (tie_word_embeddings), which the adapters do not change; compose without --model, and let `lowrank merge` give \
                         the model a head of its own"
                    .into(),
            },
            Some(shape) if !embeddings.contains(path) && **shape == [*d_out, *d_in] => continue,
            Some(shape) => {
                let sides = if embeddings.contains(path) { [d_in, d_out] } else { [d_out, d_in] };
                format!("has shape {shape:?}, the adapters {sides:?}: give the model that they were trained on")
            }
            None => "is missing, and the adapters change it: give the model that they were trained on".into(),
        };
        return Err(ModelError::Tensor { path: model.to_path_buf(), tensor, reason });
    }
    let begin = |number: usize| TensorSpool::create(&out.join(format!("part-{number}.safetensors")));
    let (mut parts, mut index) = (vec![begin(0)?], Map::new());
    let mut total = 0;
    let types = files.types();
    for (name, shape) in shapes {
        let (mut bytes, mut kind) = files.entry(&name, &shape)?;
        let path = name.strip_suffix(".weight").filter(|path| layers.contains_key(*path));
        let delta = path.map(&mut update).transpose()?.flatten();
        let delta = match path.is_some_and(|path| embeddings.contains(path)) {
            true => delta.map(|delta| delta.transpose()),
            false => delta,
        };
        let is_float = matches!(kind, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64);
        if let Some(asked) =
            (is_float && (delta.is_some() || dtype.is_some())).then(|| dtype.unwrap_or(types.get(&name)))
        {
            let columns = shape.last().copied().unwrap_or(1).max(1);
            let value = |place: usize| {
                let change = delta.as_ref().map_or(0.0, |delta| delta[(place / columns, place % columns)]);
                number(&bytes, kind, place) + change
            };
            let changed = written(shape.iter().product(), value, asked).map_err(|(place, value)| {
                let reason = format!(
                    "element {place} would be {value}, which {} cannot hold; name another type, or smaller weights",
                    asked.name()
                );
                ModelError::Tensor { path: model.to_path_buf(), tensor: name.clone(), reason }
            })?;
            (kind, bytes) = (asked.dtype(), changed);
        } else if delta.is_some() {
            let reason = format!("has type {kind:?}; only floating point can be changed");
            return Err(ModelError::Tensor { path: model.to_path_buf(), tensor: name, reason });
        }
        let size = bytes.len() as u64;
        if parts[parts.len() - 1].bytes() > 0 && parts[parts.len() - 1].bytes() + size > max_shard_bytes {
            parts.push(begin(parts.len())?);
        }
        let last = parts.len() - 1;
        index.insert(name.clone(), json!(last));
        total += size;
        parts[last].push_bytes(&name, kind, &shape, &bytes)?;
    }
    let count = parts.len();
    let file = |number: usize| match count {
        1 => WEIGHTS.to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    for (number, part) in parts.into_iter().enumerate() {
        part.finish(BTreeMap::new())?;
        let (from, to) = (out.join(format!("part-{number}.safetensors")), out.join(file(number)));
        std::fs::rename(&from, &to).map_err(ModelError::io(&to))?;
    }
    if count > 1 {
        for place in index.values_mut() {
            *place = json!(file(place.as_u64().unwrap_or(0) as usize));
        }
        let text = format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": index}));
        std::fs::write(out.join(INDEX), text).map_err(ModelError::io(out.join(INDEX)))?;
    }
    for key in ["dtype", "torch_dtype"] {
        if let (Some(named), Some(asked)) = (config.get_mut(key), dtype) {
            *named = json!(asked.torch_name());
        }
    }
    let text = format!("{:#}\n", Value::Object(config));
    std::fs::write(out.join(CONFIG), text).map_err(ModelError::io(out.join(CONFIG)))?;
    copy_companions(model, out)
}

/// One number of the bytes of a tensor of floating point.
fn number(bytes: &[u8], kind: Dtype, place: usize) -> f64 {
    fn at<const N: usize>(bytes: &[u8], place: usize) -> [u8; N] {
        std::array::from_fn(|byte| bytes[N * place + byte])
    }
    match kind {
        Dtype::F16 => f16::from_le_bytes(at(bytes, place)).to_f64(),
        Dtype::BF16 => bf16::from_le_bytes(at(bytes, place)).to_f64(),
        Dtype::F64 => f64::from_le_bytes(at(bytes, place)),
        _ => f64::from(f32::from_le_bytes(at(bytes, place))),
    }
}

/// Bytes of numbers in a type, or place and value of the first that it cannot hold.
fn written(count: usize, value: impl Fn(usize) -> f64, kind: FileType) -> Result<Vec<u8>, (usize, f64)> {
    let mut bytes = Vec::with_capacity(count * kind.bytes());
    for place in 0..count {
        let sum = value(place);
        let value = sum as f32;
        let finite = match kind {
            FileType::F32 => {
                bytes.extend(value.to_le_bytes());
                value.is_finite()
            }
            FileType::F16 => {
                let value = f16::from_f32(value);
                bytes.extend(value.to_le_bytes());
                value.is_finite()
            }
            FileType::BF16 => {
                let value = bf16::from_f32(value);
                bytes.extend(value.to_le_bytes());
                value.is_finite()
            }
        };
        if !finite {
            return Err((place, sum));
        }
    }
    Ok(bytes)
}
