//! A whole run, pretraining or fine-tuning: from the configuration to the summary.
//!
//! - [`Training`]: the run itself, one step after another.
//! - [`checkpoint`]: saving and resuming with the same bits.
//! - [`report`]: metrics, [TensorBoard for Burn's own loop](report::TensorBoardLogger), progress, summary.
//! - [`RunFolder`]: the folder that holds all of it.

pub mod checkpoint;
mod error;
mod folder;
pub mod report;
mod resume;
mod start;
mod training;

pub use error::RunError;
pub use folder::{RunFolder, RunFolderError};
pub use training::{Finished, Training};
