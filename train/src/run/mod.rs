//! The folder of a run and all that is written into it or shown while it lasts.

mod allocator;
mod burn_logger;
mod events;
mod folder;
mod memory;
mod metrics;
mod progress;
mod signals;
mod summary;
mod units;

pub use allocator::BlockAllocator;
pub use burn_logger::TensorBoardLogger;
pub use events::TensorBoard;
pub use folder::{RunFolder, RunFolderError};
pub use memory::MemoryUse;
pub use metrics::{Metrics, MetricsFile};
pub use progress::{Screen, StepView};
pub use signals::{Signal, Signals};
pub use summary::Summary;
pub use units::{bytes, count, duration, parse_bytes};
