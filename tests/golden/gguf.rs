//! Files of llama.cpp: every block type, models with tokenizers, adapters; read, run, written back.

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use lowrank_models::hub::gguf::{GgufAdapter, GgufFile, TensorType, quantised, save_adapter_gguf, save_gguf};
use lowrank_models::hub::peft::PeftFolder;
use lowrank_models::hub::{self, MAX_SHARD_BYTES, ModelFolder, TensorFiles};
use lowrank_models::{BaseStorage, Llama, MatrixStorage, ModelError, ids_tensor};
use lowrank_optim::narrow::packed::stored_bytes;
use lowrank_train::data::Tokenizer;
use serde_json::{Map, Value, json};

use super::support::case::{Case, Outcome, host};

/// The case asks for the files of its name: a GGUF file with tensors, with a model, or with an adapter.
pub fn run(case: &Case) -> Outcome {
    let stem = case.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let beside = |end: &str| case.path.with_file_name(format!("{stem}{end}"));
    let file = GgufFile::open(&beside(".gguf")).map_err(message)?;
    match (file.text("general.type").map_err(message)?, case.has("logits")) {
        (Some("adapter"), _) => adapter(case, &stem),
        (_, true) => model(case, &file, &beside(".tokenizer.json"), &beside(".probes.json")),
        _ => types(case, &file),
    }
}

fn message(error: ModelError) -> String {
    error.to_string()
}

/// Values of every tensor, and the bytes that `source` is written as, bit by bit.
fn types(case: &Case, file: &GgufFile) -> Outcome {
    let (mut read, mut written) = (Vec::new(), Vec::new());
    let source = case.array("source")?;
    for (name, shape, kind) in file.tensors() {
        let expected = if case.has(name) { case.array(name)? } else { source.clone() };
        let ours = file.values(name).map_err(message)?;
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        if (shape, bits(&ours)) != (expected.shape.as_slice(), bits(&expected.f32())) {
            let at = ours.iter().zip(expected.f32()).position(|(a, b)| a.to_bits() != b.to_bits());
            return Err(format!("{name} ({}) differs at {at:?} or in its shape {shape:?}", kind.name()));
        }
        read.push(kind.name());
        if let (Ok(bytes), true) = (quantised(kind, &source.f32()), shape == source.shape) {
            if bytes != file.bytes(name).map_err(message)?.1 {
                return Err(format!("source was written as other bytes of {}", kind.name()));
            }
            written.push(kind.name());
        }
    }
    for needed in ["F32", "F16", "BF16", "Q8_0"] {
        if read.contains(&needed) && !written.contains(&needed) {
            return Err(format!("{needed} was not written"));
        }
    }
    Ok(format!("read bit by bit: {}; written: {}", read.join(" "), written.join(" ")))
}

/// Weights, logits and tokenizer of a model; the file that is written of it holds the same.
fn model(case: &Case, file: &GgufFile, tokenizer: &Path, probes: &Path) -> Outcome {
    let model = load(file.path()).map_err(message)?;
    logits(case, &model)?;
    in_own_bytes(case, file, &model)?;
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let folder = dir.path().join("model");
    std::fs::create_dir(&folder).map_err(|error| error.to_string())?;
    hub::save(&model, &Map::new(), &folder, MAX_SHARD_BYTES).map_err(message)?;
    let mut files = TensorFiles::open(&folder).map_err(message)?;
    let shapes: Vec<(String, Vec<usize>)> = files.shapes().map(|(name, shape)| (name.into(), shape.to_vec())).collect();
    for (name, shape) in &shapes {
        let values = files.take(name, shape).map_err(message)?;
        let weight = format!("w.{name}");
        if case.has(&weight) {
            case.array(&weight)?.near(&weight, &values, 0.0, 0.0)?;
        }
        let sums = case.array(&format!("sum.{name}"))?;
        let sum = |of: fn(f64) -> f64| values.iter().map(|value| of(f64::from(*value))).sum::<f64>();
        for (ours, expected) in [sum(|x| x), sum(|x| x * x)].iter().zip(&sums.values) {
            if (ours - expected).abs() > 1e-9 * sums.values[1].max(1.0) {
                return Err(format!("the sums of {name} are {ours} instead of {expected}"));
            }
        }
    }
    let again = dir.path().join("again.gguf");
    save_gguf(&model, TensorType::F32, file.path(), "again", &again).map_err(message)?;
    logits(case, &load(&again).map_err(message)?)?;
    let mut remark = format!("{} weights and the logits agree, and those of the file written back", shapes.len());
    if probes.exists() {
        probed(probes, &[&file.path().join("tokenizer.json"), &again.join("tokenizer.json"), tokenizer])?;
        same_arrays(file, &again)?;
        // The same metadata, of the files that Hugging Face has for it.
        std::fs::copy(tokenizer, folder.join("tokenizer.json")).map_err(|error| error.to_string())?;
        let id = |name: &str| file.count(&format!("tokenizer.ggml.{name}_token_id")).map_err(message);
        let mut config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap_or_default())
            .map_err(|error| error.to_string())?;
        config["eos_token_id"] = json!(id("eos")?);
        config["bos_token_id"] = json!(id("bos")?);
        std::fs::write(folder.join("config.json"), config.to_string()).map_err(|error| error.to_string())?;
        let of_folder = dir.path().join("folder.gguf");
        save_gguf(&model, TensorType::F32, &folder, "folder", &of_folder).map_err(message)?;
        same_arrays(file, &of_folder)?;
        remark.push_str("; so does the tokenizer, both ways");
    }
    Ok(remark)
}

/// Matrices that stay in the bytes of the file take no more than they do there, and give the bits of the dequantised ones.
fn in_own_bytes(case: &Case, file: &GgufFile, model: &Llama) -> Result<(), String> {
    let ids = case.array("input_ids")?;
    let bits = |model: &Llama| -> Vec<u32> {
        let logits = model.logits(ids_tensor(&ids.i32(), ids.shape[0], &Device::default()), None);
        host(logits).into_iter().map(f32::to_bits).collect()
    };
    let stored = |storage| {
        let folder = ModelFolder::open(file.path())?;
        folder.load_stored(MatrixStorage::Frozen(storage), &Device::default())
    };
    let own = stored(BaseStorage::File).map_err(message)?;
    if bits(&own) != bits(model) {
        return Err("weights in the bytes of the file give other bits".into());
    }
    let bytes: usize =
        file.tensors().filter_map(|(name, ..)| file.bytes(name).ok()).map(|(_, bytes)| bytes.len()).sum();
    // Marks of matrices in codes; nothing else may be stored with them.
    let marks: usize = file.tensors().map(|(_, shape, _)| 4 * (8 + shape.iter().max().unwrap_or(&0))).sum();
    let taken = TensorBytes::of(&own);
    if taken > bytes + marks {
        return Err(format!("the weights take {taken} bytes; the file has {bytes}"));
    }
    let eight = stored(BaseStorage::Q8_0).map_err(message)?;
    let is_eight = file.tensors().all(|(_, shape, kind)| shape.len() < 2 || kind.name() == "Q8_0");
    match is_eight && bits(&eight) != bits(model) {
        true => Err("8-bit blocks were rounded again".into()),
        false => Ok(()),
    }
}

/// Bytes of the stored values of a model.
#[derive(Default)]
struct TensorBytes(usize);

impl TensorBytes {
    fn of(model: &Llama) -> usize {
        let mut bytes = Self::default();
        model.visit(&mut bytes);
        bytes.0
    }
}

impl ModuleVisitor for TensorBytes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0 += stored_bytes(&param.val());
    }
}

fn load(path: &Path) -> Result<Llama, ModelError> {
    ModelFolder::open(path)?.load(&Device::default())
}

fn logits(case: &Case, model: &Llama) -> Result<(), String> {
    let ids = case.array("input_ids")?;
    let ours = host(model.logits(ids_tensor(&ids.i32(), ids.shape[0], &Device::default()), None));
    case.array("logits")?.near("logits", &ours, 1e-4, 0.0).map(|_| ())
}

/// Ids of texts by each of the tokenizers; special tokens mean themselves.
fn probed(probes: &Path, tokenizers: &[&Path]) -> Result<(), String> {
    let text = std::fs::read_to_string(probes).map_err(|error| error.to_string())?;
    let probes: Vec<Value> = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    for path in tokenizers {
        let tokenizer = Tokenizer::from_file(path).map_err(|error| error.to_string())?.with_special_tokens();
        for probe in &probes {
            let text = probe["text"].as_str().ok_or("a probe has no text")?;
            let ids = tokenizer.encode(text).map_err(|error| error.to_string())?;
            if json!(ids) != probe["ids"] {
                return Err(format!("{}: {text:?} is {ids:?} instead of {}", path.display(), probe["ids"]));
            }
        }
    }
    Ok(())
}

/// Compares all that a file says of its tokenizer.
fn same_arrays(file: &GgufFile, other: &Path) -> Result<(), String> {
    let other = GgufFile::open(other).map_err(message)?;
    let same = |key: &str| -> Result<bool, ModelError> {
        Ok(match key.rsplit('.').next().unwrap_or_default() {
            "tokens" | "merges" => file.texts(key)? == other.texts(key)?,
            "token_type" | "scores" => file.numbers(key)? == other.numbers(key)?,
            name if name.starts_with("add_") => file.flag(key)? == other.flag(key)?,
            name if name.ends_with("_id") => file.count(key)? == other.count(key)?,
            _ => file.text(key)? == other.text(key)?,
        })
    };
    for key in file.keys().filter(|key| key.starts_with("tokenizer.")) {
        if !same(key).map_err(message)? {
            return Err(format!("{key} was written with another value"));
        }
    }
    Ok(())
}

/// Logits of a model with an adapter, as a file and as a folder; the file written of the folder is the same.
fn adapter(case: &Case, stem: &str) -> Outcome {
    let base = stem.rsplit_once('.').map(|(base, _)| base).ok_or("no model belongs to a case of this name")?;
    let beside = |name: String| -> PathBuf { case.path.with_file_name(name) };
    let (base, path, dir) = (beside(format!("{base}.gguf")), beside(format!("{stem}.gguf")), beside(stem.to_string()));
    let attach = |path: &Path| GgufAdapter::open(path).and_then(|file| file.attach(load(&base)?)).map_err(message);
    logits(case, &attach(&path)?.0)?;
    let open = || PeftFolder::open(&dir).map_err(message);
    logits(case, &open()?.attach(load(&base).map_err(message)?).map_err(message)?.0)?;
    let written = tempfile::tempdir().map_err(|error| error.to_string())?;
    let again = written.path().join("again.gguf");
    let config = ModelFolder::open(&base).map_err(message)?.config.llama;
    save_adapter_gguf(open()?.factors().map_err(message)?, &config, "again", &again).map_err(message)?;
    logits(case, &attach(&again)?.0)?;
    let (before, after) = (GgufFile::open(&path).map_err(message)?, GgufFile::open(&again).map_err(message)?);
    let names = |file: &GgufFile| file.tensors().map(|(name, ..)| name.to_string()).collect::<Vec<_>>();
    if names(&before) != names(&after) {
        return Err(format!("{:?} were written", names(&after)));
    }
    for name in names(&before) {
        if before.values(&name).map_err(message)? != after.values(&name).map_err(message)? {
            return Err(format!("{name} was written with other values"));
        }
    }
    let alpha = |file: &GgufFile| file.number("adapter.lora.alpha").map_err(message);
    match alpha(&before)? == alpha(&after)? {
        true => Ok("the logits agree, of the file and of the folder; the file is written of the folder".into()),
        false => Err("alpha was written with another value".into()),
    }
}
