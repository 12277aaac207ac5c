//! Clipping by the norm of all gradients together.
//!
//! "On the difficulty of training Recurrent Neural Networks" (Pascanu et al., arXiv 1211.5063), with the constant of
//! `torch.nn.utils.clip_grad_norm_`.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use crate::error::OptimError;
use crate::path::{ModulePath, ParameterVisitor, visit_parameters};

/// Scales all gradients by one factor when their common norm is above a maximum.
///
/// ```no_run
/// # use burn::{module::Module, optim::GradientsParams};
/// # use lowrank_optim::{OptimError, GlobalNormClip};
/// # fn step<M: Module>(model: &M, grads: GradientsParams) -> Result<GradientsParams, OptimError> {
/// let grads = GlobalNormClip::new(Some(1.0)).apply(model, grads)?.grads;
/// # Ok(grads)
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlobalNormClip {
    max_norm: Option<f64>,
}

/// Gradients after [`GlobalNormClip`], with their norm and size.
#[derive(Debug)]
pub struct Clipped {
    /// The gradients, scaled where needed.
    pub grads: GradientsParams,
    /// Norm of all gradients together before clipping.
    pub norm: f64,
    /// Bytes of the gradients.
    pub bytes: u64,
}

/// Added to the norm before dividing, as in PyTorch.
const EPSILON: f64 = 1e-6;

impl GlobalNormClip {
    /// Clips to `max_norm`; with none the norm is only measured.
    pub fn new(max_norm: Option<f64>) -> Self {
        Self { max_norm }
    }

    /// Measures and, where needed, scales the gradients of `module`.
    ///
    /// Rejects gradients that are infinite or not a number, naming the first such parameter in the order of the module.
    pub fn apply<M: Module>(&self, module: &M, mut grads: GradientsParams) -> Result<Clipped, OptimError> {
        let mut sums = Squares { grads: &grads, total: 0.0, bytes: 0, refused: None };
        visit_parameters(module, &mut sums);
        if let Some(refused) = sums.refused {
            return Err(refused);
        }
        let (norm, bytes) = (sums.total.sqrt(), sums.bytes);
        if let Some(max_norm) = self.max_norm {
            let factor = max_norm / (norm + EPSILON);
            if factor < 1.0 {
                module.visit(&mut Scale { grads: &mut grads, factor });
            }
        }
        Ok(Clipped { grads, norm, bytes })
    }
}

struct Squares<'a> {
    grads: &'a GradientsParams,
    total: f64,
    bytes: u64,
    refused: Option<OptimError>,
}

impl ParameterVisitor for Squares<'_> {
    fn float<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<D>>) {
        let Some(grad) = self.grads.get::<D>(param.id) else {
            return;
        };
        self.bytes += (grad.shape().num_elements() * grad.dtype().size()) as u64;
        if self.refused.is_some() {
            return;
        }
        let (sum, non_finite) = sum_of_squares(grad);
        self.total += sum;
        if non_finite > 0 {
            self.refused = Some(OptimError::NonFiniteGradient { path: path.joined(), count: non_finite });
        }
    }
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, grad.mul_scalar(self.factor));
        }
    }
}

/// Sum of squares of the finite values, and the number of the others.
fn sum_of_squares<const D: usize>(grad: Tensor<D>) -> (f64, u64) {
    #[cfg(feature = "flex")]
    {
        use burn::tensor::DType;
        use burn_flex::Flex;
        if grad.dtype() == DType::F32
            && let Ok(primitive) = grad.clone().try_into_primitive::<Flex>()
            && let Some(values) = primitive.as_slice::<f32>()
        {
            return host_sum_of_squares(values);
        }
    }
    let data = grad.into_data().convert::<f32>();
    match data.as_slice::<f32>() {
        Ok(values) => host_sum_of_squares(values),
        Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
    }
}

/// The partition is fixed and partial sums are added in order, so that the result does not depend on the number of threads.
fn host_sum_of_squares(values: &[f32]) -> (f64, u64) {
    use rayon::prelude::*;
    const CHUNK: usize = 1 << 15;
    let partial: Vec<(f64, u64)> = values.par_chunks(CHUNK).map(chunk_sum_of_squares).collect();
    partial.into_iter().fold((0.0, 0), |(sum, bad), (s, b)| (sum + s, bad + b))
}

fn chunk_sum_of_squares(values: &[f32]) -> (f64, u64) {
    const LANES: usize = 8;
    let (groups, rest) = values.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for group in groups {
        for (sum, value) in sums.iter_mut().zip(group) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    let sum = sums.iter().sum::<f64>() + rest.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    // The square of a finite f32 is finite in f64: only other sums need counting.
    match sum.is_finite() {
        true => (sum, 0),
        false => (sum, values.iter().filter(|value| !value.is_finite()).count() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Device, TensorData};

    fn layer() -> Linear {
        LinearConfig::new(3, 2).init(&Device::default().autodiff())
    }

    fn grads(layer: &Linear, weight: [f32; 6], bias: [f32; 2]) -> GradientsParams {
        let device = Device::default();
        let mut grads = GradientsParams::new();
        grads.register(layer.weight.id, Tensor::<2>::from_data(TensorData::new(weight.to_vec(), [3, 2]), &device));
        let bias_id = layer.bias.as_ref().unwrap().id;
        grads.register(bias_id, Tensor::<1>::from_data(TensorData::from(bias), &device));
        grads
    }

    fn weight_of(layer: &Linear, grads: &GradientsParams) -> Vec<f32> {
        grads.get::<2>(layer.weight.id).unwrap().into_data().try_into_vec().unwrap()
    }

    #[test]
    fn scales_all_gradients_by_one_factor() {
        let layer = layer();
        let clipped = GlobalNormClip::new(Some(1.0)).apply(&layer, grads(&layer, [1.0; 6], [1.0, 3.0])).unwrap();
        assert_eq!(clipped.norm, 4.0);
        assert_eq!(clipped.bytes, 32);
        let expected = (1.0 / (4.0 + 1e-6)) as f32;
        assert_eq!(weight_of(&layer, &clipped.grads), [expected; 6]);
    }

    #[test]
    fn leaves_small_gradients_as_they_are() {
        let layer = layer();
        for max in [None, Some(100.0)] {
            let values = [0.1, -0.2, 0.3, 1e-30, 0.0, 7.0];
            let clipped = GlobalNormClip::new(max).apply(&layer, grads(&layer, values, [0.0; 2])).unwrap();
            assert_eq!(weight_of(&layer, &clipped.grads), values);
        }
    }

    #[test]
    fn large_finite_values_do_not_overflow() {
        let layer = layer();
        let clipped = GlobalNormClip::new(Some(1.0)).apply(&layer, grads(&layer, [1e30; 6], [0.0; 2])).unwrap();
        assert!((clipped.norm / (6f64.sqrt() * 1e30) - 1.0).abs() < 1e-6);
        assert!(weight_of(&layer, &clipped.grads).iter().all(|value| (value - 0.408_248_3).abs() < 1e-5));
    }

    #[test]
    fn names_the_first_bad_parameter() {
        let layer = layer();
        let error =
            GlobalNormClip::new(None).apply(&layer, grads(&layer, [0.0; 6], [f32::NAN, f32::INFINITY])).unwrap_err();
        assert_eq!(error, OptimError::NonFiniteGradient { path: "bias".into(), count: 2 });
        let error = GlobalNormClip::new(Some(1.0))
            .apply(&layer, grads(&layer, [f32::NEG_INFINITY; 6], [f32::NAN; 2]))
            .unwrap_err();
        assert!(error.to_string().contains("weight"));
    }

    #[test]
    fn the_sum_does_not_depend_on_the_number_of_threads() {
        let values: Vec<f32> = (0..200_001u32).map(|i| (i as f32 * 0.37).sin() * 1e-3).collect();
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| host_sum_of_squares(&values).0.to_bits())
        };
        assert_eq!(with(1), with(3));
    }
}
