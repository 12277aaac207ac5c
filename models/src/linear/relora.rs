//! Restarted low-rank updates of a dense weight ("ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695).

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout, uniform_values};

/// `y = x W + s (x A) B`, where `W` has no gradient. A restart adds the product to `W` and begins the factors anew, so that many updates of low rank
/// make one of high rank.
#[derive(Module, Debug)]
pub struct ReLora {
    /// Weight `[d_in, d_out]`, changed by restarts alone.
    pub weight: Param<Tensor<2>>,
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`, zero after a restart.
    pub b: Param<Tensor<2>>,
    /// `q` of a scale `tanh(q)` that is trained; none for `alpha / rank`.
    pub scaling: Option<Param<Tensor<1>>>,
    #[module(skip)]
    scale: f64,
}

impl ReLora {
    pub(super) fn build(
        builder: &mut Builder,
        path: &str,
        [d_in, d_out]: [usize; 2],
        rank: usize,
        alpha: f64,
        trained_scale: bool,
    ) -> Result<Self, ModelError> {
        let name = |part: &str| format!("{path}.{part}");
        let weight = builder.matrix(&name("weight"), [d_in, d_out], Layout::Transposed, Init::Standard)?;
        let first = Init::Uniform(bound(d_in));
        Ok(Self {
            weight: weight.set_require_grad(false),
            a: builder.matrix(&name("a"), [d_in, rank], Layout::Transposed, first)?,
            b: builder.matrix(&name("b"), [rank, d_out], Layout::Transposed, Init::Constant(0.0))?,
            scaling: match trained_scale {
                true => Some(builder.vector(&name("scaling"), 1, Init::Constant(1.0))?),
                false => None,
            },
            scale: alpha / rank as f64,
        })
    }

    /// A layer of given parts, on an autodiff device.
    pub fn from_parts(weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, alpha: f64) -> Self {
        let scale = alpha / a.dims()[1] as f64;
        Self {
            weight: Param::from_tensor(weight).set_require_grad(false),
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            scaling: None,
            scale,
        }
    }

    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let (a, scale) = match &self.scaling {
            // On the small factor, so that the gradient of the scale is a sum over it.
            Some(q) => (self.a.val() * q.val().tanh().unsqueeze::<2>(), 1.0),
            None => (self.a.val(), self.scale),
        };
        ops::low_rank_linear(x, self.weight.val(), a, self.b.val(), scale)
    }

    /// The dense weight `[d_in, d_out]` that gives the same outputs, without gradient.
    pub fn to_dense(&self) -> Tensor<2> {
        let a = self.a.val().inner();
        let a = match &self.scaling {
            Some(q) => a * q.val().inner().tanh().unsqueeze::<2>(),
            None => a.mul_scalar(self.scale),
        };
        self.weight.val().inner() + a.matmul(self.b.val().inner())
    }

    /// Adds the product to the weight and begins anew with this first factor `[d_in, rank]` and a second one of zeros. A trained scale stays as it
    /// is: at 0, beside a second factor of zeros, nothing would ever get a gradient.
    pub fn restart(&mut self, a: Tensor<2>) {
        let b = self.b.val().inner().zeros_like();
        self.weight = Param::initialized(self.weight.id, Tensor::from_inner(self.to_dense())).set_require_grad(false);
        self.a = trained(self.a.id, a);
        self.b = trained(self.b.id, b);
    }

    /// The first factor after restart `number`: drawn as at the start, told apart by seed, layer and number.
    pub fn fresh(&self, seed: u64, number: u64) -> Tensor<2> {
        let a = self.a.val().inner();
        let [d_in, rank] = a.dims();
        let mut random = StdRng::seed_from_u64(seed ^ self.a.id.val() ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let values = uniform_values(&mut random, d_in * rank, bound(d_in));
        Tensor::from_data(TensorData::new(values, [d_in, rank]), &a.device())
    }
}

/// A trained parameter of an id.
pub(crate) fn trained(id: ParamId, value: Tensor<2>) -> Param<Tensor<2>> {
    Param::initialized(id, Tensor::from_inner(value).require_grad())
}

fn bound(d_in: usize) -> f64 {
    (d_in as f64).sqrt().recip()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use lowrank_optim::thin_svd;

    fn draw(shape: [usize; 2], seed: u64) -> Tensor<2> {
        let values = uniform_values(&mut StdRng::seed_from_u64(seed), shape[0] * shape[1], 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Device::default()).autodiff()
    }

    fn layer([d_in, d_out]: [usize; 2], rank: usize) -> ReLora {
        let parts = [draw([d_in, d_out], 1), draw([d_in, rank], 2), draw([rank, d_out], 3)];
        let [weight, a, b] = parts.map(Tensor::require_grad);
        ReLora::from_parts(weight, a, b, 1.5 * rank as f64)
    }

    #[test]
    fn a_restart_leaves_the_outputs_and_zeroes_the_second_factor() {
        for trained_scale in [false, true] {
            let mut layer = layer([9, 7], 3);
            layer.scaling =
                trained_scale.then(|| Param::from_tensor(Tensor::full([1], 0.7, &Device::default()).autodiff()));
            let x = draw([5, 9], 4);
            let (before, dense) = (layer.forward(x.clone()).inner(), layer.to_dense());
            let (a, ids) = (layer.a.val().inner(), [layer.a.id, layer.b.id, layer.weight.id]);
            layer.restart(layer.fresh(7, 1));
            let far = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
            assert!(far(layer.to_dense(), dense) <= 1e-6);
            assert!(far(layer.forward(x).inner(), before) <= 1e-5);
            assert_eq!(layer.b.val().abs().max().into_scalar::<f32>(), 0.0);
            assert!(far(layer.a.val().inner(), a) > 0.1, "the first factor is another one");
            assert!(layer.a.val().abs().max().into_scalar::<f32>() <= 1.0 / 3.0);
            assert_eq!([layer.a.id, layer.b.id, layer.weight.id], ids);
            assert!(layer.a.is_require_grad() && layer.b.is_require_grad() && !layer.weight.is_require_grad());
        }
    }

    #[test]
    fn fresh_factors_follow_from_seed_layer_and_number() {
        let layer = layer([9, 7], 3);
        let values = |seed, number| layer.fresh(seed, number).into_data();
        assert_eq!(values(1, 2), values(1, 2));
        assert!(values(1, 2) != values(2, 2) && values(1, 2) != values(1, 3));
    }

    #[test]
    fn each_cycle_adds_its_rank_until_all_of_it() {
        let mut layer = layer([8, 10], 3);
        let start = layer.weight.val().inner();
        for cycle in 1..=4 {
            // What training makes of the factors.
            layer.a = trained(layer.a.id, draw([8, 3], 10 + cycle).inner());
            layer.b = trained(layer.b.id, draw([3, 10], 20 + cycle).inner());
            layer.restart(layer.fresh(1, cycle));
            let change = layer.weight.val().inner() - start.clone();
            let singular = thin_svd(&change, 8).values;
            let rank = singular.iter().filter(|value| **value > 1e-4 * singular[0]).count();
            assert_eq!(rank, (3 * cycle as usize).min(8), "after {cycle} cycles: {singular:?}");
        }
    }

    #[test]
    fn the_frozen_weight_gets_no_gradient() {
        let layer = layer([6, 5], 2);
        let mut grads = layer.forward(draw([3, 6], 1)).square().sum().backward();
        assert!(layer.weight.val().grad_remove(&mut grads).is_none());
        assert!(layer.a.val().grad_remove(&mut grads).is_some() && layer.b.val().grad_remove(&mut grads).is_some());
    }
}
