//! Trained rotations of the inputs ("Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280;
//! applied to the inputs and by a series as in "Orthogonal Finetuning Made Scalable", arXiv 2506.19847).

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::inverse;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::init::all_random::ALL_RANDOM;

/// `y = (x R) W + b`, where R is a block diagonal matrix of rotations, each the Cayley transform
/// `(I - Q) (I + Q)^-1` of a skew-symmetric Q, or the first terms of a series.
#[derive(Module, Debug)]
pub struct Oft {
    /// Elements of each Q above its diagonal, row by row: `[blocks, size (size - 1) / 2]`, one block if all share it.
    pub r: Param<Tensor<2>>,
    #[module(skip)]
    layout: Blocks,
    #[module(skip)]
    options: OftOptions,
}

/// Options of [`Oft`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct OftOptions {
    /// Side of the rotations; where it does not divide d_in, the nearest divisor.
    #[schemars(range(min = 2))]
    pub oft_block_size: usize,
    /// Number of rotations in place of their side; 0 for none. Where it does not divide d_in, the nearest divisor.
    pub blocks: usize,
    /// Uses one rotation for all blocks.
    pub block_share: bool,
    /// Keeps the rotations near the identity: Q is scaled down to the length `eps` / sqrt(blocks) before use.
    pub coft: bool,
    /// Largest length with `coft`.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub eps: f64,
    /// Approximates the rotations by a series of Q, which is faster and only nearly orthogonal.
    pub use_cayley_neumann: bool,
    /// Terms of the series.
    #[schemars(range(min = 2, max = 1000))]
    pub num_cayley_neumann_terms: usize,
}

impl Default for OftOptions {
    fn default() -> Self {
        Self {
            oft_block_size: 32,
            blocks: 0,
            block_share: false,
            coft: false,
            eps: 6e-5,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
        }
    }
}

/// Number and side of the rotations of one layer.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    count: usize,
    size: usize,
}

impl Blocks {
    fn of(options: &OftOptions, d_in: usize) -> Self {
        match options.blocks {
            0 => {
                let size = divisor(d_in, options.oft_block_size);
                Self { count: d_in / size, size }
            }
            blocks => {
                let count = divisor(d_in, blocks);
                Self { count, size: d_in / count }
            }
        }
    }
}

/// The divisor of a side that is nearest to the requested number, the lower one of two; the side for a larger number.
fn divisor(side: usize, asked: usize) -> usize {
    let divides = |number: &usize| side.is_multiple_of(*number);
    let above = (asked..=side).find(divides).unwrap_or(side);
    match (1..=asked.min(side)).rev().find(divides) {
        Some(below) if asked < side && asked - below <= above - asked => below,
        _ => above,
    }
}

impl Oft {
    /// Skew-symmetric matrices `[blocks, size, size]` of their upper elements.
    fn skew(&self) -> Tensor<3> {
        let size = self.layout.size;
        let (mut upper, mut place) = (vec![0i32; size * size], 0);
        let mut signs = vec![0f32; size * size];
        for row in 0..size {
            for column in row + 1..size {
                (upper[row * size + column], upper[column * size + row]) = (place, place);
                (signs[row * size + column], signs[column * size + row]) = (1.0, -1.0);
                place += 1;
            }
        }
        let elements = self.elements();
        let ([blocks, _], device) = (elements.dims(), elements.device().inner());
        let upper = Tensor::<1, Int>::from_data(TensorData::new(upper, [size * size]), (&device, DType::I32));
        let signs = Tensor::<2>::from_data(TensorData::new(signs, [1, size * size]), (&device, DType::F32));
        (elements.select(1, upper) * signs).reshape([blocks, size, size])
    }

    /// The elements, scaled down to the allowed length. The gradient passes as if they were not.
    fn elements(&self) -> Tensor<2> {
        let elements = self.r.val();
        if !self.options.coft {
            return elements;
        }
        let plain = elements.clone().detach();
        let largest = self.options.eps / (plain.dims()[0] as f64).sqrt();
        // Each element stands in Q twice.
        let lengths = plain.clone().square().sum_dim(1).mul_scalar(2.0).sqrt();
        let shorter = lengths.clone().recip().mul_scalar(largest);
        let factor = shorter.mask_fill(lengths.lower_equal_elem(largest), 1.0);
        elements + plain.clone() * factor - plain
    }

    /// Rotations `[count, size, size]`.
    fn rotations(&self) -> Tensor<3> {
        let skew = self.skew();
        let ([blocks, size, _], device) = (skew.dims(), skew.device().inner());
        let unit = Tensor::<2>::eye(size, &device).unsqueeze::<3>().repeat_dim(0, blocks);
        let rotations = match self.options.use_cayley_neumann {
            true => series(unit, skew, self.options.num_cayley_neumann_terms),
            false => (unit.clone() - skew.clone()).matmul(inverted(unit + skew)),
        };
        if blocks < self.layout.count { rotations.repeat_dim(0, self.layout.count) } else { rotations }
    }

    /// `R` times the rows of a matrix `[d_in, n]`, with `R [count, size, size]`.
    fn rotated(&self, rotations: Tensor<3>, matrix: Tensor<2>) -> Tensor<2> {
        let ([d_in, n], Blocks { count, size }) = (matrix.dims(), self.layout);
        rotations.matmul(matrix.reshape([count, size, n])).reshape([d_in, n])
    }
}

/// `I + 2 Q + 2 Q^2 + ... + Q^last` with so many terms: as `peft` adds them, the last one once.
fn series(unit: Tensor<3>, skew: Tensor<3>, terms: usize) -> Tensor<3> {
    let mut sum = unit + skew.clone().mul_scalar(2.0);
    if terms > 2 {
        let mut power = skew.clone().matmul(skew.clone());
        sum = sum + power.clone().mul_scalar(2.0);
        for _ in 3..terms.saturating_sub(1) {
            power = power.matmul(skew.clone());
            sum = sum + power.clone().mul_scalar(2.0);
        }
        sum = sum + power.matmul(skew);
    }
    sum
}

/// Inverses of matrices `[blocks, n, n]`, with their gradient; computed in f64.
fn inverted(matrices: Tensor<3>) -> Tensor<3> {
    let [blocks, n, _] = matrices.dims();
    let device = matrices.device().inner();
    let values = host(matrices.clone().without_autodiff());
    let inverses: Vec<f32> = values.chunks(n * n).flat_map(|block| inverse_of(block, n)).collect();
    let inverses = Tensor::<3>::from_data(TensorData::new(inverses, [blocks, n, n]), (&device, DType::F32));
    // One step of Newton's iteration with a constant start: the inverse, with the inverse's derivative.
    inverses.clone().mul_scalar(2.0) - inverses.clone().matmul(matrices).matmul(inverses)
}

/// Inverse of one matrix by elimination. `I + Q` has no pivot below 1.
fn inverse_of(block: &[f32], n: usize) -> Vec<f32> {
    let mut left: Vec<f64> = block.iter().map(|value| f64::from(*value)).collect();
    let mut right: Vec<f64> = (0..n * n).map(|place| if place / n == place % n { 1.0 } else { 0.0 }).collect();
    for pivot in 0..n {
        let scale = left[pivot * n + pivot].recip();
        for column in 0..n {
            left[pivot * n + column] *= scale;
            right[pivot * n + column] *= scale;
        }
        for row in (0..n).filter(|row| *row != pivot) {
            let factor = left[row * n + pivot];
            for column in 0..n {
                left[row * n + column] -= factor * left[pivot * n + column];
                right[row * n + column] -= factor * right[pivot * n + column];
            }
        }
    }
    right.into_iter().map(|value| value as f32).collect()
}

impl Structure for Oft {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let ([rows, d_in], Blocks { count, size }) = (input.x.dims(), self.layout);
        let parts = input.x.reshape([rows, count, size]).swap_dims(0, 1);
        base.forward(parts.matmul(self.rotations()).swap_dims(0, 1).reshape([rows, d_in]))
    }

    fn delta_weight(&self, weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.rotated(self.rotations(), weight.clone()) - weight.clone())
    }

    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let rotations = self.rotations().without_autodiff();
        if !self.options.use_cayley_neumann {
            return Some(self.rotated(rotations.swap_dims(1, 2), merged));
        }
        let blocks = (0..self.layout.count).map(|block| rotations.clone().narrow(0, block, 1).squeeze_dim::<2>(0));
        let inverses: Option<Vec<Tensor<3>>> = blocks.map(|block| inverse(&block).map(Tensor::unsqueeze)).collect();
        Some(self.rotated(Tensor::cat(inverses?, 0), merged))
    }
}

impl Method for Oft {
    type Options = OftOptions;

    const SPEC: Spec = Spec {
        name: "oft",
        title: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
        arxiv: "2306.07280",
        summary: "trains rotations of the inputs, block by block",
        trains: "d_in (oft_block_size - 1) / 2; one block of them with block_share",
        stores: "",
        dense_forward: false,
        rank: Rank::None,
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[&ALL_RANDOM],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[TensorSpec { name: "r", role: TensorRole::Block, transposed: false }],
    };

    fn check(options: &OftOptions, place: &Place) -> Result<(), String> {
        match Blocks::of(options, place.shape[0]) {
            Blocks { size: 1, .. } => Err("rotations of one input do nothing: give larger blocks".into()),
            _ => Ok(()),
        }
    }

    fn build(options: &OftOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let layout = Blocks::of(options, site.place.shape[0]);
        let shape = [if options.block_share { 1 } else { layout.count }, layout.size * (layout.size - 1) / 2];
        let count = shape[0] * shape[1];
        let random = site.place.init == ALL_RANDOM.name;
        let r =
            site.trained("r", shape, |site| Ok(if random { site.normal("r", count, 0.1) } else { vec![0.0; count] }))?;
        Ok(Self { r, layout, options: options.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, close, near, norm};

    fn config(exact: bool) -> AdapterConfig {
        AdapterConfig::new("oft").with_option("oft_block_size", 4).with_option("use_cayley_neumann", !exact)
    }

    #[test]
    fn the_nearest_divisor_is_used_and_the_lower_of_two() {
        for (side, asked, used) in
            [(28, 4, 4), (28, 5, 4), (28, 6, 7), (28, 10, 7), (12, 5, 4), (12, 32, 12), (7, 3, 1)]
        {
            assert_eq!(divisor(side, asked), used, "{side} {asked}");
        }
    }

    #[test]
    fn rotations_keep_the_length_of_inputs_and_the_series_nearly() {
        for exact in [true, false] {
            let bench = Bench::new(12, 6, true).moved(&config(exact));
            let adapter = bench.adapter();
            let Some(oft) = adapter.structure.downcast_ref::<Oft>() else { unreachable!() };
            let r = oft.rotations().inner();
            let square = r.clone().matmul(r.swap_dims(1, 2));
            let unit = Tensor::<2>::eye(4, &Default::default()).unsqueeze::<3>().repeat_dim(0, 3);
            let apart = norm(square - unit);
            assert!(if exact { apart < 1e-6 } else { apart > 1e-6 && apart < 0.5 }, "{apart}");
            near(bench.merge().output(), bench.output(), 1e-5);
            let back = adapter.structure().unmerged(bench.merged()).expect("an invertible rotation");
            near(back, Bench::new(12, 6, true).weight(), 1e-5);
        }
    }

    #[test]
    fn gradients_of_the_exact_transform_are_those_of_small_differences() {
        let bare = Bench::new(12, 6, false);
        let bench = bare.moved(&config(true));
        let gradients = bench.gradient(bench.gradients(), "r");
        let loss = |at: usize, step: f32| {
            let mut tensors = bench.tensors();
            Bench::change(&mut tensors, "r", |place, value| value + if place == at { step } else { 0.0 });
            let moved = bare.with_tensors(&config(true), tensors);
            let error = moved.output() - crate::bench::matrix(5, 6, 0.53).autodiff();
            f64::from(error.square().mean().mul_scalar(0.5).into_scalar::<f32>())
        };
        for at in [0, 7, 17] {
            let measured = (loss(at, 1e-2) - loss(at, -1e-2)) / 2e-2;
            let apart = (f64::from(gradients[at]) - measured).abs();
            assert!(apart < 2e-3 * measured.abs().max(0.05), "{at}: {} and {measured}", gradients[at]);
        }
    }

    #[test]
    fn shared_and_constrained_rotations_follow_from_their_options() {
        let shared = Bench::new(12, 6, false).moved(&config(true).with_option("block_share", true));
        assert_eq!(shared.tensor::<2>("r").dims(), [1, 6]);
        near(shared.merge().output(), shared.output(), 1e-5);
        let near_unit = config(true).with_option("coft", true).with_option("eps", 1e-3);
        let constrained = Bench::new(12, 6, false).moved(&near_unit);
        assert!(close(constrained.output(), Bench::new(12, 6, false).output(), 1e-2));
        assert!(constrained.gradient(constrained.gradients(), "r").iter().all(|gradient| *gradient != 0.0));
    }
}
