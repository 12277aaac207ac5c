//! What the tests of structures share: one layer with an adapter on it, and comparisons.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_optim::thin_svd;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::attach::Attach;
use super::config::AdapterConfig;
use super::error::AdapterError;
use super::site::GivenTensors;
use super::stack::{Attached, each_adapter};
use crate::linear::Dense;
use crate::weights::{host, uniform_values};

/// Values between -1 and 1.
fn draws(count: usize, seed: u64) -> Vec<f32> {
    uniform_values(&mut StdRng::seed_from_u64(seed), count, 1.0)
}

/// A tensor of values between -1 and 1.
pub fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    Tensor::from_data(TensorData::new(draws(shape.iter().product(), seed), shape), &Device::default())
}

/// A layer with an adapter, tracked.
#[derive(Module, Debug)]
pub struct Bench {
    pub layer: Dense,
}

impl Bench {
    /// An adapter that begins by itself on a random layer `[d_in, d_out]` with bias.
    pub fn fresh(config: &AdapterConfig, shape: [usize; 2]) -> Result<Self, AdapterError> {
        Ok(Attach::new(config.clone()).factored().to(Self::bare(shape))?.0)
    }

    /// An adapter of these tensors, laid out as in files.
    pub fn of(config: &AdapterConfig, shape: [usize; 2], tensors: GivenTensors) -> Result<Self, AdapterError> {
        let tensors = BTreeMap::from([("layer".to_string(), tensors)]);
        Ok(Attach::new(config.clone()).with_tensors(tensors).factored().to(Self::bare(shape))?.0)
    }

    /// An adapter of random tensors with these names and shapes.
    pub fn given(config: &AdapterConfig, shape: [usize; 2], tensors: &[(impl ToString, Vec<usize>)]) -> Self {
        let tensors = tensors.iter().enumerate().map(|(seed, (name, shape))| {
            let values = draws(shape.iter().product(), 100 + seed as u64);
            (name.to_string(), TensorData::new(values, shape.clone()))
        });
        Self::of(config, shape, tensors.collect()).unwrap()
    }

    fn bare([d_in, d_out]: [usize; 2]) -> Self {
        let (weight, bias) = (random([d_in, d_out], 1), random([d_out], 2));
        Self { layer: Dense::from_parts(weight.autodiff(), Some(bias.autodiff())) }
    }

    /// The adapter.
    pub fn adapter(&self) -> Attached {
        let mut found = None;
        each_adapter(self, |_, adapter| found = adapter.stack.last().cloned());
        found.unwrap()
    }

    /// A tensor of the adapter, laid out as in files.
    pub fn tensor<const D: usize>(&self, field: &str) -> Tensor<D> {
        let tensors = self.adapter().tensors();
        let (_, data) = tensors.into_iter().find(|(tensor, _)| tensor.field == field).unwrap();
        Tensor::from_data(data, &Device::default())
    }

    /// The update `[d_in, d_out]`.
    pub fn update(&self) -> Tensor<2> {
        self.adapter().structure().update(&self.layer.weight.base()).inner()
    }

    /// The output less that of the base.
    pub fn branch(&self, x: Tensor<2>) -> Tensor<2> {
        self.layer.forward(x.clone().autodiff()).inner() - self.base(x)
    }

    /// The output of the base.
    pub fn base(&self, x: Tensor<2>) -> Tensor<2> {
        let adapter = self.adapter();
        adapter.control().switch(false);
        let y = self.layer.forward(x.autodiff()).inner();
        adapter.control().switch(true);
        y
    }

    /// Gradients of the trained tensors under a random weighting of the outputs for a random input: which are not zero.
    pub fn moved(&self) -> BTreeMap<String, bool> {
        struct Slopes<'a>(&'a burn::tensor::Gradients, BTreeMap<burn::module::ParamId, bool>);
        impl burn::module::ModuleVisitor for Slopes<'_> {
            fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
                let slope = param.val().grad(self.0);
                let moved = slope.is_some_and(|slope| host(slope).iter().any(|value| *value != 0.0));
                self.1.insert(param.id, moved);
            }
        }
        let [d_in, d_out] = self.layer.weight.base().dims();
        let y = self.layer.forward(random([5, d_in], 3).autodiff()) * random([5, d_out], 4).autodiff();
        let grads = y.sum().backward();
        let mut slopes = Slopes(&grads, BTreeMap::new());
        let adapter = self.adapter();
        adapter.visit(&mut slopes);
        let trained = adapter.shapes().into_iter().filter(|tensor| tensor.role != super::TensorRole::Frozen);
        trained.map(|tensor| (tensor.field, slopes.1[&tensor.id])).collect()
    }
}

/// Equal within a share of the largest value.
#[track_caller]
pub fn near<const D: usize>(ours: Tensor<D>, expected: Tensor<D>, share: f32) {
    assert_eq!(ours.dims(), expected.dims());
    let (ours, expected) = (host(ours), host(expected));
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    for (place, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
        assert!((ours - expected).abs() <= share * largest, "{place}: {ours} instead of {expected} ({largest})");
    }
}

/// Frobenius norm.
pub fn norm<const D: usize>(x: Tensor<D>) -> f64 {
    host(x).iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

/// Number of singular values above 1e-5 of the largest.
pub fn rank(matrix: &Tensor<2>) -> usize {
    let [rows, columns] = matrix.dims();
    let values = thin_svd(matrix, rows.min(columns)).values;
    let largest = values.iter().cloned().fold(0.0, f64::max);
    values.iter().filter(|value| **value > 1e-5 * largest).count()
}
