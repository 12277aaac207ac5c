//! `lowrank inspect`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::hub::{HubConfig, TensorFiles};

use super::{print, table};
use crate::checkpoint::{TrainerState, verify};
use crate::job::JobError;
use crate::run::{bytes, count};

/// Show what a checkpoint or model folder holds: configuration, tensors, sizes, step. Hashes of a checkpoint are checked.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank inspect runs/pretrain-001/checkpoints/step-001500
  lowrank inspect SmolLM2-135M")]
pub struct Args {
    /// Checkpoint or Hugging Face model folder
    dir: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = HubConfig::read(&args.dir.join("config.json")).map_err(JobError::from)?;
    let tensors = TensorFiles::open(&args.dir).map_err(JobError::from)?;
    let mut text = String::new();
    if args.dir.join("trainer.json").exists() {
        let manifest = verify(&args.dir).map_err(JobError::Damaged)?;
        let state = TrainerState::read(&args.dir).map_err(JobError::Damaged)?;
        let size: u64 = manifest.files.values().map(|file| file.size).sum();
        let loss = |loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{loss:.4}"));
        text.push_str(&table(&[
            vec![
                "checkpoint".into(),
                format!(
                    "step {}, {} tokens, {} files with {}, all as they were saved",
                    count(state.step),
                    count(state.tokens),
                    manifest.files.len(),
                    bytes(size)
                ),
            ],
            vec![
                "losses".into(),
                format!(
                    "train {}, validation {}, best validation {}",
                    loss(state.train_loss),
                    loss(state.validation_loss),
                    loss(state.best_validation_loss)
                ),
            ],
            vec!["optimizer".into(), format!("{} tensors", state.optimizer_tensors)],
        ]));
        text.push_str("settings\n");
        for (key, value) in &state.settings {
            text.push_str(&format!("  {key} = {value}\n"));
        }
    }
    text.push_str("configuration\n");
    for line in config.to_json().lines().filter(|line| !line.starts_with(['{', '}'])) {
        text.push_str(&format!("{}\n", line.trim_end_matches(',')));
    }
    text.push_str("tensors\n");
    let rows: Vec<Vec<String>> = tensors
        .shapes()
        .map(|(name, shape)| {
            vec![format!("  {name}"), format!("{shape:?}"), count(shape.iter().product::<usize>() as u64)]
        })
        .collect();
    text.push_str(&table(&rows));
    let total: u64 = tensors.shapes().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
    text.push_str(&format!("{} values in {} tensors, {} in f32\n", count(total), rows.len(), bytes(4 * total)));
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
