//! `lowrank export`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use lowrank_models::hub::{self, MAX_SHARD_BYTES, ModelFolder};

use super::print;
use crate::job::{JobError, device};

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

/// Reads, multiplies out, writes beside and renames.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.out.exists() {
        return Err(JobError::Settings(format!("{} exists already; name another folder", args.out.display())).into());
    }
    let device = device("cpu")?;
    let folder = ModelFolder::open(&args.model).map_err(JobError::from)?;
    let model = folder.load(&device).map_err(JobError::from)?.to_dense(&device).map_err(JobError::from)?;
    let parent = args.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(".".as_ref());
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let beside = tempfile::tempdir_in(parent).with_context(|| format!("cannot write in {}", parent.display()))?;
    hub::save(&model, &folder.config.extra, beside.path(), MAX_SHARD_BYTES).map_err(JobError::from)?;
    hub::copy_companions(&args.model, beside.path()).map_err(JobError::from)?;
    std::fs::rename(beside.keep(), &args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    print(&format!("{}\n", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
