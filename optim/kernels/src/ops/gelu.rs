//! Gaussian error linear units.

use burn::tensor::{Tensor, activation};
use serde::{Deserialize, Serialize};

/// Form of the unit, with the name that Hugging Face's `hidden_act` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gelu {
    /// `x Phi(x)` with the distribution function of the normal distribution.
    #[serde(rename = "gelu")]
    Exact,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh", alias = "gelu_fast")]
    Tanh,
    /// `x sigmoid(1.702 x)`.
    #[serde(rename = "quick_gelu")]
    Quick,
}

/// Factor of the argument of [`Gelu::Quick`].
const QUICK: f64 = 1.702;
/// `2 sqrt(2 / pi)`: `(1 + tanh(u)) / 2` is `sigmoid(2 u)`.
const SLOPE: f64 = 1.595_769_121_605_730_8;
/// Factor of the cube.
const CUBE: f64 = 0.044_715;

/// Gaussian error linear unit, element by element.
///
/// "Gaussian Error Linear Units (GELUs)" (arXiv 1606.08415).
pub fn gelu<const D: usize>(x: Tensor<D>, form: Gelu) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) {
        return fused::gelu(x, form);
    }
    composed(x, form)
}

fn composed<const D: usize>(x: Tensor<D>, form: Gelu) -> Tensor<D> {
    match form {
        Gelu::Exact => x.clone() * (x.mul_scalar(std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
        Gelu::Tanh => {
            let argument = (x.clone() + x.clone() * x.clone().square() * CUBE).mul_scalar(SLOPE);
            x * activation::sigmoid(argument)
        }
        Gelu::Quick => x.clone() * activation::sigmoid(x.mul_scalar(QUICK)),
    }
}

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::Tensor;
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::{CUBE, Gelu, QUICK, SLOPE};
    use crate::ops::flex::{Cleared, contiguous, exp, tensor, values, vectorised};

    /// Elements that one task processes.
    const CHUNK: usize = 1 << 14;

    pub fn gelu<const D: usize>(x: Tensor<D>, form: Gelu) -> Tensor<D> {
        Tensor::from_dispatch(<Dispatch as GeluOp>::fused_gelu(x.into_dispatch(), form))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait GeluOp: Backend {
        fn fused_gelu(x: FloatTensor<Self>, form: Gelu) -> FloatTensor<Self>;
    }

    impl GeluOp for Flex {
        fn fused_gelu(x: FlexTensor, form: Gelu) -> FlexTensor {
            forward(&contiguous(x), form)
        }
    }

    impl<C: CheckpointStrategy> GeluOp for Autodiff<Flex, C> {
        fn fused_gelu(x: FloatTensor<Self>, form: Gelu) -> FloatTensor<Self> {
            let prepared = GeluBackward.prepare::<C>([x.node()]).compute_bound().stateful();
            let x = contiguous(x.into_primitive());
            let y = forward(&x, form);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((x, form), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct GeluBackward;

    impl Backward<Flex, 1> for GeluBackward {
        type State = (FlexTensor, Gelu);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (x, form) = ops.state;
            if let [Some(node)] = ops.parents {
                grads.register::<Flex>(node.id, backward(&x, &dy, form));
            }
        }
    }

    fn forward(x: &FlexTensor, form: Gelu) -> FlexTensor {
        let mut y = Cleared::new(values(x).len());
        y.parts(CHUNK).zip(values(x).par_chunks(CHUNK)).for_each(|(y, x)| {
            vectorised(
                #[inline(always)]
                || match form {
                    Gelu::Exact => each(y, x, |x| x * phi(x)),
                    Gelu::Tanh => each(y, x, |x| x * sigmoid(inner(x))),
                    Gelu::Quick => each(y, x, |x| x * sigmoid(QUICK as f32 * x)),
                },
            );
        });
        tensor(y.into_values(), x.shape())
    }

    /// Gradients of the inputs: `dy` times the derivative.
    fn backward(x: &FlexTensor, dy: &FlexTensor, form: Gelu) -> FlexTensor {
        let mut dx = Cleared::new(values(x).len());
        let inputs = values(x).par_chunks(CHUNK).zip(values(dy).par_chunks(CHUNK));
        dx.parts(CHUNK).zip(inputs).for_each(|(dx, (x, dy))| {
            vectorised(
                #[inline(always)]
                || {
                    match form {
                        Gelu::Exact => {
                            each(dx, x, |x| phi(x) + x * DENSITY * exp(-0.5 * x * x));
                        }
                        Gelu::Tanh => each(dx, x, |x| {
                            let s = sigmoid(inner(x));
                            let slope = SLOPE as f32 * (1.0 + 3.0 * CUBE as f32 * x * x);
                            s + (s * (1.0 - s)) * x * slope
                        }),
                        Gelu::Quick => each(dx, x, |x| {
                            let s = sigmoid(QUICK as f32 * x);
                            s + QUICK as f32 * x * s * (1.0 - s)
                        }),
                    }
                    for (dx, dy) in dx.iter_mut().zip(dy) {
                        *dx *= dy;
                    }
                },
            );
        });
        tensor(dx.into_values(), x.shape())
    }

    /// `1 / sqrt(2 pi)`.
    const DENSITY: f32 = 0.398_942_3;

    #[inline(always)]
    fn each(y: &mut [f32], x: &[f32], of: impl Fn(f32) -> f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = of(*x);
        }
    }

    /// Twice the argument of the hyperbolic tangent, within the range in which its sigmoid is neither 0 nor 1 by rounding alone.
    #[inline(always)]
    fn inner(x: f32) -> f32 {
        let x = x.clamp(-16.0, 16.0);
        SLOPE as f32 * (x + CUBE as f32 * x * x * x)
    }

    #[inline(always)]
    fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + exp(-x))
    }

    /// Distribution function of the normal distribution: half of `1 + erf(x / sqrt(2))`.
    #[inline(always)]
    fn phi(x: f32) -> f32 {
        0.5 + 0.5 * erf(x * std::f32::consts::FRAC_1_SQRT_2)
    }

    /// The error function to within 3e-7, without branches: a quotient of polynomials, which reaches 1 at 4.
    #[inline(always)]
    fn erf(x: f32) -> f32 {
        const ABOVE: [f32; 7] = [
            -2.726_142_3e-10,
            2.770_681_4e-8,
            -2.101_024e-6,
            -5.692_506_4e-5,
            -7.349_906_3e-4,
            -2.954_6e-3,
            -1.609_603_3e-2,
        ];
        const BELOW: [f32; 5] = [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
        let x = x.clamp(-4.0, 4.0);
        let square = x * x;
        let above = ABOVE[1..].iter().fold(ABOVE[0], |sum, next| sum.mul_add(square, *next));
        let below = BELOW[1..].iter().fold(BELOW[0], |sum, next| sum.mul_add(square, *next));
        x * above / below
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_error_function_is_close_everywhere() {
            // erf by its series, in f64.
            let exact = |x: f64| {
                let (mut term, mut sum) = (x, x);
                for n in 1..200 {
                    term *= -x * x / f64::from(n);
                    sum += term / f64::from(2 * n + 1);
                }
                sum * 2.0 / std::f64::consts::PI.sqrt()
            };
            for i in -390..390 {
                let x = i as f32 * 0.01 + 0.003;
                assert!((f64::from(erf(x)) - exact(f64::from(x))).abs() < 4e-7, "{x}: {}", erf(x));
            }
            assert!((erf(1e30) - 1.0).abs() < 3e-7 && (erf(-9.0) + 1.0).abs() < 3e-7);
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for form in [Gelu::Exact, Gelu::Tanh, Gelu::Quick] {
            for (count, scale) in [(1, 1.0), (37, 3.0), (1 << 14, 1.0), (40_000, 6.0), (50, 1e4)] {
                let check = Check::new(&[random(&[count], 3).into_iter().map(|x| x * scale).collect()]);
                check.equal(|x| gelu(x[0].clone(), form), |x| composed(x[0].clone(), form));
                if scale < 5.0 {
                    check.gradients(|x| composed(x[0].clone(), form));
                }
            }
        }
    }
}
