//! Flags of all comparisons.

use std::path::PathBuf;

use crate::config::TrainSection;

/// Flags of all comparisons.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// Learning rates to try; none: three about the usual one of each method
    #[arg(long, value_delimiter = ',')]
    pub lr: Vec<f64>,
    /// Seeds that each method is trained with at its best learning rate; from 2 on the table has mean, standard deviation and a z-test against the first row
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,
    /// Further settings of all runs, as in `lowrank pretrain` and `lowrank finetune`
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Folder of the runs; without it runs/compare-optimizers and so on
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Show no progress
    #[arg(long)]
    pub quiet: bool,
}

impl Common {
    /// Seed of the first runs.
    pub fn first_seed(&self) -> u64 {
        let given = self.set.iter().rev().find_map(|setting| setting.strip_prefix("train.seed=")?.trim().parse().ok());
        given.unwrap_or(TrainSection::default().seed)
    }
}
