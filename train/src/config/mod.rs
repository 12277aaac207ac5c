//! The configuration of a run: one section for each part, each key stated once.

mod assignment;
mod check;
mod documentation;
mod effective;
mod error;
mod job;
mod keys;
mod known;
mod layers;
mod methods;
mod schema;
mod sections;
mod units;

pub use assignment::Assignment;
pub use documentation::documentation;
pub use effective::Config;
pub use error::{ConfigError, Origin};
pub use job::Job;
pub use keys::{Key, Section, sections};
pub use layers::Layers;
pub use methods::{NONE, SLOTS, Slot};
pub use schema::schema;
pub use sections::{
    AdapterSection, AllocationSection, CheckpointSection, DataSection, EvalSection, LogSection, ModelSection,
    OptimizerSection, ParameterizationSection, PenaltySection, RuleSection, RunSection, ScheduleSection,
    TokenizerSection, TrainSection, WeightsSection,
};
pub use units::{bytes, count, duration, parse_bytes};
