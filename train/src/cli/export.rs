//! `lowrank export`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::hub::ModelFolder;

use super::folder;
use super::output::print;
use crate::build::BuildError;
use crate::process::device;

/// Write a model as a dense Hugging Face folder that other programs read.
///
/// Factors and sparse parts are multiplied out; a parameterization with a non-linearity between its factors has no dense weight and is refused.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  lowrank export --model runs/pretrain-001/checkpoints/step-001800 --out model-dense")]
pub struct Args {
    /// Checkpoint or model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder to write; it must not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Reads the model, multiplies factors out, and writes the folder under a temporary name before renaming it.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    folder::refuse_existing(&args.out)?;
    let device = device("cpu").map_err(BuildError::from)?;
    let from = ModelFolder::open(&args.model).map_err(BuildError::from)?;
    let model = from.load(&device).map_err(BuildError::from)?.to_dense(&device).map_err(BuildError::from)?;
    folder::write(&model, &from, &args.model, &args.out)?;
    print(&format!("{}\n", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
