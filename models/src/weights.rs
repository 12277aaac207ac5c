//! Sources of the initial values of a model's parameters: random numbers or a file.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
pub(crate) use lowrank_kernels::host::values as host;
use lowrank_kernels::random::key_of;
pub(crate) use lowrank_kernels::random::{normal_values, uniform_values};
pub use lowrank_optim::parameter_id;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::error::ModelError;
pub use crate::layout::Layout;
use crate::storage::{MatrixStorage, StoredMatrix};

/// Source of the initial value of each parameter while a model is built.
///
/// Paths are the names of Hugging Face's files, such as `model.layers.0.self_attn.q_proj.weight`; shapes are the model's.
pub trait WeightSource {
    /// Values of a matrix in row-major order, `shape` as the model stores it; `init` is the initialisation of a new model.
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, init: Init) -> Result<Vec<f32>, ModelError>;
    /// A matrix in its storage; a source that has it in fewer bytes need not widen it.
    fn stored(
        &mut self,
        path: &str,
        shape: [usize; 2],
        layout: Layout,
        init: Init,
        storage: MatrixStorage,
    ) -> Result<StoredMatrix, ModelError> {
        let stored = storage.of(self.matrix(path, shape, layout, init)?, shape, layout);
        stored.map_err(|reason| ModelError::Config(format!("{path} {reason}")))
    }
    /// Values of a vector.
    fn vector(&mut self, path: &str, len: usize, init: Init) -> Result<Vec<f32>, ModelError>;
    /// Values of a tensor of any number of dimensions in row-major order, `shape` as the file stores it.
    fn tensor(&mut self, path: &str, shape: &[usize], init: Init) -> Result<Vec<f32>, ModelError> {
        self.vector(path, shape.iter().product(), init)
    }
    /// `count` different positions below `below`, ascending; random unless `chosen` gives those of a new model.
    fn positions(
        &mut self,
        path: &str,
        count: usize,
        below: usize,
        chosen: Option<Choose>,
    ) -> Result<Vec<i32>, ModelError>;
}

/// Initialisation of a parameter of a new model.
#[derive(Clone, Copy)]
pub enum Init<'a> {
    /// Normal with the model's deviation.
    Standard,
    /// Normal with this deviation.
    Normal(f64),
    /// Uniform between plus and minus this.
    Uniform(f64),
    /// The same value everywhere.
    Constant(f32),
    /// From other random weights of the same seed.
    Computed(&'a dyn Fn(&mut RandomWeights) -> Result<Vec<f32>, ModelError>),
}

/// Positions that follow from the random weights of a new model.
pub type Choose<'a> = &'a dyn Fn(&mut RandomWeights) -> Result<Vec<i32>, ModelError>;

/// Matrices from a normal distribution with mean 0, gains of 1.
///
/// Every matrix has a random stream of its own, seeded by (seed, path): its values depend neither on the other parameters nor on the
/// device.
#[derive(Clone, Debug)]
pub struct RandomWeights {
    /// Seed of the whole model.
    pub seed: u64,
    /// Standard deviation of the matrices.
    pub std: f64,
}

impl RandomWeights {
    fn draw(&mut self, path: &str, count: usize, init: Init) -> Result<Vec<f32>, ModelError> {
        let mut random = StdRng::seed_from_u64(self.seed ^ key_of(path));
        Ok(match init {
            Init::Standard => normal_values(&mut random, count, self.std),
            Init::Normal(std) => normal_values(&mut random, count, std),
            Init::Uniform(bound) => uniform_values(&mut random, count, bound),
            Init::Constant(value) => vec![value; count],
            Init::Computed(compute) => return compute(self),
        })
    }
}

impl WeightSource for RandomWeights {
    fn matrix(&mut self, path: &str, shape: [usize; 2], _layout: Layout, init: Init) -> Result<Vec<f32>, ModelError> {
        self.draw(path, shape[0] * shape[1], init)
    }

    fn vector(&mut self, path: &str, len: usize, init: Init) -> Result<Vec<f32>, ModelError> {
        self.draw(path, len, init)
    }

    fn positions(
        &mut self,
        path: &str,
        count: usize,
        below: usize,
        chosen: Option<Choose>,
    ) -> Result<Vec<i32>, ModelError> {
        if let Some(choose) = chosen {
            return choose(self);
        }
        // Uses memory for the drawn positions only, not for all possible ones.
        let mut random = StdRng::seed_from_u64(self.seed ^ key_of(path));
        let drawn = rand::seq::index::sample(&mut random, below, count);
        let mut positions: Vec<i32> = drawn.iter().map(|position| position as i32).collect();
        positions.sort_unstable();
        Ok(positions)
    }
}

/// Builds the parameters of a model at their paths.
pub struct Builder<'a> {
    pub(crate) source: &'a mut dyn WeightSource,
    pub(crate) device: &'a Device,
    /// Storage of the matrices of blocks.
    pub(crate) storage: MatrixStorage,
}

impl<'a> Builder<'a> {
    /// A builder of parameters in f32.
    pub fn new(source: &'a mut dyn WeightSource, device: &'a Device) -> Self {
        Self { source, device, storage: MatrixStorage::Wide }
    }

    /// The same for the matrices at the ends of a model.
    pub(crate) fn of_tables(&mut self) -> Builder<'_> {
        Builder { source: &mut *self.source, device: self.device, storage: self.storage.of_tables() }
    }

    /// The matrix at a path, trained on an autodiff device.
    pub fn matrix(
        &mut self,
        path: &str,
        shape: [usize; 2],
        layout: Layout,
        init: Init,
    ) -> Result<Param<Tensor<2>>, ModelError> {
        let storage = if layout == Layout::AsStored { self.storage.of_tables() } else { self.storage };
        let stored = self.source.stored(path, shape, layout, init, storage)?;
        Ok(self.param(path, stored.tensor(shape, self.device)))
    }

    /// The vector at a path, trained on an autodiff device.
    pub fn vector(&mut self, path: &str, len: usize, init: Init) -> Result<Param<Tensor<1>>, ModelError> {
        let values = self.source.vector(path, len, init)?;
        Ok(self.param(path, Tensor::from_data(TensorData::new(values, [len]), self.device)))
    }

    /// The tensor at a path, trained on an autodiff device.
    pub fn tensor<const D: usize>(
        &mut self,
        path: &str,
        shape: [usize; D],
        init: Init,
    ) -> Result<Param<Tensor<D>>, ModelError> {
        let values = self.source.tensor(path, &shape, init)?;
        Ok(self.param(path, Tensor::from_data(TensorData::new(values, shape), self.device)))
    }

    /// The number at a path, a scalar in files, trained on an autodiff device.
    pub fn scalar(&mut self, path: &str, init: Init) -> Result<Param<Tensor<1>>, ModelError> {
        let values = self.source.tensor(path, &[], init)?;
        Ok(self.param(path, Tensor::from_data(TensorData::new(values, [1]), self.device)))
    }

    /// Positions `0..below`, which are not trained and take 4 bytes each.
    pub fn positions(
        &mut self,
        path: &str,
        count: usize,
        below: usize,
        chosen: Option<Choose>,
    ) -> Result<Param<Tensor<1, Int>>, ModelError> {
        let values = self.source.positions(path, count, below, chosen)?;
        let plain = self.device.clone().inner();
        let tensor = Tensor::from_data(TensorData::new(values, [count]), (&plain, DType::I32));
        Ok(Param::initialized(parameter_id(path), tensor))
    }

    fn param<const D: usize>(&self, path: &str, tensor: Tensor<D>) -> Param<Tensor<D>> {
        let tensor = if self.device.is_autodiff() { tensor.require_grad() } else { tensor };
        Param::initialized(parameter_id(path), tensor)
    }
}

/// A trained parameter of an id.
pub(crate) fn trained(id: ParamId, value: Tensor<2>) -> Param<Tensor<2>> {
    Param::initialized(id, Tensor::from_inner(value).require_grad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_depend_on_seed_and_path_alone() {
        let draw = |seed, path: &str| {
            RandomWeights { seed, std: 0.02 }.matrix(path, [3, 5], Layout::AsStored, Init::Standard).unwrap()
        };
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
    }

    #[test]
    fn random_weights_have_the_stated_deviation() {
        let values =
            RandomWeights { seed: 7, std: 0.02 }.matrix("w", [200, 200], Layout::AsStored, Init::Standard).unwrap();
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 5e-4, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 5e-4, "{}", variance.sqrt());
    }
}
