//! Training on Burn: data, engine, checkpoints, TensorBoard and memory, used by the program `lowrank`.
//!
//! - [`data`]: text to batches of tokens.
//! - [`objective`]: the weighted sum of losses that a step minimises, and the streams of batches that they are computed on.
//! - [`engine`]: training steps, evaluation, samples.
//! - [`build`]: model, data, optimizer, schedule and adapter from a configuration.
//! - [`recipe`]: pretraining and fine-tuning.
//! - [`run`]: a whole run, with its folder, [checkpoints](run::checkpoint) and [reports](run::report).
//! - [`process`]: memory, signals and devices.
//! - [`plan`]: the memory that a run needs, and how to reduce it.
//! - [`config`]: all settings of a run.
//! - [`cli`]: the commands of the program.

pub mod build;
pub mod cli;
pub mod config;
pub mod data;
pub mod engine;
pub mod objective;
pub mod plan;
pub mod process;
pub mod recipe;
pub mod run;
