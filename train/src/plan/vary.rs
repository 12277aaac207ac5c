//! Changes of the settings of a run, each with the cost of what it gives up.

use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationSpec};
use lowrank_models::{BaseStorage, MatrixStorage};
use lowrank_optim::WeightStorage;
use lowrank_optim::registry::{METHODS, Method};

use super::Freedom;
use crate::config::{Config, Job, ScheduleSection};
use crate::engine::{BackwardMode, ScheduleKind};

/// Cost of each change, in order of preference: first changes that only cost time, then small changes of the optimizer,
/// then other clipping, then rounded weights, then another optimizer, then another model, and last fewer tokens per step.
const CHECKPOINTED: f64 = 1.0;
const SPLIT: f64 = 0.1;
const SMALLER_STATE: f64 = 2.0;
const PER_LAYER: f64 = 4.0;
const NARROW: f64 = 6.0;
const OTHER_OPTIMIZER: f64 = 7.5;
const SMALLER: f64 = 8.0;
const FEWER: f64 = 16.0;

/// All settings within the freedom, with their costs; the requested ones are the first.
pub(super) fn variations(config: &Config, freedom: Freedom, hidden_size: usize) -> Vec<(Config, f64)> {
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
    vary(freedom.parameterization, &|config| parameterizations(config, freedom, hidden_size));
    vary(freedom.storage, &|config| storages(config, freedom));
    vary(freedom.optimizer, &|config| optimizers(config, freedom));
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
    vary(freedom.batch, &batches);
    all
}

fn parameterizations(config: &Config, freedom: Freedom, hidden_size: usize) -> Vec<(Config, f64)> {
    let current = config.model.parameterization.name.as_str();
    let offered = |spec: &&ParameterizationSpec| match freedom.everything {
        true => spec.name != current,
        false => current == "dense" && spec.saves_memory.is_some(),
    };
    let with = |spec: &ParameterizationSpec| {
        let mut other = config.clone();
        let section = &mut other.model.parameterization;
        section.name = spec.name.into();
        if let Some(divisor) = spec.saves_memory.filter(|_| !section.options.contains_key("rank")) {
            section.options.insert("rank".into(), (hidden_size / divisor).max(1).into());
        }
        if freedom.schedule {
            let usual = ScheduleSection::default().kind;
            other.schedule.kind = if spec.period.is_some() { ScheduleKind::CosineRestarts } else { usual };
        }
        (other, SMALLER)
    };
    PARAMETERIZATIONS.iter().map(|entry| entry.spec()).filter(offered).map(with).collect()
}

fn storages(config: &Config, freedom: Freedom) -> Vec<(Config, f64)> {
    let adapted = config.run.job == Job::Finetune && config.adapter.name != "none";
    let trained = |storage: WeightStorage| {
        let mut other = config.clone();
        other.weights.storage = storage;
        // Storages by the bits that they keep: half of the cost of a change for each byte.
        let bytes = MatrixStorage::Trained(storage).bytes(1 << 20) + storage.correction_bytes(1 << 20);
        (other, NARROW + 0.5 * (3.0 - (bytes >> 20) as f64))
    };
    let frozen = |base: BaseStorage| {
        let mut other = config.clone();
        other.weights.base = base;
        let cost = match base {
            BaseStorage::File | BaseStorage::F32 => NARROW - 1.0,
            BaseStorage::Bf16 => NARROW - 0.5,
            BaseStorage::Int8 | BaseStorage::Q8_0 | BaseStorage::Blocks(_) => NARROW,
            BaseStorage::Nf4 => NARROW + 0.5,
        };
        (other, cost)
    };
    match (adapted, freedom.everything) {
        (true, false) => [BaseStorage::Int8, BaseStorage::Nf4].map(frozen).into(),
        (true, true) => {
            BaseStorage::CHOICES.into_iter().filter(|base| *base != config.weights.base).map(frozen).collect()
        }
        (false, false) => [WeightStorage::Bf16Plus8, WeightStorage::Bf16].map(trained).into(),
        (false, true) => {
            WeightStorage::ALL.into_iter().filter(|storage| *storage != config.weights.storage).map(trained).collect()
        }
    }
}

fn optimizers(config: &Config, freedom: Freedom) -> Vec<(Config, f64)> {
    let current = Some(config.optimizer.name.as_str());
    let offered = |method: &&Method| match freedom.everything {
        true => Some(method.name) != current,
        false => method.saves_state_of == current,
    };
    let with = |method: &Method| {
        let mut other = config.clone();
        other.optimizer.name = method.name.into();
        let state = if method.saves_state_of.is_some() { SMALLER_STATE } else { 0.0 };
        (other, if method.saves_state_of == current { SMALLER_STATE } else { OTHER_OPTIMIZER + state })
    };
    METHODS.iter().filter(offered).map(with).collect()
}

/// Batches of half the sequences, of a quarter and so on.
fn batches(config: &Config) -> Vec<(Config, f64)> {
    let halves = std::iter::successors(Some(config.train.batch), |batch| batch.is_multiple_of(2).then_some(batch / 2));
    let with = |(times, batch): (usize, usize)| {
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
    };
    halves.enumerate().skip(1).map(with).collect()
}
