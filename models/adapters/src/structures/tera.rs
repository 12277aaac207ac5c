//! Trained vectors on the modes of a fixed tensor network ("TeRA: Vector-based Random Tensor Network for High-Rank
//! Adaptation of Large Language Models", arXiv 2509.03234). Written from the abstract and published summaries; no code
//! of the authors was found. The positions of the vectors, the initialisation and the sizes are our interpretation.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::modes::modes;
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Shared, SharedBytes, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use lowrank_kernels::random::normal_values;

/// `y = x W + b + scale (((x F_in) e_in) G^T e_out) F_out^T`: `F_in` and `F_out` are Kronecker products of one random
/// factor per mode, `G` is a random core between their ranks, and `e_in`, `e_out` are the Kronecker products of the
/// trained vectors, one per mode.
///
/// The factors are applied to the modes one after another. Core and factors are drawn once for all layers of the same
/// shape.
#[derive(Module, Debug)]
pub struct Tera {
    /// Vector `[rank of the mode]` of each mode, those of the output first.
    pub d: Vec<Param<Tensor<1>>>,
    /// Core `[product of the output ranks, product of the input ranks]`.
    #[module(skip)]
    core: Shared<2>,
    /// Factor `[size, rank]` of each mode.
    #[module(skip)]
    factors: Vec<Shared<2>>,
    /// Number of modes of the output.
    #[module(skip)]
    outputs: usize,
    #[module(skip)]
    scale: f64,
}

/// Options of [`Tera`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TeraOptions {
    /// Sizes of the output's modes, whose product is d_out; two near-square ones when empty.
    pub out_modes: Vec<usize>,
    /// Sizes of the input's modes, whose product is d_in; two near-square ones when empty.
    pub in_modes: Vec<usize>,
    /// Ranks of all modes, those of the output first; their sizes when empty.
    pub ranks: Vec<usize>,
    /// Scale of the update, not 0.
    pub scale: f64,
    /// Initial value of the vectors, not 0.
    pub d_start: f64,
    /// Number of the mode whose vector starts at 0.
    pub zero_mode: usize,
}

impl Default for TeraOptions {
    fn default() -> Self {
        let (out_modes, in_modes, ranks) = (Vec::new(), Vec::new(), Vec::new());
        Self { out_modes, in_modes, ranks, scale: 1.0, d_start: 1.0, zero_mode: 0 }
    }
}

/// Modes and ranks of a layer.
struct Cut {
    sizes: Vec<usize>,
    ranks: Vec<usize>,
    outputs: usize,
}

impl Cut {
    fn of(options: &TeraOptions, [d_in, d_out]: [usize; 2]) -> Result<Self, String> {
        let mut sizes = modes("out_modes", &options.out_modes, d_out)?;
        let outputs = sizes.len();
        sizes.extend(modes("in_modes", &options.in_modes, d_in)?);
        let ranks = if options.ranks.is_empty() { sizes.clone() } else { options.ranks.clone() };
        if ranks.len() != sizes.len() {
            return Err(format!("{} ranks for the {} modes {sizes:?}", ranks.len(), sizes.len()));
        }
        if let Some((rank, size)) = ranks.iter().zip(&sizes).find(|(rank, size)| **rank == 0 || rank > size) {
            return Err(format!("rank {rank} of a mode of {size}; it goes from 1 to the size"));
        }
        Ok(Self { sizes, ranks, outputs })
    }
}

/// Multiplies every mode of the rows by its matrix `[from, to]`: rows of the product of all `from` become rows of the
/// product of all `to`.
fn contracted(x: Tensor<2>, matrices: Vec<Tensor<2>>) -> Tensor<2> {
    let rows = x.dims()[0];
    let mut before = matrices.iter().map(|matrix| matrix.dims()[0]).product::<usize>() * rows;
    let mut after = 1;
    let mut x = x;
    for matrix in matrices.into_iter().rev() {
        let [from, to] = matrix.dims();
        before /= from;
        x = match after {
            1 => x.reshape([before, from]).matmul(matrix),
            _ => {
                let product = matrix.transpose().unsqueeze::<3>().matmul(x.reshape([before, from, after]));
                product.reshape([before, to * after])
            }
        };
        after *= to;
    }
    x.reshape([rows, after])
}

/// Kronecker product, the first vector slowest.
fn kronecker(vectors: &[Param<Tensor<1>>]) -> Tensor<1> {
    let values = vectors.iter().map(Param::val);
    let product = values.reduce(|product, vector| {
        let count = product.dims()[0] * vector.dims()[0];
        (product.unsqueeze_dim::<2>(1) * vector.unsqueeze::<2>()).reshape([count])
    });
    match product {
        Some(product) => product,
        None => unreachable!("both sides have at least one mode"),
    }
}

impl Tera {
    /// Kronecker product of the output vectors with the scale, and that of the input vectors.
    fn diagonals(&self) -> [Tensor<2>; 2] {
        let (outputs, inputs) = self.d.split_at(self.outputs);
        [kronecker(outputs).mul_scalar(self.scale).unsqueeze(), kronecker(inputs).unsqueeze()]
    }

    fn mode_factors(&self, output: bool) -> impl Iterator<Item = Tensor<2>> {
        let (outputs, inputs) = self.factors.split_at(self.outputs);
        (if output { outputs } else { inputs }).iter().map(Shared::val)
    }
}

impl Structure for Tera {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let [outputs, inputs] = self.diagonals();
        base.plus(input, |x| {
            let ranks = contracted(x, self.mode_factors(false).collect()) * inputs;
            let ranks = ranks.matmul(self.core.val().transpose()) * outputs;
            contracted(ranks, self.mode_factors(true).map(Tensor::transpose).collect())
        })
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        let [outputs, inputs] = self.diagonals();
        let core = self.core.val() * outputs.transpose() * inputs;
        let rows = contracted(core, self.mode_factors(false).map(Tensor::transpose).collect());
        Some(contracted(rows.transpose(), self.mode_factors(true).map(Tensor::transpose).collect()))
    }

    fn shared(&self) -> Vec<SharedBytes> {
        self.factors.iter().chain([&self.core]).map(Shared::bytes).collect()
    }
}

impl Method for Tera {
    type Options = TeraOptions;

    const LR: f64 = 1e-2;

    const SPEC: Spec = Spec {
        name: "tera",
        title: "TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of Large Language Models",
        arxiv: "2509.03234",
        summary: "scales the modes of a random tensor network; the update has high rank",
        trains: "the sum of the modes' ranks",
        stores: "the product of the ranks + the sum of sizes times ranks, once for all layers of one shape",
        dense_forward: false,
        rank: Rank::None,
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "d", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "core", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "factor", role: TensorRole::Frozen, transposed: false },
        ],
    };

    fn check(options: &TeraOptions, place: &Place) -> Result<(), String> {
        let cut = Cut::of(options, place.shape)?;
        if options.scale == 0.0 || !options.scale.is_finite() {
            return Err(format!("scale = {}: it must be a number other than 0", options.scale));
        }
        if options.d_start == 0.0 || !options.d_start.is_finite() {
            return Err(format!(
                "d_start = {}: where two vectors begin with 0 no vector has a gradient; take another number",
                options.d_start
            ));
        }
        match options.zero_mode {
            mode if mode >= cut.sizes.len() => Err(format!("zero_mode = {mode}, and the modes are {:?}", cut.sizes)),
            _ => Ok(()),
        }
    }

    fn build(options: &TeraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let cut = Cut::of(options, site.place.shape).map_err(AdapterError::Refused)?;
        let (outputs, inputs) = (cut.ranks[..cut.outputs].iter().product(), cut.ranks[cut.outputs..].iter().product());
        let mut d = Vec::new();
        for (mode, rank) in cut.ranks.iter().enumerate() {
            let start = if mode == options.zero_mode { 0.0 } else { options.d_start as f32 };
            d.push(site.trained(&format!("d.{mode}"), [*rank], |_| Ok(vec![start; *rank]))?);
        }
        // One set for each combination of modes and ranks.
        let (out_sizes, in_sizes) = cut.sizes.split_at(cut.outputs);
        let set = format!("{out_sizes:?}{in_sizes:?}{:?}", cut.ranks).replace(", ", "x");
        let normal = |what: String, count: usize, variance: usize| {
            let std = (variance as f64).sqrt().recip();
            move |site: &mut Site<'_>| Ok(normal_values(&mut site.common_random(&what), count, std))
        };
        let key = format!("core{set}");
        let core = normal(key.clone(), outputs * inputs, site.place.shape[0]);
        let core = site.shared("core", &key, [outputs, inputs], core)?;
        let mut factors = Vec::new();
        for (mode, (size, rank)) in cut.sizes.iter().zip(&cut.ranks).enumerate() {
            let key = format!("factor.{mode}{set}");
            let start = normal(key.clone(), size * rank, *rank);
            factors.push(site.shared(&format!("factor.{mode}"), &key, [*size, *rank], start)?);
        }
        Ok(Self { d, core, factors, outputs: cut.outputs, scale: options.scale })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bench::{Bench, near, random, rank};
    use crate::{AdapterConfig, GivenTensors};
    use burn::tensor::TensorData;
    use serde_json::json;

    fn config(out_modes: &[usize], in_modes: &[usize], ranks: &[usize]) -> AdapterConfig {
        let config = AdapterConfig::new("tera").with_option("out_modes", json!(out_modes));
        config.with_option("in_modes", json!(in_modes)).with_option("ranks", json!(ranks))
    }

    fn given(config: &AdapterConfig, shape: [usize; 2], ranks: &[usize], more: &[(&str, TensorData)]) -> Bench {
        let vectors = ranks
            .iter()
            .enumerate()
            .map(|(mode, rank)| (format!("d.{mode}"), (random([*rank], mode) * 0.3 + 1.0).into_data()));
        let more = more.iter().map(|(name, data)| (name.to_string(), data.clone()));
        Bench::holding(config, shape, vectors.chain(more).collect::<GivenTensors>()).unwrap()
    }

    #[test]
    fn the_update_has_the_rank_of_the_network() {
        for (out_modes, in_modes, ranks, expected) in [
            (&[4, 5][..], &[3, 4][..], &[4, 5, 3, 4][..], 12),
            (&[4, 5], &[3, 4], &[2, 4, 3, 2], 6),
            (&[20], &[2, 3, 2], &[5, 2, 2, 2], 5),
        ] {
            let config = config(out_modes, in_modes, ranks);
            let bench = given(&config, [12, 20], ranks, &[]);
            assert_eq!(rank(&bench.update()), expected);
            let x = random([6, 12], 9);
            near(bench.branch(x.clone()), x.matmul(bench.update()), 1e-4);
        }
    }

    #[test]
    fn one_vector_moves_first_and_the_start_is_the_base() {
        let bench = Bench::fresh(&AdapterConfig::new("tera"), [12, 20]).unwrap();
        let x = random([4, 12], 3);
        near(bench.branch(x.clone()), bench.base(x) * 0.0, 0.0);
        let moved: Vec<String> =
            bench.learning().into_iter().filter(|(_, moved)| *moved).map(|(name, _)| name).collect();
        assert_eq!(moved, ["d.0"]);
        let trained: usize = bench.adapter().shapes().iter().map(|tensor| tensor.shape[0]).sum();
        assert_eq!(trained, 4 + 5 + 3 + 4);
    }

    #[test]
    fn two_modes_and_a_core_of_one_give_two_scaled_factors() {
        let (first, second) = (random::<2>([9, 4], 1), random::<2>([7, 4], 2));
        let tensors = [
            ("core", Tensor::<2>::eye(4, &Default::default()).into_data()),
            ("factor.0", first.clone().into_data()),
            ("factor.1", second.clone().into_data()),
        ];
        let bench = given(&config(&[9], &[7], &[4, 4]), [7, 9], &[4, 4], &tensors);
        let both = bench.tensor::<1>("d.0") * bench.tensor::<1>("d.1");
        near(bench.update(), (second * both.unsqueeze()).matmul(first.transpose()), 1e-6);
    }

    #[test]
    fn layers_of_one_shape_share_what_is_frozen() {
        let shared = |config: &AdapterConfig, shape| -> BTreeMap<String, u64> {
            let shared = Bench::fresh(config, shape).unwrap().adapter().structure().shared();
            shared.into_iter().map(|shared| (shared.key, shared.bytes)).collect()
        };
        let config = AdapterConfig::new("tera");
        let bytes = shared(&config, [12, 20]);
        assert_eq!(bytes.values().sum::<u64>(), 4 * (12 * 20 + 4 * 4 + 5 * 5 + 3 * 3 + 4 * 4));
        assert_eq!(bytes, shared(&config, [12, 20]));
        assert!(shared(&config, [20, 12]).keys().all(|key| !bytes.contains_key(key)));
    }
}
