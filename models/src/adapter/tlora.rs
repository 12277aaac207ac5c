//! A transform of the weight beside a small residual ("Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to
//! Text-to-image Models", arXiv 2501.08727). Written from the text of the paper; the authors' code could not be read.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::base::{Base, Input};
use super::config::Scaling;
use super::error::AdapterError;
use super::modes::modes;
use super::site::{Place, Site};
use super::structure::{Alpha, Method, Penalty, PenaltyAt, Rank, Spec, Structure, TensorRole, TensorSpec};

/// `y = (x T^T) W + b + x D`: the transform `T [d_in, d_in]` is a tensor ring over the modes of the input, dense and of full rank however small
/// its cores are; the residual `D [d_in, d_out]` is another ring, or LoRA.
///
/// The transform acts core by core. The residual runs as two factors: those of a ring of rank R meet in R x R values.
#[derive(Module, Debug)]
pub struct TLora {
    /// Cores of the transform `[mode, mode, ring rank, ring rank]`.
    pub t: Vec<Param<Tensor<4>>>,
    /// Cores of the residual over the modes of the output `[mode, rank, rank]`, the first zero at the start; none with LoRA.
    pub b: Vec<Param<Tensor<3>>>,
    /// Cores of the residual over the modes of the input `[mode, rank, rank]`; none with LoRA.
    pub c: Vec<Param<Tensor<3>>>,
    /// First factor of the residual `[d_in, rank]`, with LoRA.
    pub lora_a: Option<Param<Tensor<2>>>,
    /// Second factor of the residual `[rank, d_out]`, zero at the start, with LoRA.
    pub lora_b: Option<Param<Tensor<2>>>,
    #[module(skip)]
    regulariser: Regulariser,
    #[module(skip)]
    reg_weight: f64,
    #[module(skip)]
    reg_squared: bool,
    #[module(skip)]
    scale: f64,
}

/// What is added to the transformed weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Residual {
    /// A tensor ring.
    #[default]
    Tr,
    /// A product of two factors.
    Lora,
}

/// Where a penalty pulls the transform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Regulariser {
    /// Nowhere.
    #[default]
    None,
    /// To the identity.
    Identity,
    /// To orthogonal matrices.
    Orthogonal,
}

/// Options of [`TLora`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TLoraOptions {
    /// Modes of the input; two near-square ones when empty.
    pub in_dims: Vec<usize>,
    /// Modes of the output, for a ring; two near-square ones when empty.
    pub out_dims: Vec<usize>,
    /// Ring rank of the transform.
    pub transform_rank: usize,
    /// Form of the residual.
    pub residual: Residual,
    /// Deviation of normal noise on the transform's cores at the start, over the ring rank.
    pub init_noise: f64,
    /// The penalty.
    pub regulariser: Regulariser,
    /// Weight of the penalty in the loss.
    pub reg_weight: f64,
    /// Whether the norms in the penalty are squared.
    pub reg_squared: bool,
}

impl Default for TLoraOptions {
    fn default() -> Self {
        Self {
            in_dims: Vec::new(),
            out_dims: Vec::new(),
            transform_rank: 2,
            residual: Residual::Tr,
            init_noise: 0.0,
            regulariser: Regulariser::None,
            reg_weight: 0.01,
            reg_squared: false,
        }
    }
}

/// Product of ring cores `[mode, rank, rank]` over all modes: `[product of the modes, rank, rank]`.
fn chain(cores: &[Param<Tensor<3>>]) -> Tensor<3> {
    let product = cores.iter().map(Param::val).reduce(|product, core| {
        let ([count, rank, _], [mode, _, _]) = (product.dims(), core.dims());
        let core = core.swap_dims(0, 1).reshape([rank, mode * rank]);
        let next = product.reshape([count * rank, rank]).matmul(core).reshape([count, rank, mode, rank]);
        next.swap_dims(1, 2).reshape([count * mode, rank, rank])
    });
    match product {
        Some(product) => product,
        None => unreachable!("both sides have at least one mode"),
    }
}

/// `x T^T` core by core, from the last mode to the first: `x [rows, d_in]`.
fn transformed(x: Tensor<2>, cores: &[Param<Tensor<4>>]) -> Tensor<2> {
    let [rows, d_in] = x.dims();
    let Some((first, others)) = cores.split_first() else { unreachable!("the input has at least one mode") };
    let [mode, _, rank, _] = first.dims();
    let Some((last, between)) = others.split_last() else {
        // A ring of one core is the trace over its ranks.
        let sum = (0..rank).map(|r| first.val().slice([0..mode, 0..mode, r..r + 1, r..r + 1]).reshape([mode, mode]));
        return match sum.reduce(|sum, slice| sum + slice) {
            Some(matrix) => x.matmul(matrix.transpose()),
            None => unreachable!("a ring has a rank of at least one"),
        };
    };
    // [rows and modes before, left rank, closing rank, modes after]
    let mut after = last.dims()[0];
    let matrix = last.val().permute([1, 2, 3, 0]).reshape([after, rank * rank * after]);
    let mut state = x.reshape([rows * d_in / after, after]).matmul(matrix);
    for core in between.iter().rev() {
        let mode = core.dims()[0];
        let before = rows * d_in / (mode * after);
        let matrix = core.val().permute([1, 3, 2, 0]).reshape([mode * rank, rank * mode]);
        let rows = state.reshape([before, mode * rank, rank * after]).swap_dims(1, 2);
        let next = rows.reshape([before * rank * after, mode * rank]).matmul(matrix);
        let next = next.reshape([before, rank, after, rank, mode]).permute([0, 3, 1, 4, 2]);
        after *= mode;
        state = next.reshape([before, rank * rank * after]);
    }
    let matrix = first.val().permute([1, 3, 2, 0]).reshape([mode * rank * rank, mode]);
    let columns = state.reshape([rows, mode * rank * rank, after]).swap_dims(1, 2);
    let next = columns.reshape([rows * after, mode * rank * rank]).matmul(matrix);
    next.reshape([rows, after, mode]).swap_dims(1, 2).reshape([rows, d_in])
}

/// Sum of the roots, with slope 0 where they are 0.
fn sum_of_roots<const D: usize>(squares: Tensor<D>) -> Tensor<1> {
    let zero = squares.clone().equal_elem(0.0);
    squares.mask_fill(zero.clone(), 1.0).sqrt().mask_fill(zero, 0.0).sum()
}

impl TLora {
    /// The transform `T [d_in, d_in]`.
    pub fn transform(&self) -> Tensor<2> {
        let d_in = self.t.iter().map(|core| core.dims()[0]).product();
        transformed(Tensor::eye(d_in, &self.t[0].device()), &self.t).transpose()
    }

    /// The residual as a product `[d_in, r]` and `[r, d_out]`.
    pub fn residual(&self) -> [Tensor<2>; 2] {
        if let (Some(a), Some(b)) = (&self.lora_a, &self.lora_b) {
            return [a.val(), b.val().mul_scalar(self.scale)];
        }
        let (inputs, outputs) = (chain(&self.c), chain(&self.b));
        let ([d_in, rank, _], [d_out, _, _]) = (inputs.dims(), outputs.dims());
        // The ring closes: what leaves the inputs enters the outputs.
        let outputs = outputs.permute([2, 1, 0]).reshape([rank * rank, d_out]);
        [inputs.reshape([d_in, rank * rank]), outputs]
    }

    /// How far the transform's cores are from those of the identity, or from those of orthogonal matrices; 0 for neither.
    pub fn distance(&self, regulariser: Regulariser) -> Tensor<1> {
        let terms = self.t.iter().map(|core| {
            let ([mode, _, rank, _], device) = (core.dims(), core.device());
            let share = (rank as f32).recip();
            let squares = match regulariser {
                Regulariser::None => return Tensor::zeros([1], &device),
                Regulariser::Identity => {
                    let identity = Tensor::<2>::eye(mode, &device).mul_scalar(share).reshape([mode, mode, 1, 1]);
                    (core.val() - identity).square().sum_dim(0).sum_dim(1)
                }
                Regulariser::Orthogonal => {
                    let pairs = rank * rank;
                    // The cores of T T^T, [mode, pair of ranks, mode, pair of ranks].
                    let rows = core.val().swap_dims(1, 2).swap_dims(2, 3).reshape([mode * pairs, mode]);
                    let gram = rows.clone().matmul(rows.transpose()).reshape([mode, pairs, mode, pairs]);
                    // Rounded as the product of two shares is, so that the difference is 0 at the start.
                    let identity = Tensor::<2>::eye(mode, &device).mul_scalar(share * share);
                    (gram - identity.reshape([mode, 1, mode, 1])).square().sum_dim(0).sum_dim(2)
                }
            };
            if self.reg_squared { squares.sum() } else { sum_of_roots(squares) }
        });
        match terms.reduce(|sum, term| sum + term) {
            Some(sum) => sum,
            None => unreachable!("the input has at least one mode"),
        }
    }
}

impl Structure for TLora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let [a, b] = self.residual();
        let residual = input.x.clone().matmul(a).matmul(b);
        base.forward(transformed(input.x, &self.t)) + residual
    }

    fn update(&self, weight: &Tensor<2>) -> Tensor<2> {
        let [a, b] = self.residual();
        let d_in = weight.dims()[0];
        let change = self.transform().transpose() - Tensor::eye(d_in, &weight.device());
        change.matmul(weight.clone()) + a.matmul(b)
    }

    /// A transform need not have an inverse worth the name.
    fn unmerged(&self, _merged: Tensor<2>) -> Option<Tensor<2>> {
        None
    }

    fn penalty(&self) -> Option<Penalty> {
        if self.regulariser == Regulariser::None || self.reg_weight == 0.0 {
            return None;
        }
        let value = self.distance(self.regulariser).mul_scalar(self.reg_weight);
        Some(Penalty { at: PenaltyAt::Loss, value })
    }
}

impl Method for TLora {
    type Options = TLoraOptions;

    const LR: f64 = 1e-4;

    const SPEC: Spec = Spec {
        name: "tlora",
        title: "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
        arxiv: "2501.08727",
        trains: "transform_rank^2 times the sum of the squared input modes + r^2 times the sum of all modes, or + r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(6),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        peft_type: "TLORA",
        tensors: &[
            TensorSpec { name: "t", role: TensorRole::Transform, turned: false },
            TensorSpec { name: "b", role: TensorRole::Block, turned: false },
            TensorSpec { name: "c", role: TensorRole::Block, turned: false },
            TensorSpec { name: "lora_a", role: TensorRole::A, turned: true },
            TensorSpec { name: "lora_b", role: TensorRole::B, turned: true },
        ],
        options: &[
            ("in_dims", "modes of the input, whose product is d_in; two near-square ones when empty"),
            ("out_dims", "modes of the output, whose product is d_out; two near-square ones when empty"),
            ("transform_rank", "ring rank of the transform, at least 1"),
            ("residual", "tr, a tensor ring of the rank (6 when not given), or lora (rank 4 when not given)"),
            (
                "init_noise",
                "deviation of noise on the transform's cores over their rank, 0 or more; 0.001 parts equal ranks",
            ),
            ("regulariser", "where a penalty pulls the transform: none, identity, or orthogonal"),
            ("reg_weight", "weight of the penalty in the loss, 0 or more"),
            ("reg_squared", "true squares the norms in the penalty"),
        ],
    };

    fn size(options: &TLoraOptions) -> (Rank, Alpha) {
        let rank = if options.residual == Residual::Lora { Rank::Fixed(4) } else { Self::SPEC.rank };
        (rank, Self::SPEC.alpha)
    }

    fn check(options: &TLoraOptions, place: &Place) -> Result<(), String> {
        modes("in_dims", &options.in_dims, place.shape[0])?;
        modes("out_dims", &options.out_dims, place.shape[1])?;
        let weights = [("init_noise", options.init_noise), ("reg_weight", options.reg_weight)];
        if let Some((name, value)) = weights.iter().find(|(_, value)| *value < 0.0 || !value.is_finite()) {
            return Err(format!("{name} = {value}: it must be 0 or more"));
        }
        match options.transform_rank {
            0 => Err("transform_rank must be at least 1".into()),
            _ if options.residual == Residual::Tr && place.scale != 1.0 => {
                Err(format!("a tensor ring is not scaled, and alpha = {} does; leave alpha out", place.alpha))
            }
            _ => Ok(()),
        }
    }

    fn build(options: &TLoraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank, ring) = (site.place.shape, site.place.rank, options.transform_rank);
        let inputs = modes("in_dims", &options.in_dims, d_in).map_err(AdapterError::Refused)?;
        let outputs = modes("out_dims", &options.out_dims, d_out).map_err(AdapterError::Refused)?;
        let mut t = Vec::new();
        for (place, mode) in inputs.iter().copied().enumerate() {
            let field = format!("t.{place}");
            let start = |site: &mut Site<'_>| {
                let mut values = site.normal(&field, mode * mode * ring * ring, options.init_noise / ring as f64);
                for diagonal in values.chunks_mut(ring * ring).step_by(mode + 1) {
                    diagonal.iter_mut().for_each(|value| *value += (ring as f32).recip());
                }
                Ok(values)
            };
            t.push(site.trained(&field, [mode, mode, ring, ring], start)?);
        }
        let (mut b, mut c, mut lora_a, mut lora_b) = (Vec::new(), Vec::new(), None, None);
        match options.residual {
            Residual::Tr => {
                let core = |site: &mut Site<'_>, field: String, mode: usize| {
                    let std = if field == "b.0" { 0.0 } else { (mode as f64 * (rank as f64).sqrt()).recip() };
                    let start = |site: &mut Site<'_>| Ok(site.normal(&field, mode * rank * rank, std));
                    site.trained(&field, [mode, rank, rank], start)
                };
                for (place, mode) in outputs.into_iter().enumerate() {
                    b.push(core(site, format!("b.{place}"), mode)?);
                }
                for (place, mode) in inputs.into_iter().enumerate() {
                    c.push(core(site, format!("c.{place}"), mode)?);
                }
            }
            Residual::Lora => {
                let bound = (d_in as f64).sqrt().recip();
                let start = |site: &mut Site<'_>| Ok(site.uniform("lora_a", d_in * rank, bound));
                lora_a = Some(site.trained("lora_a", [d_in, rank], start)?);
                lora_b = Some(site.trained("lora_b", [rank, d_out], |_| Ok(vec![0.0; rank * d_out]))?);
            }
        }
        Ok(Self {
            t,
            b,
            c,
            lora_a,
            lora_b,
            regulariser: options.regulariser,
            reg_weight: options.reg_weight,
            reg_squared: options.reg_squared,
            scale: site.place.scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::adapter::bench::{Bench, near, norm, random, rank};
    use crate::adapter::{AdapterConfig, AnyStructure, penalty};
    use crate::weights::host;
    use burn::module::ParamId;
    use burn::optim::GradientsParams;
    use burn::tensor::Device;
    use serde_json::json;

    fn config(in_dims: &[usize], out_dims: &[usize], transform_rank: usize) -> AdapterConfig {
        let config = AdapterConfig::new("tlora").with_rank(2).with_option("transform_rank", transform_rank);
        config.with_option("in_dims", json!(in_dims)).with_option("out_dims", json!(out_dims))
    }

    fn tlora(bench: &Bench) -> TLora {
        match bench.adapter().structure {
            AnyStructure::TLora(tlora) => tlora,
            other => unreachable!("{other:?}"),
        }
    }

    /// An adapter of random tensors on a layer with modes of this kind.
    fn given(config: &AdapterConfig, in_dims: &[usize], out_dims: &[usize], ring: usize) -> Bench {
        let name = |list: &str, place: usize| format!("{list}.{place}");
        let mut tensors = Vec::new();
        for (place, mode) in in_dims.iter().copied().enumerate() {
            tensors.push((name("t", place), vec![mode, mode, ring, ring]));
            tensors.push((name("c", place), vec![mode, 2, 2]));
        }
        tensors.extend(out_dims.iter().enumerate().map(|(place, mode)| (name("b", place), vec![*mode, 2, 2])));
        let shape = [in_dims.iter().product(), out_dims.iter().product()];
        Bench::filled(config, shape, &tensors)
    }

    /// The transform by its definition.
    fn by_definition(tlora: &TLora) -> Tensor<2> {
        let cores: Vec<Tensor<4>> = tlora.t.iter().map(|core| core.val().inner()).collect();
        let rank = cores[0].dims()[2];
        let side: usize = cores.iter().map(|core| core.dims()[0]).product();
        let digits = |mut number: usize| {
            let mut digits: Vec<usize> = Vec::new();
            for core in cores.iter().rev() {
                digits.insert(0, number % core.dims()[0]);
                number /= core.dims()[0];
            }
            digits
        };
        let entry = |row: usize, column: usize| {
            let slices = digits(row)
                .into_iter()
                .zip(digits(column))
                .zip(&cores)
                .map(|((i, k), core)| core.clone().slice([i..i + 1, k..k + 1]).reshape([rank, rank]));
            let product = slices.reduce(|product: Tensor<2>, slice| product.matmul(slice)).unwrap();
            (product * Tensor::eye(rank, &Device::default())).sum().into_scalar::<f32>()
        };
        let values: Vec<f32> = (0..side * side).map(|place| entry(place / side, place % side)).collect();
        Tensor::from_data(burn::tensor::TensorData::new(values, [side, side]), &Device::default())
    }

    #[test]
    fn the_start_is_the_base_and_one_core_of_the_residual_moves() {
        for (in_dims, ring) in [(&[3usize, 4][..], 2), (&[2, 3, 2], 3), (&[12], 2), (&[3, 4], 1)] {
            for residual in ["tr", "lora"] {
                let config = config(in_dims, &[4, 5], ring).with_option("residual", residual);
                let bench = Bench::fresh(&config, [12, 20]).unwrap();
                near(tlora(&bench).transform().inner(), Tensor::eye(12, &Device::default()), 1e-6);
                let x = random([4, 12], 3);
                assert!(norm(bench.branch(x.clone())) <= 1e-6 * norm(bench.base(x)));
                let (moved, still): (Vec<_>, Vec<_>) = bench.learning().into_iter().partition(|(_, moved)| *moved);
                let names = |tensors: Vec<(String, bool)>| {
                    let names = tensors.into_iter().map(|(name, _)| name).filter(|name| !name.starts_with("t."));
                    names.collect::<Vec<_>>()
                };
                assert_eq!(moved.iter().filter(|(name, _)| name.starts_with("t.")).count(), in_dims.len());
                assert_eq!(names(moved), [if residual == "tr" { "b.0" } else { "lora_b" }]);
                assert!(names(still).iter().all(|name| name == "lora_a" || name == "b.1" || name.starts_with("c.")));
            }
        }
    }

    #[test]
    fn acting_core_by_core_equals_the_matrices() {
        for (in_dims, ring) in [(&[3usize, 4][..], 2), (&[2, 3, 2], 2), (&[2, 2, 2, 2], 2), (&[6], 3), (&[3, 4], 1)] {
            let bench = given(&config(in_dims, &[2, 5], ring), in_dims, &[2, 5], ring);
            let expected = by_definition(&tlora(&bench));
            near(tlora(&bench).transform().inner(), expected.clone(), 1e-5);
            assert_eq!(rank(&expected), expected.dims()[0]);
            let d_in = expected.dims()[0];
            let x = random([7, d_in], 3);
            near(bench.branch(x.clone()), x.matmul(bench.update()), 1e-4);
            let trained: usize = bench.adapter().shapes().iter().map(|t| t.shape.iter().product::<usize>()).sum();
            let squares: usize = in_dims.iter().map(|mode| mode * mode).sum();
            assert_eq!(trained, ring * ring * squares + 4 * (2 + 5 + in_dims.iter().sum::<usize>()));
        }
    }

    #[test]
    fn a_ring_of_rank_one_is_a_kronecker_product() {
        let bench = given(&config(&[2, 3], &[4], 1), &[2, 3], &[4], 1);
        let [first, second] = [bench.tensor::<4>("t.0").reshape([2, 2]), bench.tensor::<4>("t.1").reshape([3, 3])];
        let product = first.reshape([2, 1, 2, 1]) * second.reshape([1, 3, 1, 3]);
        near(tlora(&bench).transform().inner(), product.reshape([6, 6]), 1e-6);
    }

    #[test]
    fn diagonal_cores_scale_the_inputs() {
        let bench = given(&config(&[2, 3], &[4], 2), &[2, 3], &[4], 2);
        let mut tlora = tlora(&bench);
        let device = Device::default();
        tlora.t = tlora
            .t
            .into_iter()
            .map(|core| {
                core.map(|core| {
                    let mode = core.dims()[0];
                    core * Tensor::<2>::eye(mode, &device).reshape([mode, mode, 1, 1])
                })
            })
            .collect();
        let transform = tlora.transform().inner();
        let off = transform.clone() * (Tensor::<2>::eye(6, &device).neg().add_scalar(1.0));
        assert!(norm(off) == 0.0 && norm(transform) > 0.1);
    }

    #[test]
    fn the_cores_of_the_gram_matrix_follow_the_product_rule() {
        let bench = given(&config(&[3, 4], &[4], 2), &[3, 4], &[4], 2);
        let tlora = tlora(&bench);
        let cores: Vec<Param<Tensor<4>>> = tlora
            .t
            .iter()
            .map(|core| {
                let core = core.val().inner();
                let mode = core.dims()[0];
                // [i, k, rho rho', sigma sigma'], summed over the inner index.
                let rows = core.permute([0, 2, 3, 1]).reshape([mode * 4, mode]);
                let gram = rows.clone().matmul(rows.transpose()).reshape([mode, 2, 2, mode, 2, 2]);
                let gram = gram.permute([0, 3, 1, 4, 2, 5]).reshape([mode, mode, 4, 4]);
                Param::initialized(ParamId::new(), gram)
            })
            .collect();
        let gram = transformed(Tensor::eye(12, &Device::default()), &cores).transpose();
        let transform = tlora.transform().inner();
        near(gram, transform.clone().matmul(transform.transpose()), 1e-5);
    }

    #[test]
    fn penalties_and_their_slopes_are_zero_at_the_start() {
        for (which, ring, squared) in
            [("identity", 3, false), ("orthogonal", 3, false), ("orthogonal", 2, true), ("identity", 2, true)]
        {
            let config = config(&[3, 4], &[4, 5], ring).with_option("regulariser", which);
            let bench = Bench::fresh(&config.with_option("reg_squared", squared), [12, 20]).unwrap();
            let value = penalty(&bench, PenaltyAt::Loss).unwrap();
            assert_eq!(value.clone().into_scalar::<f32>(), 0.0, "{which} {ring}");
            let mut grads = GradientsParams::from_grads(value.backward(), &bench);
            for core in bench.adapter().shapes().iter().filter(|tensor| tensor.field.starts_with("t.")) {
                assert!(host(grads.remove::<4>(core.id).unwrap()).iter().all(|slope| *slope == 0.0), "{which} {ring}");
            }
        }
        // Permutations are orthogonal, and not the identity.
        let bench = given(&config(&[3, 4], &[4], 2), &[3, 4], &[4], 2);
        let mut tlora = tlora(&bench);
        tlora.t = tlora
            .t
            .into_iter()
            .map(|core| {
                core.map(|core| {
                    let mode = core.dims()[0];
                    let turned = Tensor::<2>::eye(mode, &Device::default()).roll_dim(1, 0).div_scalar(2.0);
                    core * 0.0 + turned.reshape([mode, mode, 1, 1])
                })
            })
            .collect();
        assert!(tlora.distance(Regulariser::Orthogonal).into_scalar::<f32>() < 1e-6);
        assert!(tlora.distance(Regulariser::Identity).into_scalar::<f32>() > 1.0);
    }

    #[test]
    fn squared_norms_add_up_without_roots() {
        let bench = given(&config(&[3, 4], &[4], 2), &[3, 4], &[4], 2);
        let mut tlora = tlora(&bench);
        let expected: f64 = tlora
            .t
            .iter()
            .map(|core| {
                let core = core.val().inner();
                let mode = core.dims()[0];
                let identity = Tensor::<2>::eye(mode, &Device::default()).div_scalar(2.0);
                norm(core - identity.reshape([mode, mode, 1, 1])).powi(2)
            })
            .sum();
        tlora.reg_squared = true;
        let ours = f64::from(tlora.distance(Regulariser::Identity).into_scalar::<f32>());
        assert!((ours / expected - 1.0).abs() < 1e-5);
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        let ranks = |config: AdapterConfig| {
            Bench::fresh(&config, [12, 20]).map(|bench| {
                let shapes: BTreeMap<_, _> = bench.adapter().shapes().into_iter().map(|t| (t.field, t.shape)).collect();
                shapes
            })
        };
        assert_eq!(ranks(AdapterConfig::new("tlora")).unwrap()["b.0"], [4, 6, 6]);
        assert_eq!(ranks(AdapterConfig::new("tlora").with_option("residual", "lora")).unwrap()["lora_a"], [12, 4]);
        for config in [
            config(&[3, 5], &[], 2),
            config(&[], &[3, 5], 2),
            config(&[], &[], 0),
            config(&[], &[], 2).with_alpha(3.0),
            config(&[], &[], 2).with_option("reg_weight", -1.0),
            config(&[], &[], 2).with_option("init_noise", -1.0),
            config(&[], &[], 2).with_option("residual", "boft"),
        ] {
            assert!(ranks(config.clone()).is_err(), "{config:?}");
        }
    }
}
