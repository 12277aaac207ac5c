//! Rejections that depend on several keys.

use super::Config;
use super::error::{ConfigError, Origin};
use crate::engine::BackwardMode;

impl Config {
    /// Rejects incompatible settings of a configuration that was changed after it was resolved.
    pub fn check(&self) -> Result<(), ConfigError> {
        check(self, &|_| Origin::Default)
    }
}

/// Rejects incompatible settings; the allowed values of a single key are in its section.
pub fn check(config: &Config, origin_of: &dyn Fn(&str) -> Origin) -> Result<(), ConfigError> {
    let refuse = |key: &str, reason: &str| {
        Err(ConfigError::Value {
            key: key.to_string(),
            value: config.entries().remove(key).unwrap_or_default(),
            origin: origin_of(key),
            reason: reason.to_string(),
        })
    };
    let c = config;
    if c.train.backward == BackwardMode::PerLayer {
        let wrong = [
            (
                "optimizer.clip",
                c.optimizer.clip > 0.0,
                "the global norm is known only when all blocks are updated; set it to 0, and optimizer.block_clip for clipping block by block",
            ),
            (
                "train.accumulation",
                c.train.accumulation > 1,
                "a block would be updated before the next micro-batch; set it to 1 and raise train.batch",
            ),
            (
                "train.max_skipped_steps",
                c.train.max_skipped_steps > 0,
                "a step cannot be left out when some of its blocks are updated; set it to 0",
            ),
        ];
        for (key, wrong, reason) in wrong {
            if wrong {
                return refuse(key, &format!("with train.backward = per-layer {reason}"));
            }
        }
    } else if c.optimizer.block_clip > 0.0 {
        return refuse(
            "optimizer.block_clip",
            "it needs train.backward = per-layer; optimizer.clip is the global norm",
        );
    }
    if c.data.validation_fraction == 0.0 && c.data.validation.is_empty() {
        return refuse(
            "data.validation_fraction",
            "it must be above 0 unless data.validation names data to measure on",
        );
    }
    if !c.has_steps() && c.train.minutes == 0.0 {
        return refuse("train.steps", "the run has no end: set train.steps, train.epochs or train.minutes");
    }
    if !c.has_steps() && c.schedule.kind.needs_total() {
        return refuse(
            "schedule.kind",
            "it needs a known number of steps: set train.steps or train.epochs, or use `constant`",
        );
    }
    if !c.has_steps() && c.schedule.warmup_steps == 0 && c.schedule.warmup_fraction > 0.0 {
        return refuse(
            "schedule.warmup_fraction",
            "it needs a known number of steps: set train.steps or train.epochs, or schedule.warmup_steps",
        );
    }
    Ok(())
}
