//! Check that an update changed every trainable tensor.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use lowrank_kernels::narrow::packed::memory;
use lowrank_optim::ModulePath;

use super::TrainError;

/// Hashes of all trainable tensors, which take negligible memory.
pub(super) struct Fingerprints(BTreeMap<String, u64>);

impl Fingerprints {
    pub fn of<M: Module>(model: &M) -> Self {
        let mut visitor = Hasher::default();
        model.visit(&mut visitor);
        Self(visitor.hashes)
    }

    /// Removes tensors frozen in this step, and those whose gradient is zero everywhere: the first factor of a product
    /// whose second one starts at zero has such a gradient and correctly does not change.
    pub fn excuse<M: Module>(&mut self, model: &M, grads: &GradientsParams, resting: &[ParamId]) {
        let mut visitor = Quiet { grads, resting, path: ModulePath::default(), fingerprints: self };
        model.visit(&mut visitor);
    }

    /// Returns an error if a tensor has the same bits as at the time of `self`.
    pub fn refuse_unmoved<M: Module>(&self, model: &M) -> Result<(), TrainError> {
        let now = Self::of(model).0;
        let unmoved: Vec<&str> =
            self.0.iter().filter(|(path, hash)| now.get(*path) == Some(hash)).map(|(path, _)| path.as_str()).collect();
        if unmoved.is_empty() {
            return Ok(());
        }
        let names = unmoved.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        Err(TrainError::NotMoved { count: unmoved.len(), names })
    }
}

#[derive(Default)]
struct Hasher {
    path: ModulePath,
    hashes: BTreeMap<String, u64>,
}

impl ModuleVisitor for Hasher {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        let value = param.val().inner();
        // Small steps of bf16 may all lie below half a place, and a factor of rank 0 has nothing that moves.
        if value.dtype() == DType::BF16 || value.shape().num_elements() == 0 {
            return;
        }
        let data = memory(value);
        let words = data.as_bytes().chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        });
        let hash = words.fold(0xcbf2_9ce4_8422_2325, |hash: u64, word| {
            (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        });
        self.hashes.insert(self.path.joined(), hash);
    }
}

struct Quiet<'a> {
    grads: &'a GradientsParams,
    resting: &'a [ParamId],
    path: ModulePath,
    fingerprints: &'a mut Fingerprints,
}

impl ModuleVisitor for Quiet<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let zero = |grad: Tensor<D>| !grad.not_equal_elem(0.0).any().into_scalar::<bool>();
        if self.resting.contains(&param.id) || self.grads.get::<D>(param.id).is_some_and(zero) {
            self.fingerprints.0.remove(&self.path.joined());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    #[test]
    fn tensors_that_stay_are_named_and_frozen_ones_do_not_count() {
        let layer = LinearConfig::new(3, 2).init(&Device::default().autodiff());
        let before = Fingerprints::of(&layer);
        let message = before.refuse_unmoved(&layer).unwrap_err().to_string();
        assert!(message.contains("2 trainable tensors") && message.contains("bias"), "{message}");
        let moved = |layer: &Linear| Linear {
            weight: layer.weight.clone().map(|weight| weight + 1e-6),
            bias: layer.bias.clone(),
        };
        let message = before.refuse_unmoved(&moved(&layer)).unwrap_err().to_string();
        assert!(message.contains("1 trainable tensors") && message.contains("bias"), "{message}");
        let mut zero = GradientsParams::new();
        zero.register(layer.weight.id, Tensor::<2>::zeros([3, 2], &Device::default()));
        let mut excused = Fingerprints::of(&layer);
        excused.excuse(&layer, &zero, &[]);
        let message = excused.refuse_unmoved(&layer).unwrap_err().to_string();
        assert!(message.contains("1 trainable tensors") && message.contains("bias"), "{message}");
        excused.excuse(&layer, &GradientsParams::new(), &[layer.bias.as_ref().unwrap().id]);
        excused.refuse_unmoved(&layer).unwrap();
        let frozen = layer.no_grad();
        Fingerprints::of(&frozen).refuse_unmoved(&frozen).unwrap();
    }
}
