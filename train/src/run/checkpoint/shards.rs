//! Files of an optimizer's state that is divided among processes: they are those of one process, written by the first, to
//! which the others send their tensors one after another.

use std::path::Path;

use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, TensorData};
use burn_pack::{Reader as Pack, Writer as PackWriter};
use lowrank_optim::{StateMeter, StateStore};

use super::CheckpointError;
use super::optimizer::{Selection, optimizer_files, restore, through};
use super::state_file::{Listing, Writer};
use crate::engine::Shards;
use crate::process::Peers;

/// Store of the tensors that belong to this process.
struct Own<S> {
    shards: Shards,
    store: S,
}

impl<S: StateStore> StateStore for Own<S> {
    fn put(&mut self, name: String, data: TensorData) {
        if is_own(&self.shards, &name) {
            self.store.put(name, data);
        }
    }

    fn get(&mut self, prefix: &str) -> Vec<(String, TensorData)> {
        self.store.get(prefix)
    }
}

/// Returns true if a field of a state belongs to this process: its name begins with the id of its parameter.
fn is_own(shards: &Shards, name: &str) -> bool {
    let id = name.split('.').next().and_then(|id| id.parse().ok());
    id.is_some_and(|id| shards.is_own(id))
}

/// Sends tensors to the first process.
struct Sender(Peers);

impl StateStore for Sender {
    fn put(&mut self, _name: String, data: TensorData) {
        self.0.send_to_first(data.as_bytes());
    }

    fn get(&mut self, _prefix: &str) -> Vec<(String, TensorData)> {
        Vec::new()
    }
}

/// Runs `work` with the states of this process passing through a store, and returns the store.
fn own<S: StateStore + 'static, R>(meter: &StateMeter, shards: &Shards, store: S, work: impl FnOnce() -> R) -> (S, R) {
    let (own, result) = through(meter, Own { shards: shards.clone(), store }, work);
    (own.store, result)
}

/// Joins the parts of records that are to be kept.
fn joined(records: Vec<Vec<u8>>, keep: &dyn Fn(&str) -> bool) -> Result<Bytes, String> {
    let (mut tensors, mut scalars, mut metadata) = (Vec::new(), Vec::new(), Vec::new());
    for bytes in records {
        let pack = Pack::from_bytes(Bytes::from_bytes_vec(bytes)).map_err(|error| error.to_string())?;
        scalars.extend(pack.scalars().clone());
        metadata.extend(pack.metadata().clone());
        let found = pack.into_tensors().map_err(|error| error.to_string())?;
        tensors.extend(found.into_iter().filter(|tensor| keep(&tensor.name)));
    }
    let mut writer = PackWriter::new(tensors);
    for (name, value) in scalars.into_iter().filter(|(name, _)| keep(name)) {
        writer = writer.with_scalar(&name, value);
    }
    for (name, path) in metadata.into_iter().filter(|(name, _)| keep(name)) {
        writer = writer.with_metadata(&name, &path);
    }
    writer.into_bytes().map_err(|error| error.to_string())
}

/// Part of a record that belongs to this process.
fn own_record(shards: &Shards, record: OptimizerRecord) -> Result<Bytes, String> {
    let bytes = record.into_bytes().map_err(|error| error.to_string())?;
    joined(vec![bytes.to_vec()], &|name| is_own(shards, name))
}

/// Writes the state of all processes into a folder, as the first of them, and returns its number of tensors; the others
/// call [`send_shard`].
pub(super) fn save_shards(
    optimizer: &ModuleOptimizer,
    meter: &StateMeter,
    shards: &Shards,
    dir: &Path,
) -> Result<usize, CheckpointError> {
    let [tensors, counters] = optimizer_files(dir);
    let (peers, record) = (shards.peers(), || optimizer.to_record());
    let refuse = |reason: String| CheckpointError::Optimizer { path: counters.clone(), reason };
    let (mut listing, kept) = own(meter, shards, Listing::default(), record);
    let mut kept = vec![own_record(shards, kept).map_err(refuse)?.to_vec()];
    let mut others = Vec::new();
    for rank in 1..peers.size() {
        let more: Listing = serde_json::from_slice(&peers.receive(rank)).map_err(|error| refuse(error.to_string()))?;
        listing.append(more.clone());
        kept.push(peers.receive(rank));
        others.push(more);
    }
    let kept = joined(kept, &|_| true).map_err(refuse)?;
    let record_of = OptimizerRecord::from_bytes(Bytes::from_bytes_vec(kept.to_vec()));
    let count = listing.len() + record_of.map_err(|error| refuse(error.to_string()))?.len();
    let writer = Writer::create(&tensors, listing).map_err(CheckpointError::io(&tensors))?;
    let (mut writer, _) = own(meter, shards, writer, record);
    for (listing, rank) in others.iter().zip(1..) {
        for (name, dtype, shape) in listing.entries() {
            writer.put(name.to_string(), TensorData::from_bytes_vec(peers.receive(rank), shape.to_vec(), dtype));
        }
    }
    writer.finish().map_err(CheckpointError::io(&tensors))?;
    std::fs::write(&counters, &kept[..]).map_err(CheckpointError::io(&counters))?;
    Ok(count)
}

/// Sends the state of this process to the first, which writes it in [`save_shards`].
pub(super) fn send_shard(
    optimizer: &ModuleOptimizer,
    meter: &StateMeter,
    shards: &Shards,
) -> Result<(), CheckpointError> {
    let (peers, record) = (shards.peers(), || optimizer.to_record());
    let refuse = |reason: String| CheckpointError::Optimizer { path: "optimizer".into(), reason };
    let (listing, kept) = own(meter, shards, Listing::default(), record);
    peers.send_to_first(&serde_json::to_vec(&listing).map_err(|error| refuse(error.to_string()))?);
    peers.send_to_first(&own_record(shards, kept).map_err(refuse)?);
    own(meter, shards, Sender(peers), record);
    Ok(())
}

/// Selects the part of this process.
impl Selection for Shards {
    fn select(&self, kept: OptimizerRecord) -> Result<OptimizerRecord, String> {
        OptimizerRecord::from_bytes(own_record(self, kept)?).map_err(|error| error.to_string())
    }

    fn restored(&self, own: usize) -> usize {
        let mut counts = [own as u64];
        self.peers().sum_counts(&mut counts);
        counts[0] as usize
    }
}

/// Loads the part of the state in a folder that belongs to this process; returns an error unless all processes together
/// restore as many tensors as were saved.
pub(super) fn load_shard(
    optimizer: ModuleOptimizer,
    meter: &StateMeter,
    shards: &Shards,
    dir: &Path,
    saved: usize,
) -> Result<ModuleOptimizer, CheckpointError> {
    let load = |record| optimizer.load_record(record);
    restore(meter, optimizer_files(dir), saved, shards, load, |optimizer| optimizer.to_record())
}
