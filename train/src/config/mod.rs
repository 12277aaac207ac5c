//! The configuration of a run: one section for each part, defaults in one place.

mod keys;
mod layers;
mod sections;
mod units;

pub use keys::{KEYS, Key, Kind, documentation};
pub use layers::{Assignment, ConfigError, Layers, Origin};
pub use sections::{
    AdapterSection, CheckpointSection, Config, DataSection, EvalSection, Job, LogSection, ModelSection,
    OptimizerSection, RuleSection, RunSection, ScheduleSection, TokenizerSection, TrainSection,
};
pub use units::{bytes, count, duration, parse_bytes};
