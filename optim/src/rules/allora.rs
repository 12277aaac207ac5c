//! ALLoRA: outputs learn more slowly as their part of the update grows.
//!
//! "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws" (Huang and Balestriero, arXiv 2410.09692). The factor of an output is
//! `1 / sqrt(norm + 1 / eta^2)`, which is eta where its part of the update is zero, and falls as that grows.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pairs::{LoraPair, take_pairs};
use crate::check;
use crate::error::OptimError;
use crate::part::Part;
use lowrank_kernels::ops::MatrixProduct;

/// Norm that reduces the learning-rate scale of an output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormOf {
    /// That of its column of `A B` (a row, as the paper writes it).
    #[default]
    BaRow,
    /// That of its column of B, which is cheaper.
    BRow,
}

/// Rejects an eta whose square does not fit single precision.
pub fn check_eta(eta: f64) -> Result<(), OptimError> {
    match eta > 0.0 && eta <= 1e9 {
        true => Ok(()),
        false => check::refused("eta", eta, "it must be greater than 0 and at most 1e9"),
    }
}

/// Factors `[d_out]` of the outputs for `A [d_in, rank]` and `B [rank, d_out]`, without gradient. The product itself is not formed.
pub fn output_lr_scales(a: Tensor<2>, b: Tensor<2>, eta: f64, norm_of: NormOf) -> Tensor<1> {
    let (a, b) = (a.detach(), b.detach());
    let squares = match norm_of {
        NormOf::BaRow => a.clone().transpose().times(a).times(b.clone()) * b,
        NormOf::BRow => b.square(),
    };
    // Rounding can make a square a little less than zero.
    let norms = squares.sum_dim(0).squeeze_dim::<1>(0).clamp_min(0.0).sqrt();
    // As written above, but exactly eta where the norm is zero.
    norms.mul_scalar(eta * eta).add_scalar(1.0).sqrt().recip().mul_scalar(eta)
}

/// ALLoRA for loops that can only change gradients: that of B follows the method, that of A is unscaled, unlike in the method. For the
/// complete method convert the adapters to `allora` (crate `lowrank-models`).
///
/// The adapters must have scale 1: the method has none.
#[derive(Clone, Debug)]
pub struct AlloraRowsOnly {
    pairs: Vec<LoraPair>,
    eta: f64,
    norm_of: NormOf,
}

impl AlloraRowsOnly {
    /// The rule for a module that [`Module::apply_lora`] was called on, with alpha equal to the rank.
    pub fn new<M: Module>(module: &M, eta: f64, norm_of: NormOf) -> Result<Self, OptimError> {
        check_eta(eta)?;
        let pairs = LoraPair::of(module)?;
        match pairs.iter().find(|pair| pair.scale != 1.0) {
            None => Ok(Self { pairs, eta, norm_of }),
            Some(pair) => check::refused(
                "scale",
                pair.scale,
                format!(
                    "allora has none, eta takes its place, but the adapter of {} has; let alpha be the rank",
                    pair.path
                ),
            ),
        }
    }

    /// The gradients with that of B scaled; called before clipping, which must see the scaled ones.
    pub fn apply(&self, part: &dyn Part, mut grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        for met in take_pairs(part, &self.pairs, &mut grads, false)? {
            let scales = output_lr_scales(met.a, met.b, self.eta, self.norm_of).unsqueeze::<2>();
            grads.register(met.pair.b, met.grad_b * scales);
            if let Some(grad) = met.grad_a {
                grads.register(met.pair.a, grad);
            }
        }
        Ok(grads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Lora;
    use burn::nn::LinearConfig;
    use burn::tensor::{Device, TensorData};

    fn tensor<const N: usize>(values: [[f32; N]; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::from(values), &Device::default())
    }

    fn host<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        lowrank_kernels::host::values(x)
    }

    #[test]
    fn paces_are_eta_at_zero_and_fall_as_the_rows_grow() {
        let a = tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]).transpose();
        // Outputs whose columns are zero, small, larger, largest.
        let b = tensor([[0.0, 0.01, 0.1, 1.0], [0.0, -0.02, 0.3, 5.0]]);
        let product = a.clone().matmul(b.clone());
        for eta in [0.3, 1.0, 3.0, 4.0, 1e6] {
            for (norm_of, rows) in [(NormOf::BaRow, product.clone()), (NormOf::BRow, b.clone())] {
                let scales = host(output_lr_scales(a.clone(), b.clone(), eta, norm_of));
                assert_eq!(scales[0], eta as f32);
                assert!(scales.is_sorted_by(|before, after| before > after), "{scales:?}");
                let norms = host(rows.square().sum_dim(0).sqrt());
                for (scales, norm) in scales.iter().zip(norms).skip(1) {
                    let expected = (f64::from(norm) + eta.powi(-2)).sqrt().recip();
                    assert!((f64::from(*scales) / expected - 1.0).abs() < 1e-5);
                }
            }
        }
        for eta in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e10] {
            assert!(check_eta(eta).is_err(), "{eta}");
        }
    }

    #[test]
    fn rows_only_scales_b_and_leaves_a() {
        let device = Device::default().autodiff();
        let module = LinearConfig::new(3, 4).init(&device);
        let scaled = module.clone().apply_lora(Lora::new(2, 4.0));
        assert!(AlloraRowsOnly::new(&scaled, 2.0, NormOf::BaRow).unwrap_err().to_string().contains("alpha"));
        let module = module.apply_lora(Lora::new(2, 2.0));
        let adapter = module.weight.adapter().unwrap();
        let grads = || {
            let loss = module.forward(Tensor::<2>::ones([5, 3], &device)).square().sum();
            GradientsParams::from_grads(loss.backward(), &module)
        };
        let (plain, scaled) = (grads(), AlloraRowsOnly::new(&module, 2.0, NormOf::BRow).unwrap());
        let scaled = scaled.apply(&module, grads()).unwrap();
        let grad = |grads: &GradientsParams, id| grads.get::<2>(id).unwrap();
        assert_eq!(host(grad(&plain, adapter.a.id)), host(grad(&scaled, adapter.a.id)));
        assert_eq!(host(grad(&plain, adapter.b.id).mul_scalar(2.0)), host(grad(&scaled, adapter.b.id)));
    }
}
