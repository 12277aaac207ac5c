//! `lowrank compare adapters`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::adapter::{Rank, STRUCTURES, StructureEntry};

use super::common::Common;
use super::comparison::{Comparison, chosen};
use super::search::{Contender, upward};
use super::table::{Column, PEAK, STEP};
use super::trial::Trial;
use crate::build::BuildError;
use crate::config::{bytes, count};

/// Fine-tune the same model with several adapter structures.
///
/// At least three learning rates are tried with each: the structure's usual one, which is that of long runs, five times it and twenty-five times it;
/// while the best of them is the smallest or the largest, one or two beyond it as well.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lowrank compare adapters --model SmolLM2-135M --data train.jsonl --steps 200
  lowrank compare adapters lora dora vera --model SmolLM2-135M --data train.jsonl --rank 16 --lr 1e-4,3e-4,1e-3
  lowrank compare adapters --model SmolLM2-135M --data train.jsonl --set train.batch=2 --set adapter.targets=q_proj,v_proj")]
pub struct Args {
    /// Adapter structures to compare; none: all of `lowrank methods`
    names: Vec<String>,
    /// Hugging Face model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// JSON lines: a file or folder; may be repeated
    #[arg(long, value_name = "PATH", required = true)]
    data: Vec<PathBuf>,
    /// Steps of each run
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Rank of the structures that have one; each one's own when not given
    #[arg(long)]
    rank: Option<u64>,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let find = |name: &str| Ok(StructureEntry::find(name).map_err(BuildError::from)?);
    let entries = chosen(&args.names, STRUCTURES.iter(), find)?;
    let contender = |entry: &'static StructureEntry| Contender {
        name: entry.spec.name,
        lrs: upward(entry.lr, 5.0),
        command: finetuning(&args, entry),
    };
    let comparison = Comparison {
        what: "adapter",
        folder: "compare-adapters",
        contenders: entries.into_iter().map(contender).collect(),
        most: 5,
        columns: vec![
            Column { title: "values trained", cell: &|trial, _| count(trial.summary.parameters) },
            Column { title: "saved", cell: &|trial, _| saved(trial).map_or_else(|| "-".into(), bytes) },
            STEP,
            PEAK,
        ],
    };
    comparison.run(&args.common)
}

/// Command line of a fine-tuning run that reports only its result.
fn finetuning(args: &Args, entry: &StructureEntry) -> Vec<String> {
    let mut command = vec!["finetune".to_string(), "--adapter".into(), entry.spec.name.into()];
    command.extend(["--model".into(), args.model.to_string_lossy().into_owned()]);
    for data in &args.data {
        command.extend(["--data".into(), data.to_string_lossy().into_owned()]);
    }
    command.extend(["--steps".into(), args.steps.to_string()]);
    if let Some(rank) = args.rank.filter(|_| entry.spec.rank != Rank::None) {
        command.extend(["--rank".into(), rank.to_string()]);
    }
    for setting in ["eval.every=0", "log.sample_tokens=0", "log.every=10"] {
        command.extend(["--set".into(), setting.into()]);
    }
    command
}

/// Bytes of the adapter's tensors in its file.
fn saved(trial: &Trial) -> Option<u64> {
    let checkpoint = trial.summary.checkpoint.as_ref()?.file_name()?;
    let path = trial.folder.join("checkpoints").join(checkpoint).join("adapter_model.safetensors");
    Some(std::fs::metadata(path).ok()?.len())
}
