//! Training on Burn: data, engine, checkpoints, TensorBoard and memory. The program `lowrank` is made of it.
//!
//! - [`data`]: text to batches of tokens.
//! - [`engine`]: one step after another, evaluation, samples.
//! - [`checkpoint`]: saving and resuming with the same bits.
//! - [`run`]: the folder of a run, metrics, [TensorBoard for Burn's own loop](run::TensorBoardLogger), progress.
//! - [`plan`]: what a run will take, and how it could take less.
//! - [`config`]: everything that a run can be told.
//! - [`cli`]: the commands of the program.

pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod engine;
pub mod job;
pub mod plan;
pub mod run;
