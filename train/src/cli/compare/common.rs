//! Flags of all comparisons.

use std::path::PathBuf;

/// Flags of all comparisons.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// Learning rates to try; none: three about the usual one of each method
    #[arg(long, value_delimiter = ',')]
    pub lr: Vec<f64>,
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
