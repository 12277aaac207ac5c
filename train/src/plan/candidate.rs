//! Variants of a run's settings.

use lowrank_models::BaseStorage;
use lowrank_optim::WeightStorage;

use super::Forecast;
use crate::config::{Config, Job, Layers};
use crate::engine::BackwardMode;

/// Settings of a run that may be changed to make it fit: those that were left unset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freedom {
    /// Parameterization of the linear layers.
    pub parameterization: bool,
    /// Storage of the weights, trained or below an adapter.
    pub storage: bool,
    /// Optimizer.
    pub optimizer: bool,
    /// Mode of the backward pass.
    pub backward: bool,
    /// Sequences in a batch, and the parts that it is computed in.
    pub batch: bool,
    /// Clipping of gradients.
    pub clip: bool,
    /// Kind of the schedule.
    pub schedule: bool,
    /// Tokens in a sequence.
    pub seq_len: bool,
    /// Any method of the registries and any storage may replace another one, not only those that a run chooses by itself.
    pub everything: bool,
}

impl Freedom {
    /// Finds the settings that the layers leave unset.
    pub fn of(layers: &Layers, job: Job) -> Self {
        let free = |key: &str| !layers.has(key);
        Self {
            parameterization: job == Job::Pretrain && free("model.parameterization.name"),
            storage: free("weights.storage") && free("weights.base"),
            optimizer: free("optimizer.name"),
            backward: free("train.backward"),
            batch: free("train.batch") && free("train.accumulation"),
            clip: free("optimizer.clip") && free("optimizer.block_clip") && free("train.max_skipped_steps"),
            schedule: free("schedule.kind"),
            seq_len: free("train.seq_len"),
            everything: false,
        }
    }
}

/// Candidate settings of a run.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Whole configuration.
    pub config: Config,
    /// Memory forecast.
    pub forecast: Forecast,
    /// Cost of its differences from the requested settings; 0 for none.
    pub cost: f64,
}

impl Candidate {
    /// Describes the candidate in the words of the settings.
    pub fn describe(&self) -> String {
        let Config { model, weights, train, .. } = &self.config;
        let mut text = String::new();
        if self.config.run.job == Job::Pretrain {
            text.push_str(&model.parameterization.name);
            if let Some(rank) = model.parameterization.options.get("rank") {
                text.push_str(&format!(" of rank {rank}"));
            }
            text.push_str(", ");
        }
        match (weights.storage, weights.base) {
            (WeightStorage::F32, BaseStorage::File) => {}
            (WeightStorage::F32, base) => text.push_str(&format!("{base} base, ")),
            (storage, _) => text.push_str(&format!("{storage} weights, ")),
        }
        text.push_str(&format!("{}, {} backward, batch {}", self.optimizer(), mode(train.backward), train.batch));
        if train.accumulation > 1 {
            text.push_str(&format!(" x {}", train.accumulation));
        }
        text
    }

    /// Name of the optimizer, with its rank if it is set.
    pub fn optimizer(&self) -> String {
        let optimizer = &self.config.optimizer;
        match optimizer.options.get("rank") {
            Some(rank) => format!("{} of rank {rank}", optimizer.name),
            None => optimizer.name.clone(),
        }
    }
}

/// Name of a mode, as in settings.
pub fn mode(backward: BackwardMode) -> &'static str {
    match backward {
        BackwardMode::Whole => "whole",
        BackwardMode::Checkpointed => "checkpointed",
        BackwardMode::PerLayer => "per-layer",
    }
}
