//! GGUF files of `lowrank export`.

use std::path::Path;

use anyhow::Context;
use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::gguf::{BlockType, TensorType, save_adapter_gguf, save_gguf};
use lowrank_models::hub::peft::PeftFolder;

use super::on_model::Adapters;
use crate::build::BuildError;
use crate::process::{device, files};

/// Types of matrices that can be written, under the names of `--dtype`.
const TYPES: [(&str, TensorType); 8] = [
    ("f32", TensorType::F32),
    ("f16", TensorType::F16),
    ("bf16", TensorType::BF16),
    ("q8_0", TensorType::Blocks(BlockType::Q8_0)),
    ("q5_1", TensorType::Blocks(BlockType::Q5_1)),
    ("q5_0", TensorType::Blocks(BlockType::Q5_0)),
    ("q4_1", TensorType::Blocks(BlockType::Q4_1)),
    ("q4_0", TensorType::Blocks(BlockType::Q4_0)),
];

/// Writes a model with its tokenizer.
pub fn model(from: &Path, dtype: Option<&str>, out: &Path) -> anyhow::Result<()> {
    let name = dtype.unwrap_or("f32");
    let Some((_, kind)) = TYPES.iter().find(|(known, _)| *known == name) else {
        let known: Vec<&str> = TYPES.iter().map(|(name, _)| *name).collect();
        let problem = format!("--dtype {name}: it must be one of {}", known.join(", "));
        return Err(BuildError::Settings(problem).into());
    };
    let device = device("cpu").map_err(BuildError::from)?;
    let folder = ModelFolder::open(from).map_err(BuildError::from)?;
    let model = folder.load(&device).map_err(BuildError::from)?.to_dense(&device).map_err(BuildError::from)?;
    whole(out, |path| {
        let report = save_gguf(&model, *kind, from, &stem(from), path).map_err(BuildError::from)?;
        for (tensor, kind) in report.others {
            eprintln!("warning: {tensor} is written as {}: no block of {name} divides its rows", kind.name());
        }
        Ok(())
    })
}

/// Writes an adapter for a model.
pub fn adapter(base: &Path, adapters: &Adapters, dtype: Option<&str>, out: &Path) -> anyhow::Result<()> {
    if let Some(dtype) = dtype {
        let problem = format!("--dtype {dtype}: adapters are written in f32; leave it out");
        return Err(BuildError::Settings(problem).into());
    }
    let [dir] = adapters.paths() else {
        let problem = "--adapter is given several times, and a file holds one; export them one by one, or merge them";
        return Err(BuildError::Settings(problem.into()).into());
    };
    let config = ModelFolder::open(base).map_err(BuildError::from)?.config.llama;
    let folder = PeftFolder::open(dir).map_err(BuildError::from)?;
    for warning in &folder.warnings {
        eprintln!("warning: {}: {warning}", dir.display());
    }
    let factors = folder.factors().map_err(BuildError::from)?;
    whole(out, |path| Ok(save_adapter_gguf(factors, &config, &stem(dir), path).map_err(BuildError::from)?))
}

/// Name of a folder or file, without the ending.
fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Writes a file under a temporary name that is then renamed.
fn whole(out: &Path, fill: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(".".as_ref());
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let beside = files::unfinished(out);
    // Remains of a killed process.
    files::remove_if_there(&beside).with_context(|| format!("cannot write in {}", parent.display()))?;
    let written = fill(&beside).and_then(|()| {
        files::sync(&beside)
            .and_then(|()| std::fs::rename(&beside, out))
            .and_then(|()| files::sync_parent(out))
            .with_context(|| format!("cannot create {}", out.display()))
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = files::remove_if_there(&beside);
    }
    written
}
