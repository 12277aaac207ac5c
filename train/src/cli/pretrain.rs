//! `lowrank pretrain`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::dry_run::dry_run;
use super::training::{TrainingArgs, last_name, texts};
use crate::build::{BuildError, is_vision};
use crate::config::{Config, Job};

/// Train a LLaMA-style model on text, or a vision transformer on images.
///
/// Without options it learns from the Rust sources of the burn crates that Cargo downloaded, for at most ten minutes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank pretrain
  lowrank pretrain --data books/ --model llama-20m --steps 5000 --out runs/books
  lowrank pretrain --data stories.jsonl --set data.field=story --set tokenizer.vocab_size=8192
  lowrank pretrain --resume --out runs/books
  lowrank pretrain --model llama-60m --batch 16 --steps 10000 --dry-run
  lowrank pretrain --model vit-micro --data images/ --batch 32 --epochs 20 --set data.images.flip=true
  lowrank pretrain --parameterization low-rank --set model.parameterization.options.rank=64
  lowrank pretrain --config run.toml --set optimizer.options.beta_2=0.99

Flags win over --set, --set over the file of --config, the file over the defaults. docs/configuration.md lists all keys.
Ctrl-C finishes the step, saves and exits; --resume resumes bit-exactly, as if the run had not been interrupted.")]
pub struct Args {
    /// Named shape such as llama-9m or vit-micro, or a Hugging Face model folder to go on from
    #[arg(long)]
    model: Option<String>,
    /// Parameterization of the linear layers, see `lowrank methods`
    #[arg(long, value_name = "NAME")]
    parameterization: Option<String>,
    /// Text: a file or folder; may be repeated. Images: a folder DIR/class/*.png or *.jpg, JSON lines, or an IDX file
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// tokenizer.json, or `bytes`; without it one is trained on the data
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<String>,
    /// Print shapes, memory, work and time of a step, and train nothing; data is not read, a vocabulary that would be trained counts as full
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    training: TrainingArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut layers = args.training.layers().map_err(BuildError::from)?;
    layers.optional("--model", "model.name", args.model.as_deref());
    layers.optional("--parameterization", "model.parameterization.name", args.parameterization.as_deref());
    layers.optional("--data", "data.path", (!args.data.is_empty()).then(|| texts(&args.data)));
    layers.optional("--tokenizer", "tokenizer.path", args.tokenizer.as_deref());
    if args.dry_run {
        dry_run(&layers)?;
        return Ok(ExitCode::SUCCESS);
    }
    let name = |config: &Config| last_name(&config.model.name).unwrap_or_else(|| "pretrain".into());
    let given = layers.has("optimizer.lr");
    let usual = |config: &mut Config| {
        // What cannot be read is refused when the run is built.
        if !given && is_vision(&config.model).unwrap_or(false) {
            config.optimizer.lr = VISION;
        }
    };
    args.training.run(Job::Pretrain, layers, name, usual)
}

/// Learning rate of vision transformers: small ones do not learn at that of language models.
const VISION: f64 = 1e-3;
