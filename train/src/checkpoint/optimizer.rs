//! The states of optimizer and training rule in files.

use std::path::Path;

use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::tensor::Bytes;

use lowrank_models::adapter::GradientRule;

use super::CheckpointError;

/// Name of the optimizer's file.
const NAME: &str = "optimizer.bpk";
/// Name of the rule's file.
const RULE: &str = "rule.bpk";

/// Writes the optimizer's state into a folder and tells how many tensors it has.
pub fn save_optimizer(optimizer: &ModuleOptimizer, dir: &Path) -> Result<usize, CheckpointError> {
    save(optimizer.to_record(), &dir.join(NAME))
}

/// Writes the rule's state into a folder and tells how many tensors it has.
pub fn save_rule(rule: &GradientRule, dir: &Path) -> Result<usize, CheckpointError> {
    save(rule.to_record(), &dir.join(RULE))
}

fn save(record: OptimizerRecord, path: &Path) -> Result<usize, CheckpointError> {
    let tensors = record.len();
    let bytes = record
        .into_bytes()
        .map_err(|error| CheckpointError::Optimizer { path: path.to_path_buf(), reason: error.to_string() })?;
    std::fs::write(path, &bytes[..]).map_err(CheckpointError::io(path))?;
    Ok(tensors)
}

/// Gives an optimizer the state of a folder, and refuses one that does not restore as many tensors as were saved.
pub fn load_optimizer(
    optimizer: ModuleOptimizer,
    dir: &Path,
    tensors: usize,
) -> Result<ModuleOptimizer, CheckpointError> {
    let path = dir.join(NAME);
    let record = load(&path)?;
    let held = record.len();
    let optimizer = optimizer.load_record(record);
    check(&path, [tensors, held, optimizer.to_record().len()])?;
    Ok(optimizer)
}

/// Gives a rule the state of a folder, as [`load_optimizer`].
pub fn load_rule(rule: &GradientRule, dir: &Path, tensors: usize) -> Result<(), CheckpointError> {
    let path = dir.join(RULE);
    let record = load(&path)?;
    let held = record.len();
    rule.load_record(record);
    check(&path, [tensors, held, rule.to_record().len()])
}

/// Read at once: a record that reads later would see what the file has become by then.
fn load(path: &Path) -> Result<OptimizerRecord, CheckpointError> {
    let bytes = std::fs::read(path).map_err(CheckpointError::io(path))?;
    OptimizerRecord::from_bytes(Bytes::from_bytes_vec(bytes))
        .map_err(|error| CheckpointError::Optimizer { path: path.to_path_buf(), reason: error.to_string() })
}

fn check(path: &Path, [saved, held, restored]: [usize; 3]) -> Result<(), CheckpointError> {
    match held == saved && restored == saved {
        true => Ok(()),
        false => Err(CheckpointError::Optimizer {
            path: path.to_path_buf(),
            reason: format!("{saved} tensors of state were saved, the file holds {held}, and {restored} fit this run"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let mut optimizer = AdamWConfig::new().init();
        layer = step(layer, &mut optimizer);
        let tensors = save_optimizer(&optimizer, dir.path()).unwrap();
        assert_eq!(tensors, 4);
        let mut restored = load_optimizer(AdamWConfig::new().init(), dir.path(), tensors).unwrap();
        let (a, b) = (step(layer.clone(), &mut optimizer), step(layer, &mut restored));
        assert_eq!(a.weight.to_data(), b.weight.to_data());

        let error = load_optimizer(SgdConfig::new().init(), dir.path(), tensors).err().unwrap();
        assert!(error.to_string().contains("4 tensors"), "{error}");
        let path = dir.path().join(NAME);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(load_optimizer(AdamWConfig::new().init(), dir.path(), tensors).is_err());
    }
}
