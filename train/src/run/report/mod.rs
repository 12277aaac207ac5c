//! Reports that a run writes or shows during training.

mod burn_logger;
mod logs;
mod metrics;
mod progress;
mod ranks;
mod summary;
mod tensorboard;

pub use burn_logger::TensorBoardLogger;
pub(super) use logs::Logs;
pub use metrics::{Metrics, MetricsFile};
pub use progress::{Console, StepView};
pub use ranks::{ModuleFile, RankFile};
pub use summary::{EndedBy, Peaks, Summary};
pub use tensorboard::TensorBoard;
