//! Layer that an adapter is built for, and the initial values of its tensors.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use lowrank_optim::key_of;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::error::AdapterError;
use super::spec::Spec;
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops;
use lowrank_kernels::random::{normal_values, uniform_values};
use lowrank_optim::parameter_id;

/// Static properties of a layer to adapt.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Path of the layer, as in model files: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// `[d_in, d_out]`.
    pub shape: [usize; 2],
    /// Rank; 0 for methods without one.
    pub rank: usize,
    /// Alpha; 0 for methods without one.
    pub alpha: f64,
    /// Scale of the update: `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f64,
    /// Fraction of values dropped in training.
    pub dropout: f64,
    /// Initialisation: `default`, or one of [`Spec::inits`].
    pub init: String,
    /// Number of layers that the same adapter is attached to.
    pub layers: usize,
    /// Largest `d_in` and largest `d_out` among them.
    pub largest: [usize; 2],
    /// True if the layer has a bias.
    pub bias: bool,
    /// True for a table whose rows are looked up.
    pub embedding: bool,
}

/// Rank and scale of one layer.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Size {
    /// Rank; 0 is an adapter without components.
    pub rank: usize,
    /// Scale of the update.
    pub scale: f64,
}

impl Place {
    /// Returns rank and scale.
    pub fn size(&self) -> Size {
        Size { rank: self.rank, scale: self.scale }
    }

    /// Sets a rank and scale that differ from the configuration.
    pub fn resize(&mut self, Size { rank, scale }: Size) {
        (self.rank, self.scale) = (rank, scale);
    }

    /// Rejects a rank outside 1 to the smaller side.
    pub fn check_rank(&self) -> Result<(), String> {
        let most = self.shape[0].min(self.shape[1]);
        match self.rank {
            0 => Err("rank must be at least 1".into()),
            rank if rank > most => Err(format!("rank {rank} is larger than the smaller side, {most}")),
            _ => Ok(()),
        }
    }
}

/// Tensors of one layer's adapter read from a file, in the layout of the file, by field name.
pub type GivenTensors = BTreeMap<String, TensorData>;

/// Tensors shared by all layers of an adapter, while it is being built.
#[derive(Debug, Default)]
pub struct SharedTensors {
    pub(crate) made: BTreeMap<String, (Vec<usize>, Tensor<1>)>,
    /// Tensors read from a file and not yet requested, by key.
    pub(crate) given: GivenTensors,
}

/// The layer that an adapter is being built for.
pub struct Site<'a> {
    /// Static properties of the layer.
    pub place: &'a Place,
    pub(crate) name: &'a str,
    pub(crate) spec: &'static Spec,
    pub(crate) seed: u64,
    /// Device of the new tensors; trained ones are tracked if it is an autodiff device.
    pub(crate) device: Device,
    pub(crate) stored: Tensor<2>,
    pub(crate) weight: Tensor<2>,
    pub(crate) gradient: Option<Tensor<2>>,
    pub(crate) given: Option<GivenTensors>,
    pub(crate) shared: &'a mut SharedTensors,
}

impl Site<'_> {
    /// Weight `[d_in, d_out]` that the adapter is attached to, including the adapters below; in f32, without gradient.
    pub fn weight(&self) -> Tensor<2> {
        ops::widened(self.weight.clone())
    }

    /// Stored weight `[d_in, d_out]`, without the adapters below; in f32, without gradient.
    pub fn stored(&self) -> Tensor<2> {
        ops::widened(self.stored.clone())
    }

    /// Summed gradient `[d_in, d_out]` of the base weight over the first samples, for initialisations that need it.
    pub fn gradient(&self) -> Result<Tensor<2>, AdapterError> {
        self.gradient.clone().ok_or_else(|| {
            AdapterError::Refused(format!(
                "{} begins from gradients of the base weight: collect them over some samples first",
                self.spec.name
            ))
        })
    }

    /// Plain device (without autodiff).
    pub fn plain_device(&self) -> Device {
        self.device.clone().inner()
    }

    /// Returns a random number stream of this layer for `what`.
    pub fn random(&self, what: &str) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ key_of(&format!("{}.{what}", self.place.path)))
    }

    /// Returns a random number stream that is the same in all layers of the adapter.
    pub fn common_random(&self, what: &str) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ key_of(what))
    }

    /// Draws uniformly between plus and minus `bound` from this layer's own stream.
    pub fn uniform(&self, what: &str, count: usize, bound: f64) -> Vec<f32> {
        uniform_values(&mut self.random(what), count, bound)
    }

    /// Draws from a normal distribution with standard deviation `std`, from this layer's own stream.
    pub fn normal(&self, what: &str, count: usize, std: f64) -> Vec<f32> {
        normal_values(&mut self.random(what), count, std)
    }

    /// Returns a seed for generators that are run again, for `what`.
    pub fn seed_of(&self, what: &str) -> u64 {
        self.random(what).random()
    }

    /// Returns true if tensors come from a file.
    pub fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// Shape of a tensor in the file.
    pub fn given_shape(&self, field: &str) -> Option<Vec<usize>> {
        let data = self.given.as_ref()?.get(field)?;
        Some(data.shape().as_slice().to_vec())
    }

    /// Shape of a shared tensor that already exists.
    pub fn shared_made(&self, key: &str) -> Option<Vec<usize>> {
        self.shared.made.get(key).map(|(shape, _)| shape.clone())
    }

    /// Shape of a shared tensor that already exists or that a file holds.
    pub fn shared_shape(&self, key: &str) -> Option<Vec<usize>> {
        let read = || self.shared.given.get(key).map(|data| data.shape().as_slice().to_vec());
        self.shared_made(key).or_else(read).or_else(|| self.given_shape(key))
    }

    /// Creates a trained tensor with row-major values from the file, or else from `start`.
    pub fn trained<const D: usize>(
        &mut self,
        field: &str,
        shape: [usize; D],
        start: impl FnOnce(&mut Self) -> Result<Vec<f32>, AdapterError>,
    ) -> Result<Param<Tensor<D>>, AdapterError> {
        let tensor = self.tensor(field, shape, start)?;
        let tensor = if self.device.is_autodiff() { tensor.require_grad() } else { tensor };
        Ok(Param::initialized(self.id(field), tensor))
    }

    /// Creates a trained tensor of a resizable structure: along `axis` the parts of `keep`, in this order, followed by
    /// new ones up to `shape`, with row-major values from `start`.
    pub fn resized<const D: usize>(
        &mut self,
        before: &Param<Tensor<D>>,
        shape: [usize; D],
        axis: usize,
        keep: &[usize],
        start: impl FnOnce(&mut Self) -> Vec<f32>,
    ) -> Param<Tensor<D>> {
        let (rows, inner): (usize, usize) = (shape[..axis].iter().product(), shape[axis + 1..].iter().product());
        let (old, appended) = (before.dims()[axis], shape[axis] - keep.len());
        let values = if old > 0 { host(before.val().without_autodiff()) } else { Vec::new() };
        let new = if appended > 0 { start(self) } else { Vec::new() };
        let mut all = Vec::with_capacity(shape.iter().product());
        for row in 0..rows {
            keep.iter().for_each(|part| all.extend_from_slice(&values[(row * old + part) * inner..][..inner]));
            all.extend_from_slice(&new[row * appended * inner..][..appended * inner]);
        }
        let tensor = Tensor::from_data(TensorData::new(all, shape), (&self.device, DType::F32));
        let trained = before.is_require_grad();
        Param::initialized(before.id, if trained { tensor.require_grad() } else { tensor })
    }

    /// Creates a frozen tensor of this layer.
    pub fn frozen<const D: usize>(
        &mut self,
        field: &str,
        shape: [usize; D],
        start: impl FnOnce(&mut Self) -> Result<Vec<f32>, AdapterError>,
    ) -> Result<Param<Tensor<D>>, AdapterError> {
        let tensor = self.tensor(field, shape, start)?;
        Ok(Param::initialized(self.id(field), tensor).set_require_grad(false))
    }

    /// Creates a tensor shared by all layers with the same key and by all adapters of the structure on one module, on
    /// the plain device; created once, even if a file that is read omits it. It is not a parameter: it is neither
    /// trained nor counted with the layer.
    pub fn shared<const D: usize>(
        &mut self,
        field: &str,
        key: &str,
        shape: [usize; D],
        start: impl FnOnce(&mut Self) -> Result<Vec<f32>, AdapterError>,
    ) -> Result<Shared<D>, AdapterError> {
        let transposed = self.is_transposed(field, D);
        let shared = |tensor: Tensor<1>| Shared { key: key.to_string(), tensor: tensor.reshape(shape), transposed };
        if let Some((made, tensor)) = self.shared.made.get(key).cloned() {
            if made != shape {
                return Err(AdapterError::Refused(format!(
                    "{}: its {field} has shape {shape:?}, that of the layers before {made:?}, and all share one: give all the same rank, and the adapter on the largest layers first",
                    self.place.path
                )));
            }
            if let Some(given) = &mut self.given {
                given.remove(field);
            }
            return Ok(shared(tensor));
        }
        if let (Some(given), Some(data)) = (&mut self.given, self.shared.given.remove(key)) {
            given.entry(field.to_string()).or_insert(data);
        }
        // Tensors missing from the file follow from the seed.
        let in_file = self.given.as_ref().is_none_or(|given| given.contains_key(field));
        let values = if in_file { self.values(field, &shape, start)? } else { start(self)? };
        let count = values.len();
        let flat = Tensor::<1>::from_data(TensorData::new(values, [count]), (&self.plain_device(), DType::F32));
        self.shared.made.insert(key.to_string(), (shape.to_vec(), flat.clone()));
        Ok(shared(flat))
    }

    /// Returns true if files hold a tensor with this number of dimensions transposed.
    fn is_transposed(&self, field: &str, dimensions: usize) -> bool {
        let own = || self.spec.tensor(field).is_some_and(|tensor| tensor.transposed);
        dimensions == 2 && (field.starts_with("origin.") || own())
    }

    fn id(&self, field: &str) -> burn::module::ParamId {
        parameter_id(&format!("{}.{}.{field}", self.place.path, self.name))
    }

    fn tensor<const D: usize>(
        &mut self,
        field: &str,
        shape: [usize; D],
        start: impl FnOnce(&mut Self) -> Result<Vec<f32>, AdapterError>,
    ) -> Result<Tensor<D>, AdapterError> {
        let values = self.values(field, &shape, start)?;
        Ok(Tensor::from_data(TensorData::new(values, shape), (&self.device, DType::F32)))
    }

    fn values(
        &mut self,
        field: &str,
        shape: &[usize],
        start: impl FnOnce(&mut Self) -> Result<Vec<f32>, AdapterError>,
    ) -> Result<Vec<f32>, AdapterError> {
        let wrong =
            |reason: String| AdapterError::Tensor { path: self.place.path.clone(), tensor: field.to_string(), reason };
        let count: usize = shape.iter().product();
        let Some(given) = &mut self.given else {
            let values = start(self)?;
            assert_eq!(values.len(), count, "a structure gives as many values as its tensor has");
            return Ok(values);
        };
        let Some(data) = given.remove(field) else {
            return Err(wrong("is missing".into()));
        };
        let transposed = self.is_transposed(field, shape.len());
        let expected: Vec<usize> = if transposed { shape.iter().rev().copied().collect() } else { shape.to_vec() };
        if data.shape().as_slice() != expected.as_slice() {
            return Err(wrong(format!("has shape {:?}; rank and layer ask for {expected:?}", data.shape().as_slice())));
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        let data = data.convert::<f32>();
        let plain = Device::default();
        match transposed {
            true => Ok(host(Tensor::<2>::from_data(data, &plain).transpose())),
            false => data.try_into_vec::<f32>().map_err(|error| wrong(format!("{error:?}"))),
        }
    }

    /// Rejects tensors of the file that the structure did not request.
    pub(crate) fn finish(self) -> Result<(), AdapterError> {
        match self.given.and_then(|given| given.into_keys().next()) {
            None => Ok(()),
            Some(tensor) => Err(AdapterError::Tensor {
                path: self.place.path.clone(),
                tensor,
                reason: format!("has no place in {}", self.spec.name),
            }),
        }
    }
}

/// Frozen tensor shared by several layers.
#[derive(Clone, Debug)]
pub struct Shared<const D: usize> {
    key: String,
    tensor: Tensor<D>,
    transposed: bool,
}

impl<const D: usize> Shared<D> {
    /// Returns the tensor, on the plain device.
    pub fn val(&self) -> Tensor<D> {
        self.tensor.clone()
    }

    /// Size of the tensor in bytes, for [`Structure::shared`](super::Structure::shared).
    pub fn bytes(&self) -> SharedBytes {
        let (shape, count) = (self.tensor.shape(), self.tensor.shape().num_elements());
        SharedBytes {
            key: self.key.clone(),
            bytes: count as u64 * 4,
            values: self.tensor.clone().reshape([count]),
            layout: (shape.as_slice().to_vec(), self.transposed),
        }
    }
}

/// Key and size of a frozen tensor shared by several layers.
#[derive(Clone, Debug)]
pub struct SharedBytes {
    /// Key common to all layers that share the tensor; its name in files.
    pub key: String,
    /// Size in bytes, counted once.
    pub bytes: u64,
    pub(crate) values: Tensor<1>,
    /// Shape in files, and true if they hold it transposed.
    pub(crate) layout: (Vec<usize>, bool),
}
