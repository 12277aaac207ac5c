//! Training engine: steps, schedule, evaluation and samples. It is independent of files, the terminal and TensorBoard.

mod access;
mod activations;
mod error;
mod evaluate;
mod means;
mod micro;
mod moved;
mod options;
mod report;
mod sample;
mod schedule;
mod scores;
mod segments;
mod shards;
mod sums;
mod trainer;
mod updates;

pub use error::TrainError;
pub use evaluate::{Evaluation, evaluate, evaluate_together};
pub use options::{BackwardMode, TrainerOptions};
pub use report::StepReport;
pub use sample::sample_text;
pub use schedule::{Restarts, Schedule, ScheduleKind};
pub use scores::{example_loss, example_losses, greedy_answer, last_answer};
pub use shards::{Shards, largest_share};
pub use trainer::Trainer;

#[cfg(test)]
mod tests;
