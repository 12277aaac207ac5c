//! The training engine: steps, schedule, evaluation and samples. It knows nothing of files, the terminal or TensorBoard.

mod activations;
mod cycle;
mod error;
mod evaluate;
mod micro;
mod moved;
mod sample;
mod schedule;
mod segments;
mod trainer;

pub use cycle::Cycle;
pub use error::TrainError;
pub use evaluate::{Evaluation, evaluate};
pub use sample::sample_text;
pub use schedule::{Restarts, Schedule, ScheduleKind};
pub use segments::BackwardMode;
pub use trainer::{StepReport, Trainer, TrainerOptions};

#[cfg(test)]
mod tests;
