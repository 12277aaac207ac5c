//! One small trained block for each row of a weight's blocks ("Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large
//! Language Models", arXiv 2409.15371), and the shared shards that later versions of the paper call Bone, then MiSS.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::ops::PadMode;
use lowrank_optim::inverse;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use lowrank_kernels::ops::linear;

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};

/// With blocks `[r, r]` of the weight in the layout of the paper, `[d_out, d_in]`: `W_ab + W_ab D + D` with one D for
/// each `a` along the output or each `b` along the input; or `W_ab + D` with a part of D for each `a`.
#[derive(Module, Debug)]
pub struct Bone {
    /// Trained blocks, zero at the start.
    pub block: BoneBlock,
}

/// Trained blocks of [`Bone`], in the layout of the paper.
#[derive(Module, Debug)]
pub enum BoneBlock {
    /// One for each part of the output, `[d_out / r, r, r]`.
    AffineOut(Param<Tensor<3>>),
    /// One for each part of the input, `[d_in / r, r, r]`.
    AffineIn(Param<Tensor<3>>),
    /// Shared by all parts of the input, `[r, d_out]`, or `[r, m]` repeated along the output.
    Shared(Param<Tensor<2>>),
}

/// Effect of a block on the weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BoneMode {
    /// An affine map of its own for each part of the output.
    #[default]
    BlockAffineOut,
    /// An affine map of its own for each part of the input.
    BlockAffineIn,
    /// Added to every part of the input alike.
    Shared,
    /// Added to every part of input and output alike.
    SharedMini,
}

/// Options of [`Bone`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct BoneOptions {
    /// Effect of a block on the weight.
    pub mode: BoneMode,
    /// Width of the shared block of mode shared_mini; divides d_out.
    #[schemars(extend("x-unset" = "1"))]
    pub mini_r: Option<usize>,
}

/// Splits a weight `[d_in, d_out]` by the parts of its output, `[parts, r, d_in]`: the blocks `[r, r]` of a part are
/// side by side, as in the weight.
fn by_output(weight: Tensor<2>, [parts, r, _]: [usize; 3]) -> Tensor<3> {
    let [d_in, _] = weight.dims();
    weight.reshape([d_in / r, r, parts, r]).permute([2, 1, 0, 3]).reshape([parts, r, d_in])
}

fn from_output(parts: Tensor<3>) -> Tensor<2> {
    let [count, r, d_in] = parts.dims();
    parts.reshape([count, r, d_in / r, r]).permute([2, 1, 0, 3]).reshape([d_in, count * r])
}

/// Splits a weight `[d_in, d_out]` by the parts of its input, `[parts, r, d_out]`.
fn by_input(weight: Tensor<2>, [parts, r, _]: [usize; 3]) -> Tensor<3> {
    let [_, d_out] = weight.dims();
    weight.reshape([parts, r, d_out])
}

fn from_input(parts: Tensor<3>) -> Tensor<2> {
    let [count, r, d_out] = parts.dims();
    parts.reshape([count * r, d_out])
}

/// Computes `D W + D` for each part `[parts, r, n]`, where D is one of our blocks transposed and the second D is added
/// to every block of the part.
fn affine(block: Tensor<3>, parts: Tensor<3>) -> Tensor<3> {
    let [_, r, n] = parts.dims();
    let block = block.swap_dims(1, 2);
    block.clone().matmul(parts) + block.repeat_dim(2, n / r)
}

/// Recovers the weight W from `(I + D) W + D`; none if a block of `I + D` has no inverse.
fn affine_undone(block: Tensor<3>, parts: Tensor<3>) -> Option<Tensor<3>> {
    let [count, r, n] = parts.dims();
    let block = block.swap_dims(1, 2);
    let unit = Tensor::<2>::eye(r, &block.device());
    let inverses: Option<Vec<Tensor<3>>> = (0..count)
        .map(|part| {
            let block = block.clone().narrow(0, part, 1).squeeze_dim::<2>(0) + unit.clone();
            inverse(&block.without_autodiff()).map(Tensor::unsqueeze)
        })
        .collect();
    Some(Tensor::cat(inverses?, 0).matmul(parts - block.repeat_dim(2, n / r)))
}

/// Sum of the parts of `x [rows, d_in]`, `[rows, r]`; the last part may be shorter.
fn summed(x: Tensor<2>, r: usize) -> Tensor<2> {
    let [rows, d_in] = x.dims();
    let missing = d_in.next_multiple_of(r) - d_in;
    let x = if missing > 0 { x.pad((0, missing, 0, 0), PadMode::Constant(0.0)) } else { x };
    x.reshape([rows, (d_in + missing) / r, r]).sum_dim(1).squeeze_dim(1)
}

impl Bone {
    /// Update `[d_in, d_out]`.
    fn update(&self, weight: &Tensor<2>) -> Tensor<2> {
        let [d_in, d_out] = weight.dims();
        match &self.block {
            BoneBlock::AffineOut(block) => {
                from_output(affine(block.val(), by_output(weight.clone(), block.val().dims())))
            }
            BoneBlock::AffineIn(block) => from_input(affine(block.val(), by_input(weight.clone(), block.val().dims()))),
            BoneBlock::Shared(block) => {
                let [r, width] = block.val().dims();
                let rows = block.val().repeat_dim(0, d_in.div_ceil(r)).narrow(0, 0, d_in);
                rows.repeat_dim(1, d_out / width)
            }
        }
    }
}

impl Structure for Bone {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let [_, d_out] = base.shape();
        match &self.block {
            BoneBlock::AffineOut(_) => {
                let update = self.update(&base.weight());
                base.plus_update(input.x, update)
            }
            // W_ab D_b x_b: the block is applied to the input, before the weight.
            BoneBlock::AffineIn(block) => {
                let [parts, r, _] = block.val().dims();
                let [rows, d_in] = input.x.dims();
                let x = input.x.clone().reshape([rows, parts, r]).swap_dims(0, 1);
                let mapped = x.matmul(block.val().swap_dims(1, 2));
                let added = mapped.clone().sum_dim(0).squeeze_dim::<2>(0).repeat_dim(1, d_out / r);
                base.forward(input.x + mapped.swap_dims(0, 1).reshape([rows, d_in])) + added
            }
            BoneBlock::Shared(block) => {
                let [r, width] = block.val().dims();
                base.plus(input, |x| linear(summed(x, r), block.val()).repeat_dim(1, d_out / width))
            }
        }
    }

    fn delta_weight(&self, weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.update(weight))
    }

    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        match &self.block {
            BoneBlock::AffineOut(block) => {
                affine_undone(block.val(), by_output(merged, block.val().dims())).map(from_output)
            }
            BoneBlock::AffineIn(block) => {
                affine_undone(block.val(), by_input(merged, block.val().dims())).map(from_input)
            }
            BoneBlock::Shared(_) => {
                let update = self.update(&merged);
                Some(merged - update)
            }
        }
    }
}

impl Method for Bone {
    type Options = BoneOptions;

    const LR: f64 = 2e-5;

    const SPEC: Spec = Spec {
        name: "bone",
        title: "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        arxiv: "2409.15371",
        summary: "one small trained block for each row of a weight's blocks, or one shared by all",
        trains: "r d_out; r d_in with block_affine_in, r mini_r with shared_mini",
        stores: "",
        dense_forward: true,
        rank: Rank::Fixed(64),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[TensorSpec { name: "block", role: TensorRole::Block, transposed: false }],
    };

    fn check(options: &BoneOptions, place: &Place) -> Result<(), String> {
        let ([d_in, d_out], rank) = (place.shape, place.rank);
        if options.mini_r.is_some() && options.mode != BoneMode::SharedMini {
            return Err("mini_r belongs to mode shared_mini; take it away".into());
        }
        let affine = matches!(options.mode, BoneMode::BlockAffineOut | BoneMode::BlockAffineIn);
        let width = options.mini_r.unwrap_or(1);
        if rank == 0 {
            Err("rank must be at least 1".into())
        } else if affine && place.dropout > 0.0 {
            Err(format!("dropout {} belongs to the shared modes; take it away", place.dropout))
        } else if affine && !(d_in.is_multiple_of(rank) && d_out.is_multiple_of(rank)) {
            Err(format!("blocks of rank {rank} must divide both sides"))
        } else if !affine && rank > d_in {
            Err(format!("rank {rank} is larger than d_in"))
        } else if options.mode == BoneMode::SharedMini && (width == 0 || !d_out.is_multiple_of(width)) {
            Err(format!("mini_r {width} does not divide d_out"))
        } else {
            Ok(())
        }
    }

    fn build(options: &BoneOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], r) = (site.place.shape, site.place.rank);
        let blocks =
            |site: &mut Site<'_>, count: usize| site.trained("block", [count, r, r], |_| Ok(vec![0.0; count * r * r]));
        let shared =
            |site: &mut Site<'_>, width: usize| site.trained("block", [r, width], |_| Ok(vec![0.0; r * width]));
        let block = match options.mode {
            BoneMode::BlockAffineOut => BoneBlock::AffineOut(blocks(site, d_out / r)?),
            BoneMode::BlockAffineIn => BoneBlock::AffineIn(blocks(site, d_in / r)?),
            BoneMode::Shared => BoneBlock::Shared(shared(site, d_out)?),
            BoneMode::SharedMini => BoneBlock::Shared(shared(site, options.mini_r.unwrap_or(1))?),
        };
        Ok(Self { block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, Tensors, close, largest, matrix, near};

    const MODES: [&str; 4] = ["block_affine_out", "block_affine_in", "shared", "shared_mini"];

    fn config(mode: &str) -> AdapterConfig {
        let config = AdapterConfig::new("bone").with_rank(4).with_option("mode", mode);
        if mode == "shared_mini" { config.with_option("mini_r", 6) } else { config }
    }

    #[test]
    fn every_mode_starts_as_the_base_learns_at_once_merges_and_comes_off() {
        for mode in MODES {
            let bench = Bench::new(20, 12, true);
            let start = bench.with(&config(mode));
            assert_eq!(largest(start.output() - bench.output()), 0.0);
            assert!(start.gradient(start.gradients(), "block").iter().all(|gradient| *gradient != 0.0));
            let moved = bench.moved(&config(mode));
            near(moved.output(), moved.merge().output(), 1e-5);
            let back = moved.adapter().structure().unmerged(moved.merged()).expect("blocks that can be inverted");
            assert!(close(back, bench.weight(), 1e-5), "{mode}");
        }
        // -1 on the diagonal of D removes the weight entirely.
        let bench = Bench::new(8, 8, false);
        let mut tensors = bench.with(&config("block_affine_out")).tensors();
        Bench::change(&mut tensors, "block", |place, _| if place % 16 % 5 == 0 { -1.0 } else { 0.0 });
        let gone = bench.with_tensors(&config("block_affine_out"), tensors);
        assert!(gone.adapter().structure().unmerged(gone.merged()).is_none());
    }

    #[test]
    fn affine_blocks_without_a_weight_are_shared_ones_and_multiples_of_the_unit_scale() {
        let none = Bench::of(matrix(8, 12, 0.0), None);
        let affine = none.moved(&config("block_affine_out"));
        // Row block a of the update is [D_a D_a ...]; of shared shards, D[i mod r, o] for output o.
        let blocks = affine.values("block");
        let shards = (0..48).map(|place| {
            let (i, o) = (place / 12, place % 12);
            blocks[o / 4 * 16 + o % 4 * 4 + i]
        });
        let tensors = Tensors::from([("block".into(), (shards.collect(), vec![4, 12]))]);
        near(none.with_tensors(&config("shared"), tensors).merged(), affine.merged(), 1e-6);

        let bench = Bench::new(8, 12, false);
        for mode in ["block_affine_out", "block_affine_in"] {
            let mut tensors = bench.with(&config(mode)).tensors();
            Bench::change(&mut tensors, "block", |place, _| if place % 16 % 5 == 0 { 0.5 } else { 0.0 });
            let units = Tensor::<2>::eye(4, &Default::default()).repeat_dim(0, 2).repeat_dim(1, 3);
            let expected = (bench.weight() + units) * 0.5;
            near(bench.with_tensors(&config(mode), tensors).merged() - bench.weight(), expected, 1e-6);
        }
    }

    #[test]
    fn a_last_part_that_is_shorter_counts_as_filled_with_zeros() {
        let moved = Bench::new(10, 6, false).moved(&config("shared"));
        let zeros = Tensor::zeros([2, 6], &Default::default());
        let filled = Bench::of(Tensor::cat(vec![moved.weight(), zeros], 0), None);
        let filled = filled.with_tensors(&config("shared"), moved.tensors());
        let x = moved.input(3);
        let padded = Tensor::cat(vec![x.clone(), Tensor::zeros([3, 2], &x.device())], 1);
        near(filled.forward(padded), moved.forward(x), 1e-6);
    }
}
