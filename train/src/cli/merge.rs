//! `lowrank merge`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::adapter::{AdapterError, merged};
use lowrank_models::hub::{FileType, FileTypes, ModelFolder, RoundingCost, VisionFolder, VisionModel, without_codes};
use lowrank_models::{BaseStorage, MatrixStorage};

use super::folder;
use super::on_model::{Adapters, base_storage};
use super::output::print;
use super::vision_folder::VisionOf;
use crate::build::BuildError;
use crate::process::device;

/// Merge adapters into a model's weights, and write it as a Hugging Face folder that other programs read.
///
/// Weights are computed in f32 and written in the type of the model's files. Rejected: adapters that cannot be merged, or that were trained on
/// different base weights, and results that are not finite or beyond the range of that type.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  lowrank merge --model SmolLM2-135M --adapter runs/SmolLM2-135M-lora-001/checkpoints/step-000300 --out merged")]
pub struct Args {
    /// Model folder or GGUF file that the adapters are attached to
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    adapters: Adapters,
    /// Type of the weights: f32, f16 or bf16; when not given, each has the type that it has in the model's files
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    /// Storage of the weights that the adapters were trained on: file, f32, bf16, int8, q8_0 or nf4
    #[arg(long, value_name = "STORAGE", default_value = "file", value_parser = base_storage)]
    base: BaseStorage,
    /// Folder to write; it must not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.adapters.is_empty() {
        return Err(BuildError::Settings("nothing to merge: name a folder with --adapter DIR".into()).into());
    }
    let dtype = args.dtype.as_deref().map(folder::file_type).transpose()?;
    folder::refuse_existing(&args.out)?;
    if VisionFolder::is_one(&args.model).map_err(BuildError::from)? {
        return merge_vision(&args, dtype);
    }
    let from = ModelFolder::open(&args.model).map_err(BuildError::from)?;
    let device = device("cpu").map_err(BuildError::from)?;
    let model = from.load_stored(MatrixStorage::Frozen(args.base), &device).map_err(BuildError::from)?;
    let model = args.adapters.on(model)?;
    let model = without_codes(merged(model).map_err(|error| BuildError::Model(error.into()))?);
    let types = match dtype {
        Some(dtype) => FileTypes::all(dtype),
        None => from.types().map_err(BuildError::from)?,
    };
    let cost = RoundingCost::of(&model, &types);
    folder::write(&model, &from, &args.model, dtype, &args.out)?;
    let mut text = format!("{}\n", args.out.display());
    if cost.largest > 0.0 {
        let (kind, relative, largest) = (types.usual().name(), 100.0 * cost.relative(), cost.largest);
        text.push_str(&format!(
            "rounding to {kind} changed the weights by {relative:.4} % (RMS), at most by {largest:.3e}\n"
        ));
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn merge_vision(args: &Args, dtype: Option<FileType>) -> anyhow::Result<ExitCode> {
    let from = VisionOf::open(&args.model)?;
    let device = device("cpu").map_err(BuildError::from)?;
    let failed = |error: AdapterError| BuildError::Model(error.into());
    let model = match from.load(&args.adapters, &device)? {
        VisionModel::Vit(model) => VisionModel::Vit(Box::new(merged(*model).map_err(failed)?)),
        VisionModel::ClipVision(model) => VisionModel::ClipVision(Box::new(merged(*model).map_err(failed)?)),
        VisionModel::Clip(model) => VisionModel::Clip(Box::new(merged(*model).map_err(failed)?)),
        VisionModel::ClipClassifier(model) => VisionModel::ClipClassifier(Box::new(merged(*model).map_err(failed)?)),
    };
    from.write(&model, dtype, &args.out)?;
    print(&format!("{}\n", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
