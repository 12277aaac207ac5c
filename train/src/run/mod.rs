//! A whole run, pretraining or fine-tuning: from the configuration to the summary.
//!
//! - [`Training`]: the run itself, one step after another.
//! - [`checkpoint`]: saving and bit-exact resuming.
//! - [`report`]: metrics, [TensorBoard for Burn's own loop](report::TensorBoardLogger), progress, summary.
//! - [`RunFolder`]: the folder that holds all of it.

mod allocation;
pub mod checkpoint;
mod clock;
mod error;
mod folder;
mod peers;
pub mod report;
mod reporting;
mod resume;
mod start;
mod training;
mod validation;

pub use error::RunError;
pub use folder::{Opening, RunFolder, RunFolderError};
pub use start::{Place, Start, train};
pub use training::{Finished, Training};
