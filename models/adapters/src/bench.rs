//! A single layer with an adapter, for property tests of structures.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_optim::{AdamWConfig, thin_svd};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::{Adapter, AdapterConfig, AdapterStack, Attach, GivenTensors, PenaltyAt, each_adapter, penalty};
use lowrank_kernels::host::values as host;
use lowrank_kernels::random::uniform_values;

/// A linear layer that runs its adapters factored.
#[derive(Module, Debug)]
pub struct Dense {
    pub weight: Param<Tensor<2>>,
    pub bias: Option<Param<Tensor<1>>>,
}

impl Dense {
    pub fn from_parts(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self { weight: Param::from_tensor(weight), bias: bias.map(Param::from_tensor) }
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        AdapterStack::linear(&self.weight, self.bias.as_ref().map(Param::val), x)
    }
}

/// A layer, bare or with an adapter.
#[derive(Module, Debug)]
pub struct Bench {
    layer: Dense,
}

/// Tensors of an adapter by field, laid out as in files: values and shape.
pub type Tensors = BTreeMap<String, (Vec<f32>, Vec<usize>)>;

fn values(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|i| ((i * i + i) as f32 * step).sin()).collect()
}

/// A matrix of fixed values without structure.
pub fn matrix(rows: usize, columns: usize, step: f32) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values(rows * columns, step), [rows, columns]), &Device::default())
}

/// A tensor of fixed values that differ by the seed.
pub fn random<const D: usize>(shape: [usize; D], seed: usize) -> Tensor<D> {
    let values = values(shape.iter().product(), 0.23 + 0.17 * seed as f32);
    Tensor::from_data(TensorData::new(values, shape), &Device::default())
}

/// A tracked matrix of fixed values that differ by the seed.
pub fn wave(shape: [usize; 2], seed: usize) -> Tensor<2> {
    random(shape, seed).autodiff()
}

/// The largest magnitude.
pub fn largest(x: Tensor<2>) -> f32 {
    x.inner().abs().max().into_scalar()
}

/// Returns true if two tensors differ by at most this fraction of the largest value.
pub fn close<const D: usize>(ours: Tensor<D>, expected: Tensor<D>, share: f32) -> bool {
    furthest(ours, expected, share).is_none()
}

/// Reports where two tensors differ by more than this fraction of the largest value.
#[track_caller]
pub fn near<const D: usize>(ours: Tensor<D>, expected: Tensor<D>, share: f32) {
    if let Some(message) = furthest(ours, expected, share) {
        panic!("{message}");
    }
}

fn furthest<const D: usize>(ours: Tensor<D>, expected: Tensor<D>, share: f32) -> Option<String> {
    assert_eq!(ours.dims(), expected.dims());
    let (ours, expected) = (host(ours.inner()), host(expected.inner()));
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    let is_near = |place: usize| (ours[place] - expected[place]).abs() <= share * largest;
    let place = (0..ours.len()).find(|place| !is_near(*place))?;
    Some(format!("{place}: {} instead of {} ({largest})", ours[place], expected[place]))
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

impl Bench {
    /// Creates a bare layer of fixed values.
    pub fn new(d_in: usize, d_out: usize, bias: bool) -> Self {
        let bias = bias.then(|| Tensor::from_data(TensorData::new(values(d_out, 0.7), [d_out]), &Device::default()));
        Self::of(matrix(d_in, d_out, 0.37), bias)
    }

    /// Creates a bare layer with this weight `[d_in, d_out]`.
    pub fn of(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self { layer: Dense::from_parts(weight.autodiff(), bias.map(Tensor::autodiff)) }
    }

    /// Attaches an adapter as `attach` specifies.
    pub fn attach(&self, attach: Attach) -> Result<Self, String> {
        attach.factored().to(self.clone()).map(|(bench, _)| bench).map_err(|error| error.to_string())
    }

    /// Attaches an adapter with its own initialisation.
    pub fn with(&self, config: &AdapterConfig) -> Self {
        self.attach(Attach::new(config.clone())).expect("an adapter that can be attached")
    }

    /// Attaches an adapter with these tensors.
    pub fn with_tensors(&self, config: &AdapterConfig, tensors: Tensors) -> Self {
        let given = tensors.into_iter().map(|(field, (values, shape))| (field, TensorData::new(values, shape)));
        self.given(config, given.collect()).expect("an adapter of its own tensors")
    }

    fn given(&self, config: &AdapterConfig, tensors: GivenTensors) -> Result<Self, String> {
        self.attach(Attach::new(config.clone()).with_tensors(BTreeMap::from([("layer".to_string(), tensors)])))
    }

    /// Creates a layer `[d_in, d_out]` with bias and an adapter with its own initialisation.
    pub fn fresh(config: &AdapterConfig, [d_in, d_out]: [usize; 2]) -> Result<Self, String> {
        Self::new(d_in, d_out, true).attach(Attach::new(config.clone()))
    }

    /// Creates the same layer with an adapter of these tensors, in the layout of files.
    pub fn holding(config: &AdapterConfig, [d_in, d_out]: [usize; 2], tensors: GivenTensors) -> Result<Self, String> {
        Self::new(d_in, d_out, true).given(config, tensors)
    }

    /// Creates the same layer with an adapter of random tensors with these names and shapes.
    pub fn filled(config: &AdapterConfig, shape: [usize; 2], tensors: &[(impl ToString, Vec<usize>)]) -> Self {
        let tensors = tensors.iter().enumerate().map(|(seed, (name, shape))| {
            let draws = &mut StdRng::seed_from_u64(100 + seed as u64);
            let values = uniform_values(draws, shape.iter().product(), 1.0);
            (name.to_string(), TensorData::new(values, shape.clone()))
        });
        Self::holding(config, shape, tensors.collect()).expect("an adapter of its own tensors")
    }

    /// Newest adapter.
    pub fn adapter(&self) -> Adapter {
        let mut found = None;
        each_adapter(self, |_, adapter| found = adapter.stack.last().cloned());
        found.expect("a layer with an adapter")
    }

    /// Tensors of the adapter.
    pub fn tensors(&self) -> Tensors {
        let all = self.adapter().tensors().into_iter();
        let host = all.map(|(tensor, data)| {
            let shape = data.shape().as_slice().to_vec();
            (tensor.field, (data.try_into_vec().expect("f32"), shape))
        });
        host.collect()
    }

    /// Values of one tensor.
    pub fn values(&self, field: &str) -> Vec<f32> {
        self.tensors().remove(field).expect("a tensor of the adapter").0
    }

    /// One tensor, in the layout of files.
    pub fn tensor<const D: usize>(&self, field: &str) -> Tensor<D> {
        let (values, shape) = self.tensors().remove(field).expect("a tensor of the adapter");
        Tensor::from_data(TensorData::new(values, shape), &Device::default())
    }

    /// Update `[d_in, d_out]`.
    pub fn update(&self) -> Tensor<2> {
        self.adapter().structure().delta_weight(&self.layer.weight.base()).expect("an update").inner()
    }

    /// Output minus that of the base.
    pub fn branch(&self, x: Tensor<2>) -> Tensor<2> {
        self.forward(x.clone().autodiff()).inner() - self.base(x)
    }

    /// Output of the base.
    pub fn base(&self, x: Tensor<2>) -> Tensor<2> {
        let adapter = self.adapter();
        adapter.control().switch(false);
        let y = self.forward(x.autodiff()).inner();
        adapter.control().switch(true);
        y
    }

    /// Changes the values of a tensor by index.
    pub fn change(tensors: &mut Tensors, field: &str, change: impl Fn(usize, f32) -> f32) {
        let (values, _) = tensors.get_mut(field).expect("a tensor of the adapter");
        values.iter_mut().enumerate().for_each(|(place, value)| *value = change(place, *value));
    }

    /// Attaches an adapter of unstructured tensors: frozen ones as initialised, trained ones moved.
    pub fn moved(&self, config: &AdapterConfig) -> Self {
        let start = self.with(config);
        let mut tensors = start.tensors();
        for tensor in start.adapter().shapes() {
            if tensor.role != super::TensorRole::Frozen {
                Self::change(&mut tensors, &tensor.field, |place, value| value + 0.2 * (place as f32 * 1.3).sin());
            }
        }
        self.with_tensors(config, tensors)
    }

    /// Batch `[rows, d_in]`.
    pub fn input(&self, rows: usize) -> Tensor<2> {
        matrix(rows, self.layer.weight.base().dims()[0], 0.11).autodiff()
    }

    /// Output for any input.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.layer.forward(x)
    }

    /// Output for 5 rows.
    pub fn output(&self) -> Tensor<2> {
        self.forward(self.input(5))
    }

    /// Weight of the bare layer.
    pub fn weight(&self) -> Tensor<2> {
        self.layer.weight.base().inner()
    }

    /// Merged weight.
    pub fn merged(&self) -> Tensor<2> {
        self.layer.weight.val().inner()
    }

    /// Bias of the bare layer and the merged one.
    pub fn biases(&self) -> [Option<Tensor<1>>; 2] {
        let bias = self.layer.bias.as_ref().map(|bias| bias.val().inner());
        [bias.clone(), self.adapter().structure().merged_bias(&self.weight(), bias).map(|bias| bias.inner())]
    }

    /// Returns the layer with its adapter merged.
    pub fn merge(&self) -> Self {
        let [_, bias] = self.biases();
        Self::of(self.merged(), bias)
    }

    /// Gradients of the squared distance between the output and a target.
    pub fn gradients(&self) -> GradientsParams {
        let [rows, d_out] = self.output().dims();
        let error = self.output() - matrix(rows, d_out, 0.53).autodiff();
        let loss = error.square().mean().mul_scalar(0.5);
        let loss = match penalty(self, PenaltyAt::Loss) {
            Some(penalty) => loss + penalty,
            None => loss,
        };
        GradientsParams::from_grads(loss.backward(), self)
    }

    /// Gradient of a tensor, in the layout of files.
    pub fn gradient(&self, mut grads: GradientsParams, field: &str) -> Vec<f32> {
        let shapes = self.adapter().shapes();
        let tensor = shapes.iter().find(|tensor| tensor.field == field).expect("a tensor of the adapter");
        match tensor.shape.len() {
            1 => host(grads.remove::<1>(tensor.id).expect("a gradient")),
            2 => {
                let gradient = grads.remove::<2>(tensor.id).expect("a gradient");
                host(if tensor.transposed { gradient.transpose() } else { gradient })
            }
            3 => host(grads.remove::<3>(tensor.id).expect("a gradient")),
            _ => host(grads.remove::<4>(tensor.id).expect("a gradient")),
        }
    }

    /// Reports for each trained tensor whether its gradient is non-zero.
    pub fn learning(&self) -> BTreeMap<String, bool> {
        let trained = self.adapter().shapes().into_iter().filter(|tensor| tensor.role != super::TensorRole::Frozen);
        let moves = |tensor: &str| self.gradient(self.gradients(), tensor).iter().any(|gradient| *gradient != 0.0);
        trained.map(|tensor| (tensor.field.clone(), moves(&tensor.field))).collect()
    }

    /// Trains for some steps.
    pub fn trained(&self, steps: usize) -> Self {
        let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
        (0..steps).fold(self.clone(), |bench, _| {
            let grads = bench.gradients();
            optimizer.step(1e-2, bench, grads)
        })
    }

    /// Layer and merged weights after steps on half the squared distance to the targets.
    pub fn steps(mut self, mut optimizer: ModuleOptimizer, lr: f64, steps: usize) -> (Self, Vec<Tensor<2>>) {
        let [d_in, d_out] = self.weight().dims();
        let mut weights = Vec::new();
        for step in 0..steps {
            let error = self.forward(wave([6, d_in], 50 + step)) - wave([6, d_out], 70 + step);
            let grads = GradientsParams::from_grads(error.square().sum().mul_scalar(0.5).backward(), &self);
            self = optimizer.step(lr, self, grads);
            weights.push(self.merged());
        }
        (self, weights)
    }

    /// Sum of the penalties.
    pub fn penalty(&self, at: PenaltyAt) -> Tensor<1> {
        penalty(self, at).expect("a penalty").inner()
    }
}
