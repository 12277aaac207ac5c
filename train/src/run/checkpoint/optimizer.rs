//! Files with the states of optimizer and hooks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use burn::module::Module;
use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::tensor::Bytes;
use lowrank_optim::{Hooks, StateMeter, StateStore};

use super::CheckpointError;
use super::state_file::{Listing, Reader, Writer};

/// Name of the optimizer's files without extension.
const OPTIMIZER: &str = "optimizer";
/// Prefix of the names of a hook's files.
const HOOK: &str = "hook-";

/// Returns true if a file of this name holds state of optimizer or hooks rather than weights.
pub(super) fn is_state(name: &str) -> bool {
    name.starts_with(HOOK) || name.strip_prefix(OPTIMIZER).is_some_and(|end| end.starts_with('.'))
}

/// Files of a state: its tensors, and its counters.
fn files(dir: &Path, name: &str) -> [PathBuf; 2] {
    [dir.join(format!("{name}.safetensors")), dir.join(format!("{name}.bpk"))]
}

/// Files of an optimizer's state in a checkpoint: its tensors, and its counters.
pub(super) fn optimizer_files(checkpoint: &Path) -> [PathBuf; 2] {
    files(checkpoint, OPTIMIZER)
}

/// Writes the state of an optimizer that reports to this meter into a folder, one parameter after another, and returns
/// its number of tensors.
pub fn save_optimizer(optimizer: &ModuleOptimizer, meter: &StateMeter, dir: &Path) -> Result<usize, CheckpointError> {
    save(&|| optimizer.to_record(), meter, files(dir, OPTIMIZER))
}

/// Writes the states of hooks that report to this meter into a folder, and returns the number of tensors of each; hooks
/// without state have no files.
pub fn save_hooks<M: Module>(
    hooks: &Hooks<M>,
    meter: &StateMeter,
    dir: &Path,
) -> Result<BTreeMap<String, usize>, CheckpointError> {
    let mut saved = BTreeMap::new();
    for hook in hooks.iter() {
        let record = || hook.to_record();
        let (listing, kept) = through(meter, Listing::default(), record);
        if listing.len() + kept.len() == 0 {
            continue;
        }
        let files = files(dir, &format!("{HOOK}{}", hook.name()));
        if saved.contains_key(hook.name()) {
            let reason = format!("two hooks are named {}; rename one", hook.name());
            return Err(CheckpointError::Optimizer { path: files[0].clone(), reason });
        }
        saved.insert(hook.name().to_string(), save(&record, meter, files)?);
    }
    Ok(saved)
}

/// Bytes of the tensors in the states of an optimizer and of hooks that report to this meter.
pub fn state_bytes<M: Module>(optimizer: &ModuleOptimizer, hooks: &Hooks<M>, meter: &StateMeter) -> u64 {
    let (mut listing, _) = through(meter, Listing::default(), || optimizer.to_record());
    for hook in hooks.iter() {
        (listing, _) = through(meter, listing, || hook.to_record());
    }
    listing.bytes() as u64
}

fn save(
    record: &dyn Fn() -> OptimizerRecord,
    meter: &StateMeter,
    [tensors, counters]: [PathBuf; 2],
) -> Result<usize, CheckpointError> {
    let (listing, kept) = through(meter, Listing::default(), record);
    let count = listing.len() + kept.len();
    let writer = Writer::create(&tensors, listing).map_err(CheckpointError::io(&tensors))?;
    let (mut writer, kept) = through(meter, writer, record);
    writer.finish().map_err(CheckpointError::io(&tensors))?;
    let bytes = kept
        .into_bytes()
        .map_err(|error| CheckpointError::Optimizer { path: counters.clone(), reason: error.to_string() })?;
    std::fs::write(&counters, &bytes[..]).map_err(CheckpointError::io(&counters))?;
    Ok(count)
}

/// Loads the state in a folder into an optimizer that reports to this meter; returns an error unless as many tensors
/// are restored as were saved.
pub fn load_optimizer(
    optimizer: ModuleOptimizer,
    meter: &StateMeter,
    dir: &Path,
    tensors: usize,
) -> Result<ModuleOptimizer, CheckpointError> {
    let load = |record| optimizer.load_record(record);
    restore(meter, files(dir, OPTIMIZER), tensors, &Whole, load, |optimizer| optimizer.to_record())
}

/// Part of a state that a process restores.
pub(super) trait Selection {
    /// Counters and tensors of this process.
    fn select(&self, kept: OptimizerRecord) -> Result<OptimizerRecord, String>;

    /// Number of tensors that all processes have restored, of which this one has restored `own`.
    fn restored(&self, own: usize) -> usize;
}

/// All of a state.
struct Whole;

impl Selection for Whole {
    fn select(&self, kept: OptimizerRecord) -> Result<OptimizerRecord, String> {
        Ok(kept)
    }

    fn restored(&self, own: usize) -> usize {
        own
    }
}

/// Loads the states in a folder into hooks, like [`load_optimizer`]; `saved` is the number of tensors of each.
pub fn load_hooks<M: Module>(
    hooks: &mut Hooks<M>,
    meter: &StateMeter,
    dir: &Path,
    saved: &BTreeMap<String, usize>,
) -> Result<(), CheckpointError> {
    for (name, tensors) in saved {
        let files = files(dir, &format!("{HOOK}{name}"));
        let Some(hook) = hooks.iter_mut().find(|hook| hook.name() == name) else {
            let reason = format!("it is the state of {name}, which this run does not have");
            return Err(CheckpointError::Optimizer { path: files[0].clone(), reason });
        };
        let load = |record| {
            hook.load_record(record);
            hook
        };
        restore(meter, files, *tensors, &Whole, load, |hook| hook.to_record())?;
    }
    Ok(())
}

pub(super) fn restore<T>(
    meter: &StateMeter,
    [tensors, counters]: [PathBuf; 2],
    saved: usize,
    selection: &dyn Selection,
    load: impl FnOnce(OptimizerRecord) -> T,
    record: impl FnOnce(&T) -> OptimizerRecord,
) -> Result<T, CheckpointError> {
    let refuse = |path: &Path, reason: String| CheckpointError::Optimizer { path: path.to_path_buf(), reason };
    let bytes = std::fs::read(&counters).map_err(CheckpointError::io(&counters))?;
    let kept = OptimizerRecord::from_bytes(Bytes::from_bytes_vec(bytes))
        .map_err(|error| refuse(&counters, error.to_string()))?;
    let reader = Reader::open(&tensors)?;
    let held = reader.len() + kept.len();
    let kept = selection.select(kept).map_err(|reason| refuse(&counters, reason))?;
    let (mut reader, loaded) = through(meter, reader, || load(kept));
    reader.finish().map_err(CheckpointError::io(&tensors))?;
    let (listing, kept) = through(meter, Listing::default(), || record(&loaded));
    let restored = selection.restored(listing.len() + kept.len());
    match held == saved && restored == saved {
        true => Ok(loaded),
        false => Err(refuse(
            &tensors,
            format!("{saved} tensors of state were saved, the file holds {held}, and {restored} fit this run"),
        )),
    }
}

/// Runs `work` with the states passing through a store, and returns the store.
pub(super) fn through<S: StateStore + 'static, R>(meter: &StateMeter, store: S, work: impl FnOnce() -> R) -> (S, R) {
    let store = Arc::new(Mutex::new(store));
    let result = meter.through(store.clone(), work);
    match Arc::into_inner(store) {
        Some(store) => (store.into_inner().unwrap_or_else(PoisonError::into_inner), result),
        None => unreachable!("the meter has given the store back"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::ParamGroup;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams, SgdConfig};
    use burn::tensor::{Device, Tensor};

    fn step(layer: Linear, optimizer: &mut ModuleOptimizer) -> Linear {
        let device = Device::default().autodiff();
        let loss = layer.forward(Tensor::<2>::ones([2, 4], &device)).square().sum();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        optimizer.step(0.1, layer, grads)
    }

    #[test]
    fn restores_every_bit_and_refuses_another_optimizer() {
        let dir = tempfile::tempdir().unwrap();
        let mut layer = LinearConfig::new(4, 3).init(&Device::default().autodiff());
        let meter = StateMeter::new();
        // An optimizer that reports to the meter, and one whose tensors stay in the record.
        let watched = || {
            let adamw = AdamWConfig::new().build();
            ModuleOptimizer::from(adamw.clone()).with_group(ParamGroup::all(), meter.watch(adamw), None)
        };
        let kinds: [&dyn Fn() -> ModuleOptimizer; 2] = [&watched, &|| AdamWConfig::new().init()];
        for new in kinds {
            let mut optimizer = new();
            layer = step(layer, &mut optimizer);
            let tensors = save_optimizer(&optimizer, &meter, dir.path()).unwrap();
            assert_eq!(tensors, 4);
            let mut restored = load_optimizer(new(), &meter, dir.path(), tensors).unwrap();
            let (a, b) = (step(layer.clone(), &mut optimizer), step(layer.clone(), &mut restored));
            assert_eq!(a.weight.to_data(), b.weight.to_data());
            assert!(a.weight.to_data() != layer.weight.to_data());

            let error = load_optimizer(SgdConfig::new().init(), &meter, dir.path(), tensors).err().unwrap();
            assert!(error.to_string().contains("4 tensors"), "{error}");
            for path in files(dir.path(), "optimizer") {
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
                assert!(load_optimizer(new(), &meter, dir.path(), tensors).is_err(), "{}", path.display());
                std::fs::write(&path, &bytes).unwrap();
            }
        }
    }
}
