//! Start of a run by several processes: they must be alike.

use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};
use lowrank_kernels::instructions::instruction_set;
use sha2::{Digest, Sha256};

use super::checkpoint::StageRecord;
use super::resume::{self, Bases};
use super::{RunError, RunFolder};
use crate::build::BuildError;
use crate::config::Config;
use crate::objective::Stream;
use crate::process::Peers;

/// Folder that the first process opens, and that the others follow.
pub(super) fn place_of_first(
    peers: Peers,
    open: impl FnOnce() -> Result<RunFolder, RunError>,
) -> Result<RunFolder, RunError> {
    match peers.is_first() {
        true => {
            let folder = open()?;
            peers.of_first(&folder.path().to_string_lossy());
            Ok(folder)
        }
        false => Ok(RunFolder::follow(Path::new(&peers.of_first("")))),
    }
}

/// Rejects processes that would not train the same model in the same way, and data too small for all of them.
pub(super) fn refuse_different<M: Module, B>(
    peers: Peers,
    config: &Config,
    records: &[StageRecord],
    bases: &Bases,
    model: &M,
    rows: &dyn Stream<B>,
) -> Result<(), RunError> {
    if peers.is_alone() {
        return Ok(());
    }
    let compared = [
        ("version of lowrank", hash(env!("CARGO_PKG_VERSION"))),
        ("instruction set (LOWRANK_SIMD sets it)", hash(instruction_set().name())),
        ("configuration", hash(&settings(config))),
        ("length of the run", hash(&format!("{} {:?} {:?}", config.train.minutes, steps(records), intervals(config)))),
        ("data (data.path)", hash(&format!("{:?}", records))),
        ("base model or adapter (model.name, adapter.name)", hash(&format!("{bases:?}"))),
        ("weights", hash_of_weights(model)),
    ];
    let hashes = compared.iter().map(|(_, hash)| *hash).collect::<Vec<_>>();
    let all = peers.all(&hashes);
    let lines: Vec<String> = all
        .iter()
        .enumerate()
        .filter_map(|(rank, hashes)| {
            let other = compared.iter().enumerate().filter(|(at, _)| hashes[*at] != all[0][*at]);
            let names: Vec<&str> = other.map(|(_, (name, _))| *name).collect();
            (!names.is_empty()).then(|| format!("  rank {rank}: another {}", names.join(", another ")))
        })
        .collect();
    if !lines.is_empty() {
        return Err(RunError::OtherPeers { differences: lines.join("\n") });
    }
    let (batch, there) = (config.train.batch as u64, rows.rows());
    let wanted = batch * peers.size() as u64;
    if there < wanted {
        return Err(BuildError::Settings(format!(
            "train.batch = {batch}: {} processes with {batch} rows each need {wanted} rows, and the data has {there}; start fewer processes, or lower train.batch",
            peers.size()
        ))
        .into());
    }
    Ok(())
}

/// Settings that all processes share.
fn settings(config: &Config) -> String {
    format!("{:?} {} {}", resume::settings(config), config.train.max_skipped_steps, config.train.shard_state)
}

/// Intervals of work that all processes do together.
fn intervals(config: &Config) -> [u64; 3] {
    [config.eval.every, config.eval.batches as u64, config.checkpoint.every]
}

fn steps(records: &[StageRecord]) -> Vec<Option<u64>> {
    records.iter().map(|record| record.steps).collect()
}

fn hash(text: &str) -> u64 {
    first_bytes(Sha256::new_with_prefix(text))
}

fn hash_of_weights<M: Module>(model: &M) -> u64 {
    let mut visitor = Weights(Sha256::new());
    model.visit(&mut visitor);
    first_bytes(visitor.0)
}

fn first_bytes(hasher: Sha256) -> u64 {
    hasher.finalize().iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}

struct Weights(Sha256);

impl ModuleVisitor for Weights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.update(&param.val().into_data().bytes()[..]);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.0.update(&param.val().into_data().bytes()[..]);
    }
}
