//! Search for the smallest change of settings that makes a run fit.

use lowrank_models::BaseStorage;
use lowrank_models::linear::PARAMETERIZATIONS;
use lowrank_optim::WeightStorage;
use lowrank_optim::registry::{METHODS, Method};

use super::Forecast;
use crate::build::BuildError;
use crate::config::{Config, Job, Layers, bytes, parse_bytes};
use crate::engine::BackwardMode;
use crate::process::{MemoryUse, free_memory};

/// Settings of a run that may be changed to make it fit: those that were left unset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freedom {
    parameterization: bool,
    storage: bool,
    optimizer: bool,
    backward: bool,
    batch: bool,
    clip: bool,
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
        let Config { model, weights, optimizer, train, .. } = &self.config;
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
        text.push_str(&format!("{}, {} backward, batch {}", optimizer.name, mode(train.backward), train.batch));
        if train.accumulation > 1 {
            text.push_str(&format!(" x {}", train.accumulation));
        }
        text
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

/// Cost of each change, in order of preference: first changes that only cost time, then small changes of the optimizer,
/// then other clipping, then rounded weights, then another model, and last fewer tokens per step.
const CHECKPOINTED: f64 = 1.0;
const SPLIT: f64 = 0.1;
const SMALLER_STATE: f64 = 2.0;
const PER_LAYER: f64 = 4.0;
const NARROW: f64 = 6.0;
const SMALLER: f64 = 8.0;
const FEWER: f64 = 16.0;

/// All candidates within the freedom, cheapest first. Rejected ones are left out; if all are, the first rejection is
/// returned.
pub fn candidates(
    config: &Config,
    freedom: Freedom,
    hidden_size: usize,
    forecast: &dyn Fn(&Config) -> Result<Forecast, BuildError>,
) -> Result<Vec<Candidate>, BuildError> {
    let (mut found, mut refused) = (Vec::new(), None);
    for (config, cost) in variations(config, freedom, hidden_size) {
        match forecast(&config) {
            Ok(forecast) => found.push(Candidate { config, forecast, cost }),
            Err(error) => drop(refused.get_or_insert(error)),
        }
    }
    found.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.forecast.peak.cmp(&b.forecast.peak)));
    match (found.is_empty(), refused) {
        (true, Some(error)) => Err(error),
        _ => Ok(found),
    }
}

fn variations(config: &Config, freedom: Freedom, hidden_size: usize) -> Vec<(Config, f64)> {
    let mut all = vec![(config.clone(), 0.0)];
    let mut vary = |free: bool, more: &dyn Fn(&Config) -> Vec<(Config, f64)>| {
        if free {
            let varied: Vec<_> = all
                .iter()
                .flat_map(|(config, cost)| more(config).into_iter().map(move |(config, more)| (config, cost + more)))
                .collect();
            all.extend(varied);
        }
    };
    vary(freedom.parameterization && config.model.parameterization.name == "dense", &|config| {
        let offered =
            PARAMETERIZATIONS.iter().filter_map(|entry| Some((entry.spec().name, entry.spec().saves_memory?)));
        let with = |(name, divisor): (&str, usize)| {
            let mut smaller = config.clone();
            smaller.model.parameterization.name = name.into();
            smaller.model.parameterization.options.insert("rank".into(), (hidden_size / divisor).max(1).into());
            (smaller, SMALLER)
        };
        offered.map(with).collect()
    });
    vary(freedom.storage, &|config| {
        let adapted = config.run.job == Job::Finetune && config.adapter.name != "none";
        let trained = |storage: WeightStorage| {
            let mut narrow = config.clone();
            narrow.weights.storage = storage;
            narrow
        };
        let frozen = |base: BaseStorage| {
            let mut narrow = config.clone();
            narrow.weights.base = base;
            narrow
        };
        match adapted {
            true => vec![(frozen(BaseStorage::Int8), NARROW), (frozen(BaseStorage::Nf4), NARROW + 0.5)],
            false => vec![(trained(WeightStorage::Bf16Plus8), NARROW), (trained(WeightStorage::Bf16), NARROW + 0.5)],
        }
    });
    vary(freedom.optimizer, &|config| {
        let smaller = METHODS.iter().filter(|method| method.saves_state_of == Some(config.optimizer.name.as_str()));
        let with = |method: &Method| {
            let mut small = config.clone();
            small.optimizer.name = method.name.into();
            (small, SMALLER_STATE)
        };
        smaller.map(with).collect()
    });
    let whole = freedom.backward && config.train.backward == BackwardMode::Whole;
    vary(whole, &|config| {
        let mut checkpointed = config.clone();
        checkpointed.train.backward = BackwardMode::Checkpointed;
        let mut ways = vec![(checkpointed, CHECKPOINTED)];
        if config.train.accumulation == 1 && freedom.clip {
            let mut layered = config.clone();
            layered.train.backward = BackwardMode::PerLayer;
            layered.optimizer.block_clip = std::mem::take(&mut layered.optimizer.clip);
            layered.train.max_skipped_steps = 0;
            ways.push((layered, PER_LAYER));
        }
        ways
    });
    vary(freedom.batch, &|config| {
        let halves =
            std::iter::successors(Some(config.train.batch), |batch| batch.is_multiple_of(2).then_some(batch / 2));
        halves
            .enumerate()
            .skip(1)
            .map(|(times, batch)| {
                let mut split = config.clone();
                split.train.batch = batch;
                // Blocks that are updated at once cannot wait for further micro-batches.
                match config.train.backward {
                    BackwardMode::PerLayer => (split, FEWER * times as f64),
                    _ => {
                        split.train.accumulation *= 1 << times;
                        (split, SPLIT * times as f64)
                    }
                }
            })
            .collect()
    });
    all
}

/// Cheapest candidate that fits `train.memory`, or the reason why there is none.
pub fn choose(
    config: &Config,
    freedom: Freedom,
    hidden_size: usize,
    forecast: &dyn Fn(&Config) -> Result<Forecast, BuildError>,
) -> Result<Candidate, BuildError> {
    let limit = limit(config)?.unwrap_or(u64::MAX);
    let mut found = candidates(config, freedom, hidden_size, forecast)?;
    if let Some(place) = found.iter().position(|candidate| candidate.forecast.peak <= limit) {
        return Ok(found.swap_remove(place));
    }
    let Some(smallest) = found.iter().min_by_key(|candidate| candidate.forecast.peak) else {
        unreachable!("the configuration itself is a candidate or was refused");
    };
    let Forecast { weights, gradients, state, activations, peak, .. } = smallest.forecast;
    let cure = match weights > limit {
        true => "the weights alone are larger; take a smaller model",
        false => "raise it, shorten train.seq_len, lower model.parameterization.options.rank, or take a smaller model",
    };
    Err(BuildError::Settings(format!(
        "train.memory = {}: nothing fits. The least is {} with {}: weights {}, gradients {}, optimizer state {}, activations {}; {cure}",
        bytes(limit),
        bytes(peak),
        smallest.describe(),
        bytes(weights),
        bytes(gradients),
        bytes(state),
        bytes(activations)
    )))
}

/// Value of `train.memory` that asks for what is free.
const FREE: &str = "auto";

/// Bytes of `train.memory`; none if there is no limit.
pub fn limit(config: &Config) -> Result<Option<u64>, BuildError> {
    let text = config.train.memory.as_str();
    match (text, parse_bytes(text)) {
        ("", _) => Ok(None),
        // What this process has taken already is part of its limit.
        (FREE, _) => Ok(Some(free_memory().saturating_add(MemoryUse::now().rss))),
        (_, Some(limit)) => Ok(Some(limit)),
        _ => Err(BuildError::Settings(format!(
            "train.memory = \"{text}\": write it as a number with a unit, such as 8GiB or 900MB, or auto for what is free"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(settings: &[&str]) -> (Config, Freedom) {
        let mut layers = Layers::default();
        settings.iter().for_each(|setting| layers.set(setting).unwrap());
        (layers.resolve(&Config::of(Job::Pretrain)).unwrap(), Freedom::of(&layers, Job::Pretrain))
    }

    /// Forecast in which every change saves memory.
    fn shrinking(config: &Config) -> Result<Forecast, BuildError> {
        let mut peak = 1000.0;
        for (saves, share) in [
            (config.model.parameterization.name == "sltrain", 0.5),
            (config.optimizer.name == "adamw-8bit", 0.8),
            (config.train.backward == BackwardMode::Checkpointed, 0.8),
            (config.train.backward == BackwardMode::PerLayer, 0.7),
            (config.train.batch < 4, 0.9),
        ] {
            peak *= if saves { share } else { 1.0 };
        }
        Ok(Forecast { weights: 100, gradients: 0, trained: 0, state: 0, activations: 0, peak: peak as u64 })
    }

    #[test]
    fn the_least_change_that_fits_is_taken() {
        let message = |memory: &str, settings: &[&str]| {
            let memory = format!("train.memory={memory}");
            let (config, freedom) = free(&[&[memory.as_str()], settings].concat());
            choose(&config, freedom, 64, &shrinking).map(|candidate| candidate.describe())
        };
        assert_eq!(message("1000B", &[]).unwrap(), "dense, adamw, whole backward, batch 4");
        assert_eq!(message("900B", &[]).unwrap(), "dense, adamw, whole backward, batch 2 x 2");
        assert_eq!(message("800B", &[]).unwrap(), "dense, adamw, checkpointed backward, batch 4");
        assert_eq!(message("600B", &[]).unwrap(), "dense, adamw-8bit, checkpointed backward, batch 2 x 2");
        assert_eq!(message("500B", &[]).unwrap(), "sltrain of rank 16, adamw, whole backward, batch 4");
        assert_eq!(message("280B", &[]).unwrap(), "sltrain of rank 16, adamw-8bit, per-layer backward, batch 4");
        assert_eq!(message("260B", &[]).unwrap(), "sltrain of rank 16, adamw-8bit, per-layer backward, batch 2");

        // Requested settings are kept.
        assert_eq!(message("800B", &["train.batch=4"]).unwrap(), "dense, adamw, checkpointed backward, batch 4");
        assert_eq!(message("800B", &["train.backward=whole"]).unwrap(), "dense, adamw-8bit, whole backward, batch 4");
        let clipped = message("700B", &["optimizer.clip=0.5", "optimizer.name=adamw", "train.batch=4"]).unwrap();
        assert_eq!(clipped, "sltrain of rank 16, adamw, whole backward, batch 4");

        let refused = message("200B", &[]).unwrap_err().to_string();
        for part in ["200 B", "252 B", "weights 100 B", "per-layer", "train.seq_len"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        assert!(message("50B", &[]).unwrap_err().to_string().contains("the weights alone"));
    }

    #[test]
    fn clipping_goes_with_blocks_that_are_updated_at_once() {
        let (config, freedom) = free(&["train.memory=280B"]);
        let chosen = choose(&config, freedom, 64, &shrinking).unwrap().config;
        assert_eq!((chosen.optimizer.clip, chosen.optimizer.block_clip), (0.0, 1.0));
        assert_eq!(chosen.model.parameterization.options["rank"], 16);
        assert_eq!(chosen.train.accumulation, 1);
    }
}
