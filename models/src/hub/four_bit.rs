//! Weights in 4-bit codes as bitsandbytes stores them in Hugging Face folders ("QLoRA: Efficient Finetuning of Quantized LLMs", arXiv
//! 2305.14314): the codes under the name of the weight, and scales, maps and a JSON object beside them.

use std::path::Path;

use lowrank_kernels::narrow::four_bit::{FP4, NESTED_BLOCK, Scales};
use lowrank_kernels::narrow::packed::{Codes, PackedMatrix};
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::open::read_text;
use crate::error::ModelError;

/// Key of `config.json`.
const KEY: &str = "quantization_config";
/// End of the name of the tensor that holds the JSON object; the type of the codes follows.
pub(super) const STATE: &str = ".quant_state.bitsandbytes__";

/// Text of a `config.json` without its account of 4-bit weights, which the files repeat for each. Other kinds of quantised weights are
/// rejected.
pub(super) fn without_account(text: String, path: &Path) -> Result<String, ModelError> {
    let Ok(mut map) = serde_json::from_str::<Map<String, Value>>(&text) else {
        // The reader of the configuration says what is wrong with it.
        return Ok(text);
    };
    let Some(account) = map.remove(KEY).filter(|account| !account.is_null()) else { return Ok(text) };
    let bad = |reason: String| ModelError::File { path: path.to_path_buf(), reason };
    let said = |key: &str| account.get(key).unwrap_or(&Value::Null);
    let kind = said("bnb_4bit_quant_type").as_str().unwrap_or("fp4");
    let four_bit = *said("load_in_4bit") == true && *said("load_in_8bit") != true;
    if *said("quant_method") != "bitsandbytes" || !four_bit || !["nf4", "fp4"].contains(&kind) {
        return Err(bad(format!(
            "{KEY} is {account}; only bitsandbytes with load_in_4bit, of type nf4 or fp4, can be read: let transformers write the model in another type"
        )));
    }
    Ok(Value::Object(map).to_string())
}

/// Returns true if a `config.json` says that weights are in 4 bits.
pub(super) fn is_accounted(config: &Path) -> Result<bool, ModelError> {
    let map = serde_json::from_str::<Map<String, Value>>(&read_text(config)?);
    Ok(map.is_ok_and(|map| map.get(KEY).is_some_and(|account| !account.is_null())))
}

/// Error of a folder with such a configuration whose files hold no codes.
pub(super) fn without_codes(config: &Path) -> ModelError {
    ModelError::File {
        path: config.to_path_buf(),
        reason: format!(
            "{KEY} says that bitsandbytes stored weights in 4 bits, but the files hold none; remove the key if the weights are whole"
        ),
    }
}

/// The JSON object of a weight.
pub(super) struct State {
    pub kind: String,
    pub block: usize,
    pub shape: [usize; 2],
    /// Block and offset of scales in 8 bits.
    pub nested: Option<(usize, f32)>,
}

impl State {
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| format!("is not a JSON object: {error}"))?;
        let at = |key: &str| map.get(key).unwrap_or(&Value::Null);
        let number = |key: &str| {
            let value = at(key).as_u64().and_then(|value| usize::try_from(value).ok());
            value.ok_or_else(|| format!("has {key} {}; it must be a whole number", at(key)))
        };
        let sides: Vec<usize> =
            at("shape").as_array().into_iter().flatten().filter_map(Value::as_u64).map(|x| x as usize).collect();
        let shape =
            <[usize; 2]>::try_from(sides).map_err(|_| format!("has shape {}; it must be two numbers", at("shape")))?;
        let block = number("blocksize")?;
        if !block.is_power_of_two() || !(32..=4096).contains(&block) {
            return Err(format!("has blocksize {block}; it must be a power of two from 32 to 4096"));
        }
        let nested = match map.contains_key("nested_blocksize") {
            false => None,
            true => {
                let offset = at("nested_offset").as_f64();
                let offset =
                    offset.ok_or_else(|| format!("has nested_offset {}; it must be a number", at("nested_offset")))?;
                match number("nested_blocksize")? {
                    NESTED_BLOCK => Some((NESTED_BLOCK, offset as f32)),
                    other => return Err(format!("has nested_blocksize {other}; only {NESTED_BLOCK} can be read")),
                }
            }
        };
        Ok(Self { kind: at("quant_type").as_str().unwrap_or_default().to_string(), block, shape, nested })
    }
}

/// Tensors of a folder that hold the codes of a weight, by name: type, shape and bytes.
pub(super) fn tensors(name: &str, matrix: &PackedMatrix, dtype: &str) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
    let Codes::FourBit(stored) = &matrix.codes else { return Vec::new() };
    let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let part = |end: &str| format!("{name}.{end}");
    let [d_in, d_out] = matrix.shape;
    let kind = if stored.map == FP4 { "fp4" } else { "nf4" };
    let mut state = serde_json::json!({
        "quant_type": kind, "blocksize": stored.block, "dtype": dtype, "shape": [d_out, d_in],
    });
    let mut all = vec![
        (name.to_string(), Dtype::U8, vec![stored.packed.len(), 1], stored.packed.clone()),
        (part("quant_map"), Dtype::F32, vec![16], floats(&stored.map)),
    ];
    match &stored.scales {
        Scales::Plain(scales) => all.push((part("absmax"), Dtype::F32, vec![scales.len()], floats(scales))),
        Scales::Double { codes, nested, map, offset } => {
            all.push((part("absmax"), Dtype::U8, vec![codes.len()], codes.clone()));
            all.push((part("nested_absmax"), Dtype::F32, vec![nested.len()], floats(nested)));
            all.push((part("nested_quant_map"), Dtype::F32, vec![256], floats(&map[..])));
            state["nested_blocksize"] = NESTED_BLOCK.into();
            state["nested_dtype"] = "float32".into();
            state["nested_offset"] = f64::from(*offset).into();
        }
    }
    let state = state.to_string().into_bytes();
    all.push((format!("{name}{STATE}{kind}"), Dtype::U8, vec![state.len()], state));
    all
}

/// A `config.json` that says that weights are in 4 bits.
pub(super) fn with_account(config: &str) -> String {
    let Ok(mut map) = serde_json::from_str::<Map<String, Value>>(config) else {
        unreachable!("a configuration is a JSON object")
    };
    map.insert(KEY.into(), account());
    format!("{:#}\n", Value::Object(map))
}

/// The account of 4-bit weights in `config.json`.
fn account() -> Value {
    serde_json::json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": null,
    })
}
