//! LoRA-FA: A keeps its initial value, and the gradient of B is corrected for it.
//!
//! "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning" (Zhang et al., arXiv 2308.03303). The correction is
//! that of `peft`'s optimizer; its Adam is [`AdamWConfig`](crate::AdamWConfig) with `legacy_epsilon`, `decay_after` and an epsilon of 1e-6.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::pairs::{LoraPair, PairGradients, damped_inverse, data, eigen, take_pairs, transposed};
use crate::error::OptimError;
use crate::part::Part;

/// Damping of the product of A with itself, as in `peft`.
const DELTA: f64 = 1e-8;

/// Removes the gradient of A and corrects that of B: `(A' A + delta)^-1 gB / scale^2`, so that the step of the merged weight is the
/// gradient of the weight as far as it lies in the column space of A. After clipping and before the optimizer.
///
/// If A is frozen its gradient is not computed at all, which saves the most.
#[derive(Clone, Debug)]
pub struct LoraFa {
    pairs: Vec<LoraPair>,
}

impl LoraFa {
    /// The rule for a module that [`Module::apply_lora`] was called on.
    pub fn new<M: Module>(module: &M) -> Result<Self, OptimError> {
        Ok(Self::over(LoraPair::of(module)?))
    }

    /// The rule for known pairs.
    pub fn over(pairs: Vec<LoraPair>) -> Self {
        Self { pairs }
    }

    /// The gradients for the optimizer; a part of the module is supported too.
    pub fn apply(&self, part: &dyn Part, mut grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        let met = take_pairs(part, &self.pairs, &mut grads, false)?;
        let corrected: Vec<_> = met.into_par_iter().map(corrected).collect();
        for corrected in corrected {
            let (pair, grad) = corrected?;
            grads.register(pair.b, grad);
        }
        Ok(grads)
    }
}

fn corrected(met: PairGradients<'_>) -> Result<(&LoraPair, Tensor<2>), OptimError> {
    let device = met.b.device();
    let (a, grad) = (transposed(met.a), transposed(met.grad_b));
    let bad = |count| OptimError::NonFiniteGradient { path: met.pair.path.clone(), count };
    let non_finite = || a.iter().filter(|value| !value.is_finite()).count() as u64;
    let eigen = eigen(&(&a * a.transpose())).ok_or_else(|| bad(non_finite()))?;
    let corrected = grad * damped_inverse(&eigen, DELTA) / (met.pair.scale * met.pair.scale);
    Ok((met.pair, Tensor::from_data(data(&corrected).map_err(bad)?, &device)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Lora;
    use burn::nn::LinearConfig;
    use burn::tensor::Device;

    #[test]
    fn the_step_is_the_gradient_in_the_column_space_of_a() {
        let device = Device::default().autodiff();
        let module = LinearConfig::new(7, 5).with_bias(false).init(&device).apply_lora(Lora::new(3, 6.0));
        let adapter = module.weight.adapter().unwrap();
        let values = |rows: usize, columns: usize, seed: u64| {
            let mut rng = lowrank_kernels::random::generator(1, seed, 0);
            let values = lowrank_kernels::random::normal(&mut rng, rows * columns);
            Tensor::<2>::from_data(burn::tensor::TensorData::new(values, [rows, columns]), &Device::default())
        };
        let g = values(7, 5, 3);
        let loss = (module.weight.val() * Tensor::from_inner(g.clone())).sum();
        let grads = GradientsParams::from_grads(loss.backward(), &module);
        let grads = LoraFa::new(&module).unwrap().apply(&module, grads).unwrap();
        assert!(grads.get::<2>(adapter.a.id).is_none());
        let a = adapter.a.val().inner();
        let step = a.clone().matmul(grads.get::<2>(adapter.b.id).unwrap()).mul_scalar(adapter.scale);
        let q = lowrank_kernels::decompose::orthonormal_factor(&a);
        let expected = q.clone().matmul(q.transpose().matmul(g));
        let size: f32 = expected.clone().square().sum().sqrt().into_scalar();
        let far: f32 = (step - expected).square().sum().sqrt().into_scalar();
        assert!(far < 1e-4 * size, "{far} of {size}");
    }
}
