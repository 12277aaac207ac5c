//! Fingerprints that show whether tensors have changed: a guard against mistakes, not against malice.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use lowrank_optim::{ModulePath, key_of};

use super::site::{SharedBytes, SharedTensors};
use super::stack::{Adapter, layer_of};
use lowrank_kernels::host::values as host;

/// Fingerprint of the base weights of some layers, independent of their adapters; the order of the layers does not
/// matter.
pub fn base_fingerprint<M: Module>(module: &M, layers: &BTreeSet<String>) -> u64 {
    struct Hash<'a> {
        path: ModulePath,
        layers: &'a BTreeSet<String>,
        sum: u64,
    }
    impl ModuleVisitor for Hash<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.path.joined();
            let layer = layer_of(&path);
            if D == 2 && self.layers.contains(layer) {
                self.sum = self.sum.wrapping_add(of_values(layer, &host(param.base().without_autodiff())));
            }
        }
    }
    let mut hash = Hash { path: ModulePath::default(), layers, sum: 0 };
    module.visit(&mut hash);
    hash.sum
}

/// Fingerprint of the tensors that the layers of an adapter share; none if they share nothing.
pub fn shared_fingerprint<'a>(layers: impl Iterator<Item = &'a Adapter>) -> Option<u64> {
    let shared: BTreeMap<String, SharedBytes> =
        layers.flat_map(|layer| layer.structure().shared()).map(|shared| (shared.key.clone(), shared)).collect();
    let numbers = shared.into_iter().map(|(field, shared)| of_values(&field, &host(shared.values)));
    numbers.reduce(u64::wrapping_add)
}

/// Same as [`shared_fingerprint`], for an adapter that was read without its model.
pub fn fingerprint_of_shared(shared: &SharedTensors) -> Option<u64> {
    let numbers = shared.made.iter().map(|(key, (_, tensor))| of_values(key, &host(tensor.clone())));
    numbers.reduce(u64::wrapping_add)
}

/// FNV-1a over 32-bit words, seeded with a name: changing any single value changes the result.
pub(crate) fn of_values(name: &str, values: &[f32]) -> u64 {
    values.iter().fold(key_of(name), |hash, value| {
        (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
    })
}
