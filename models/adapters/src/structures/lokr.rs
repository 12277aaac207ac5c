//! A Kronecker product of two small matrices ("Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
//! Evaluation", arXiv 2309.14859), each whole or a product of two factors itself.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_kernels::ops::linear;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::initialisation::Initialisation;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::init::all_random::ALL_RANDOM;

/// The second matrix zero in place of the first, as in the authors' code.
const LYCORIS: Initialisation = Initialisation::plain("lycoris", "the second matrix zero in place of the first", &[]);

/// `y = x W + b + scale x (W_1 kron W_2)` with `W_1 [m, l]` and `W_2 [n, k]`, where `d_in = m n` and `d_out = l k`. The
/// product is never formed in the forward pass.
#[derive(Module, Debug)]
pub struct LoKr {
    /// First matrix, whole `[m, l]`, zero at the start.
    pub w1: Option<Param<Tensor<2>>>,
    /// Factor of the first matrix at the output `[r, l]`, zero at the start.
    pub w1_a: Option<Param<Tensor<2>>>,
    /// Factor of the first matrix at the input `[m, r]`.
    pub w1_b: Option<Param<Tensor<2>>>,
    /// Second matrix, whole `[n, k]`.
    pub w2: Option<Param<Tensor<2>>>,
    /// Factor of the second matrix at the output `[r, k]`.
    pub w2_a: Option<Param<Tensor<2>>>,
    /// Factor of the second matrix at the input `[n, r]`.
    pub w2_b: Option<Param<Tensor<2>>>,
    #[module(skip)]
    scale: f64,
}

/// Options of [`LoKr`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LoKrOptions {
    /// Stores the first matrix as two factors too, where that is smaller.
    pub decompose_both: bool,
    /// Size that the smaller part of each side is near to; -1 for its square root.
    #[schemars(range(min = -1))]
    pub decompose_factor: i64,
}

impl Default for LoKrOptions {
    fn default() -> Self {
        Self { decompose_both: false, decompose_factor: -1 }
    }
}

/// Two factors of a side: `factor` and the other one where it divides the side; otherwise the most equal ones whose
/// smaller, which comes first, is at most `factor`.
fn split(side: usize, factor: i64) -> [usize; 2] {
    let divides = |factor: &usize| *factor > 0 && side.is_multiple_of(*factor);
    if let Some(factor) = usize::try_from(factor).ok().filter(divides) {
        return [factor, side / factor];
    }
    let factor = usize::try_from(factor).unwrap_or(side);
    let (mut small, mut large) = (1, side);
    while small < large {
        let Some(next) = (small + 1..=side).find(|divisor| side.is_multiple_of(*divisor)) else { break };
        if next + side / next > small + large || next > factor {
            break;
        }
        (small, large) = (next, side / next);
    }
    [small.min(large), small.max(large)]
}

/// Sides of the matrices at one layer, and which are stored whole.
struct Sides {
    m: usize,
    n: usize,
    l: usize,
    k: usize,
    whole: [bool; 2],
}

impl Sides {
    fn of(options: &LoKrOptions, place: &Place) -> Self {
        let [d_in, d_out] = place.shape;
        let [m, n] = split(d_in, options.decompose_factor);
        let [l, k] = split(d_out, options.decompose_factor);
        let factored = |side: usize| 2 * place.rank < side;
        Self { m, n, l, k, whole: [!(options.decompose_both && factored(l.max(m))), !factored(k.max(n))] }
    }
}

/// Returns a matrix that is stored whole, or the product of its factors.
fn matrix(whole: &Option<Param<Tensor<2>>>, factors: [&Option<Param<Tensor<2>>>; 2]) -> Tensor<2> {
    match (whole, factors) {
        (Some(whole), _) => whole.val(),
        (None, [Some(a), Some(b)]) => b.val().matmul(a.val()),
        (None, _) => unreachable!("a matrix is whole or has two factors"),
    }
}

impl LoKr {
    fn first(&self) -> Tensor<2> {
        matrix(&self.w1, [&self.w1_a, &self.w1_b])
    }

    fn second(&self) -> Tensor<2> {
        matrix(&self.w2, [&self.w2_a, &self.w2_b])
    }

    /// Output of the branch for `x [rows, d_in]`.
    fn branch(&self, x: Tensor<2>) -> Tensor<2> {
        let (first, second) = (self.first(), self.second());
        let ([m, l], [n, k], [rows, _]) = (first.dims(), second.dims(), x.dims());
        let inner = linear(x.reshape([rows * m, n]), second).reshape([rows, m, k]).swap_dims(1, 2);
        let outer = linear(inner.reshape([rows * k, m]), first).reshape([rows, k, l]).swap_dims(1, 2);
        outer.reshape([rows, l * k]).mul_scalar(self.scale)
    }
}

impl Structure for LoKr {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus(input, |x| self.branch(x))
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        let (first, second) = (self.first(), self.second());
        let ([m, l], [n, k]) = (first.dims(), second.dims());
        let product = first.reshape([m, 1, l, 1]) * second.reshape([1, n, 1, k]);
        Some(product.reshape([m * n, l * k]).mul_scalar(self.scale))
    }
}

impl Method for LoKr {
    type Options = LoKrOptions;

    const SPEC: Spec = Spec {
        name: "lokr",
        title: "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        arxiv: "2309.14859",
        summary: "trains the Kronecker product of two small matrices",
        trains: "m l + r (n + k) with d_in = m n, d_out = l k as near to squares as possible",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Fixed(8.0),
        scaling: Scaling::Rank,
        inits: &[&LYCORIS, &ALL_RANDOM],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "w1", role: TensorRole::B, transposed: true },
            TensorSpec { name: "w1_a", role: TensorRole::B, transposed: true },
            TensorSpec { name: "w1_b", role: TensorRole::A, transposed: true },
            TensorSpec { name: "w2", role: TensorRole::A, transposed: true },
            TensorSpec { name: "w2_a", role: TensorRole::B, transposed: true },
            TensorSpec { name: "w2_b", role: TensorRole::A, transposed: true },
        ],
    };

    fn check(options: &LoKrOptions, _place: &Place) -> Result<(), String> {
        match options.decompose_factor {
            0 => Err("decompose_factor = 0: it must be -1 or at least 1".into()),
            _ => Ok(()),
        }
    }

    fn build(options: &LoKrOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let Sides { m, n, l, k, whole } = Sides::of(options, site.place);
        let (r, init) = (site.place.rank, site.place.init.clone());
        // One tensor is zero at the start: the first that the initialisation names.
        let zero = match (init.as_str(), whole) {
            (name, _) if name == ALL_RANDOM.name => "",
            (name, [_, true]) if name == LYCORIS.name => "w2",
            (name, [_, false]) if name == LYCORIS.name => "w2_b",
            (_, [true, _]) => "w1",
            (_, [false, _]) => "w1_a",
        };
        let mut tensor = |field: &str, shape: [usize; 2], fan_in: usize, is_there: bool| match is_there {
            false => Ok(None),
            true => {
                let count = shape[0] * shape[1];
                let bound = (fan_in as f64).sqrt().recip();
                let start = |site: &mut Site<'_>| {
                    Ok(if field == zero { vec![0.0; count] } else { site.uniform(field, count, bound) })
                };
                site.trained(field, shape, start).map(Some)
            }
        };
        Ok(Self {
            w1: tensor("w1", [m, l], m, whole[0])?,
            w1_a: tensor("w1_a", [r, l], r, !whole[0])?,
            w1_b: tensor("w1_b", [m, r], m, !whole[0])?,
            w2: tensor("w2", [n, k], n, whole[1])?,
            w2_a: tensor("w2_a", [r, k], r, !whole[1])?,
            w2_b: tensor("w2_b", [n, r], n, !whole[1])?,
            scale: site.place.scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, random};

    #[test]
    fn sides_are_split_near_the_factor_or_the_root() {
        for (side, factor, parts) in [
            (256, -1, [16, 16]),
            (128, -1, [8, 16]),
            (127, -1, [1, 127]),
            (128, 4, [4, 32]),
            (12, 5, [3, 4]),
            (8, 4, [4, 2]),
            (4, 4, [4, 1]),
            (28, -1, [4, 7]),
        ] {
            assert_eq!(split(side, factor), parts, "{side} {factor}");
        }
    }

    #[test]
    fn the_branch_is_the_product_with_the_dense_update() {
        for (rank, both) in [(1, true), (2, false), (9, true)] {
            let config = AdapterConfig::new("lokr").with_rank(rank).with_option("decompose_both", both);
            let bench = Bench::new(24, 30, false).moved(&config);
            let x = random([7, 24], 3);
            near(bench.branch(x.clone()), x.matmul(bench.update()), 1e-4);
        }
    }
}
