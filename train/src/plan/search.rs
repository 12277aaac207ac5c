//! Search for the smallest change of settings that makes a run fit.

use std::collections::BTreeMap;

use lowrank_models::LlamaConfig;

use super::vary::variations;
use super::{Candidate, Forecast, Freedom};
use crate::build::{self, BuildError};
use crate::config::{Config, bytes, parse_bytes};
use crate::process::{MemoryUse, free_memory};

/// Result of a search.
pub struct Found {
    /// Candidates, cheapest first, and those of the same cost by their memory.
    pub candidates: Vec<Candidate>,
    /// Number of combinations of settings that a run would reject.
    pub rejected: usize,
}

/// All candidates within the freedom that are `admitted`. Combinations that a run would reject are left out and counted; if nothing else
/// is left, the first rejection is returned.
pub fn candidates(
    config: &Config,
    freedom: Freedom,
    shape: &LlamaConfig,
    admitted: &dyn Fn(&Config) -> bool,
    forecast: &dyn Fn(&Config) -> Result<Forecast, BuildError>,
) -> Result<Found, BuildError> {
    let (mut found, mut refused, mut rejected) = (Vec::new(), None, 0);
    let mut varied = variations(config, freedom, shape.hidden_size);
    varied.retain(|(config, _)| admitted(config));
    for (mut config, cost) in varied {
        let complete = build::set_usual_layer_rank(&mut config.model, shape);
        build::usual_rank(&mut config, shape.hidden_size);
        match complete.and_then(|_| forecast(&config)) {
            Ok(forecast) => found.push(Candidate { config, forecast, cost }),
            Err(error) => {
                rejected += 1;
                refused.get_or_insert(error);
            }
        }
    }
    found.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.forecast.peak.cmp(&b.forecast.peak)));
    match (found.is_empty(), refused) {
        (true, Some(error)) => Err(error),
        _ => Ok(Found { candidates: found, rejected }),
    }
}

/// Candidates that need less memory than all cheaper ones of the same group.
pub fn savings<G: Ord>(candidates: Vec<Candidate>, group: impl Fn(&Config) -> G) -> Vec<Candidate> {
    let mut least = BTreeMap::new();
    let mut saves = |candidate: &Candidate| {
        let peak = candidate.forecast.peak;
        let least = least.entry(group(&candidate.config)).or_insert(u64::MAX);
        let saves = peak < *least;
        *least = peak.min(*least);
        saves
    };
    candidates.into_iter().filter(|candidate| saves(candidate)).collect()
}

/// Cheapest candidate that fits `train.memory`, or the reason why there is none.
pub fn choose(
    config: &Config,
    freedom: Freedom,
    shape: &LlamaConfig,
    forecast: &dyn Fn(&Config) -> Result<Forecast, BuildError>,
) -> Result<Candidate, BuildError> {
    let limit = limit(config)?.unwrap_or(u64::MAX);
    let mut found = candidates(config, freedom, shape, &|_| true, forecast)?.candidates;
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
    use crate::config::{Job, Layers};
    use crate::engine::BackwardMode;

    fn shape() -> LlamaConfig {
        LlamaConfig { hidden_size: 64, ..LlamaConfig::named("llama-9m", 100).unwrap() }
    }

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
            choose(&config, freedom, &shape(), &shrinking).map(|candidate| candidate.describe())
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
        let chosen = choose(&config, freedom, &shape(), &shrinking).unwrap().config;
        assert_eq!((chosen.optimizer.clip, chosen.optimizer.block_clip), (0.0, 1.0));
        assert_eq!(chosen.model.parameterization.options["rank"], 16);
        assert_eq!(chosen.train.accumulation, 1);
    }
}
