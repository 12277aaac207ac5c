//! Factors mixed from random matrices ("NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv 2310.02556).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::{draws, mixed, mixed_draws};

/// LoRA whose factors are `A = A_0 + c_a (alpha_1 E_1 + ... + alpha_k E_k)` and
/// `B = c_b (beta_1 F_1 + ... + beta_l F_l)`: only the coefficients are trained, independent of layer and rank.
///
/// The random matrices are not stored but drawn from a seed in each pass; only those of a file are kept.
#[derive(Module, Debug)]
pub struct Nola {
    /// Coefficients `[k]` of the first factor.
    pub coef_a: Param<Tensor<1>>,
    /// Coefficients `[l]` of the second factor.
    pub coef_b: Param<Tensor<1>>,
    /// Some of the random values, to detect a generator that draws different ones.
    pub fingerprint: Option<Param<Tensor<1>>>,
    /// Fixed part `[rank, d_in]` of the first factor, if a file has it.
    pub a0: Option<Param<Tensor<2>>>,
    /// Random matrices `[k, rank, d_in]` of the first factor, if a file has them.
    pub basis_a: Option<Param<Tensor<3>>>,
    /// Random matrices `[l, d_out, rank]` of the second factor, if a file has them.
    pub basis_b: Option<Param<Tensor<3>>>,
    #[module(skip)]
    seeds: Seeds,
    #[module(skip)]
    variant: Variant,
    /// Shape `[d_in, d_out]`.
    #[module(skip)]
    shape: [usize; 2],
    #[module(skip)]
    rank: usize,
    #[module(skip)]
    scale: f64,
}

/// Seeds of matrices that are drawn instead of kept.
#[derive(Clone, Copy, Debug)]
struct Seeds {
    a0: u64,
    basis_a: u64,
    basis_b: u64,
}

/// Which of the authors' forms is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// For language models: starts at the base.
    #[default]
    Llm,
    /// For vision models: no fixed part, equal coefficients at the start, which is not the base.
    Vision,
}

/// Options of [`Nola`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct NolaOptions {
    /// Number of random matrices that the first factor is mixed from.
    #[schemars(range(min = 1))]
    pub num_basis_a: usize,
    /// Number of random matrices that the second factor is mixed from.
    #[schemars(range(min = 1))]
    pub num_basis_b: usize,
    /// Form of the official code; vision does not start at the base (rank and alpha are 1 when not given).
    pub variant: Variant,
    /// Gives layers of one shape the same random matrices.
    pub share_bases: bool,
}

impl Default for NolaOptions {
    fn default() -> Self {
        Self { num_basis_a: 512, num_basis_b: 512, variant: Variant::Llm, share_bases: false }
    }
}

/// Values of each factor in a fingerprint.
const PRINT: usize = 4;

impl Nola {
    /// Factors `[d_in, rank]` and `[rank, d_out]`, without the scale.
    pub fn mixtures(&self) -> [Tensor<2>; 2] {
        let ([d_in, d_out], rank) = (self.shape, self.rank);
        let a = self.mixture(self.coef_a.val(), &self.basis_a, self.seeds.basis_a, d_in);
        let a = match (&self.a0, self.variant) {
            (_, Variant::Vision) => a,
            (Some(fixed), Variant::Llm) => a + fixed.val().reshape([rank * d_in]),
            (None, Variant::Llm) => {
                let bound = Tensor::full([1], (d_in as f64).sqrt().recip(), &self.coef_a.device().inner());
                a + mixed_draws(bound, self.seeds.a0, rank * d_in)
            }
        };
        let b = self.mixture(self.coef_b.val(), &self.basis_b, self.seeds.basis_b, d_out);
        [a.reshape([rank, d_in]).transpose(), b.reshape([d_out, rank]).transpose()]
    }

    /// Values of a factor, in the order of files.
    fn mixture(&self, coef: Tensor<1>, kept: &Option<Param<Tensor<3>>>, seed: u64, side: usize) -> Tensor<1> {
        let (k, count) = (coef.dims()[0], side * self.rank);
        let (norm, bound) = match self.variant {
            Variant::Llm => ((k as f64).sqrt().recip(), 1.0),
            Variant::Vision => (1.0, (count as f64).sqrt().recip()),
        };
        match kept {
            Some(bases) => mixed(coef.mul_scalar(norm), bases.val().reshape([k, count])),
            None => mixed_draws(coef.mul_scalar(norm * bound), seed, count),
        }
    }
}

impl Structure for Nola {
    fn factors(&self) -> Option<Factors> {
        let [a, b] = self.mixtures();
        Some(Factors { a, b, scale: self.scale })
    }
}

impl Method for Nola {
    type Options = NolaOptions;

    const LR: f64 = 1e-3;

    const SPEC: Spec = Spec {
        name: "nola",
        title: "NOLA: Compressing LoRA using Linear Combination of Random Basis",
        arxiv: "2310.02556",
        summary: "mixes its factors from random matrices",
        trains: "num_basis_a + num_basis_b",
        stores: "8",
        dense_forward: false,
        rank: Rank::Fixed(16),
        alpha: Alpha::Fixed(4.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "coef_a", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "coef_b", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "fingerprint", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "a0", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "basis_a", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "basis_b", role: TensorRole::Frozen, transposed: false },
        ],
    };

    fn size(options: &NolaOptions) -> (Rank, Alpha) {
        match options.variant {
            Variant::Llm => (Self::SPEC.rank, Self::SPEC.alpha),
            Variant::Vision => (Rank::Fixed(1), Alpha::Fixed(1.0)),
        }
    }

    fn check(_options: &NolaOptions, place: &Place) -> Result<(), String> {
        place.check_rank()
    }

    fn build(options: &NolaOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let (shape @ [d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let [k, l] = [options.num_basis_a, options.num_basis_b];
        let start = |count: usize| match options.variant {
            Variant::Llm => vec![0.0; count],
            Variant::Vision => vec![(count as f64).recip() as f32; count],
        };
        let seed = |site: &Site<'_>, what: &str| match options.share_bases {
            true => site.common_random(&format!("{what}.{d_in}x{d_out}")).random(),
            false => site.seed_of(what),
        };
        let seeds = Seeds { a0: site.seed_of("a0"), basis_a: seed(site, "basis_a"), basis_b: seed(site, "basis_b") };
        let coef_a = site.trained("coef_a", [k], |_| Ok(start(k)))?;
        let coef_b = site.trained("coef_b", [l], |_| Ok(start(l)))?;
        let kept = site.given_shape("basis_a").is_some();
        let absent = |_: &mut Site<'_>| -> Result<Vec<f32>, AdapterError> { unreachable!("a file has them") };
        let fixed = kept && options.variant == Variant::Llm;
        let a0 = if fixed { Some(site.frozen("a0", [rank, d_in], absent)?) } else { None };
        let basis_a = if kept { Some(site.frozen("basis_a", [k, rank, d_in], absent)?) } else { None };
        let basis_b = if kept { Some(site.frozen("basis_b", [l, d_out, rank], absent)?) } else { None };
        let fingerprint = if kept { None } else { Some(fingerprint(site, seeds)?) };
        let (variant, scale) = (options.variant, site.place.scale);
        Ok(Self { coef_a, coef_b, fingerprint, a0, basis_a, basis_b, seeds, variant, shape, rank, scale })
    }
}

/// Returns the first random values of both factors; rejects different ones in a file.
fn fingerprint(site: &mut Site<'_>, seeds: Seeds) -> Result<Param<Tensor<1>>, AdapterError> {
    let ours = [draws(seeds.basis_a, 0, PRINT), draws(seeds.basis_b, 0, PRINT)].concat();
    let read = site.frozen("fingerprint", [2 * PRINT], |_| Ok(ours.clone()))?;
    // Half-precision files round it.
    let same = |(ours, read): (&f32, f32)| (ours - read).abs() < 1e-2;
    match ours.iter().zip(host(read.val())).all(same) {
        true => Ok(read),
        false => Err(AdapterError::Tensor {
            path: site.place.path.clone(),
            tensor: "fingerprint".into(),
            reason: "is that of other random matrices, for which the coefficients mean nothing: the seed, the options or the generator differ"
                .into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bench::{Bench, near, random, rank};
    use crate::{AdapterConfig, GivenTensors};
    use burn::tensor::TensorData;

    fn config() -> AdapterConfig {
        AdapterConfig::new("nola").with_rank(3).with_option("num_basis_a", 20).with_option("num_basis_b", 30)
    }

    fn given(config: &AdapterConfig, shape: [usize; 2], more: &[(&str, TensorData)]) -> Bench {
        let mut tensors = GivenTensors::new();
        tensors.insert("coef_a".into(), random([20], 1).into_data());
        tensors.insert("coef_b".into(), random([30], 2).into_data());
        tensors.extend(more.iter().map(|(name, data)| (name.to_string(), data.clone())));
        Bench::holding(config, shape, tensors).unwrap()
    }

    #[test]
    fn the_start_is_the_base_and_the_count_that_of_the_coefficients() {
        for shape in [[8, 12], [40, 6]] {
            let bench = Bench::fresh(&config(), shape).unwrap();
            let x = random([4, shape[0]], 3);
            near(bench.branch(x.clone()), bench.base(x) * 0.0, 0.0);
            assert_eq!(bench.learning(), BTreeMap::from([("coef_a".into(), false), ("coef_b".into(), true)]));
            let trained = bench.adapter().shapes().into_iter().filter(|t| t.role != TensorRole::Frozen);
            assert_eq!(trained.map(|t| t.shape[0]).sum::<usize>(), 50);
        }
        let vision = Bench::fresh(&config().with_option("variant", "vision"), [8, 12]).unwrap();
        assert!(vision.learning().values().all(|moved| *moved));
    }

    #[test]
    fn drawn_bases_equal_kept_ones() {
        for variant in ["llm", "vision"] {
            let (config, shape) = (config().with_option("variant", variant), [8, 12]);
            let fresh = Bench::fresh(&config, shape).unwrap();
            let print = fresh.tensor::<1>("fingerprint").into_data();
            let drawn = given(&config, shape, &[("fingerprint", print)]);
            let adapter = drawn.adapter();
            let nola = adapter.structure.downcast_ref::<Nola>().unwrap();
            let bound = |side: usize| if variant == "llm" { 1.0 } else { ((side * 3) as f32).sqrt().recip() };
            let bases = |seed: u64, k: usize, side: usize| {
                (0..k).flat_map(|i| draws(seed, i, 3 * side)).map(|x| x * bound(side)).collect::<Vec<_>>()
            };
            let mut more = vec![
                ("basis_a", TensorData::new(bases(nola.seeds.basis_a, 20, 8), [20, 3, 8])),
                ("basis_b", TensorData::new(bases(nola.seeds.basis_b, 30, 12), [30, 12, 3])),
            ];
            let fixed: Vec<f32> = draws(nola.seeds.a0, 0, 24).iter().map(|x| x / 8f32.sqrt()).collect();
            if variant == "llm" {
                more.push(("a0", TensorData::new(fixed, [3, 8])));
            }
            let kept = given(&config, shape, &more);
            near(drawn.update(), kept.update(), 1e-5);
            assert_eq!(rank(&drawn.update()), 3);
            let x = random([6, 8], 4);
            near(drawn.branch(x.clone()), x.matmul(kept.update()), 1e-4);
        }
    }

    #[test]
    fn unit_matrices_give_the_factors_of_lora() {
        let config =
            AdapterConfig::new("nola").with_rank(2).with_option("num_basis_a", 8).with_option("num_basis_b", 12);
        let unit = |k: usize, rows: usize, columns: usize| {
            let eye = Tensor::<2>::eye(k, &Default::default()).mul_scalar((k as f64).sqrt());
            eye.reshape([k, rows, columns]).into_data()
        };
        let (a, b) = (random::<2>([2, 4], 1), random::<2>([6, 2], 2));
        let tensors = BTreeMap::from([
            ("coef_a".into(), a.clone().reshape([8]).into_data()),
            ("coef_b".into(), b.clone().reshape([12]).into_data()),
            ("a0".into(), TensorData::zeros::<f32, _>([2, 4])),
            ("basis_a".into(), unit(8, 2, 4)),
            ("basis_b".into(), unit(12, 6, 2)),
        ]);
        let bench = Bench::holding(&config, [4, 6], tensors).unwrap();
        near(bench.update(), b.matmul(a).transpose() * 2.0, 1e-6);
    }

    #[test]
    fn layers_have_bases_of_their_own_and_other_seeds_are_found_out() {
        let print =
            |config: &AdapterConfig| Bench::fresh(config, [8, 12]).unwrap().tensor::<1>("fingerprint").into_data();
        let other = AdapterConfig { seed: 1, ..config() };
        assert_ne!(print(&config()), print(&other));
        assert_eq!(print(&config()), print(&config()));
        let tensors = BTreeMap::from([
            ("coef_a".into(), random([20], 1).into_data()),
            ("coef_b".into(), random([30], 2).into_data()),
            ("fingerprint".into(), print(&other)),
        ]);
        assert!(Bench::holding(&config(), [8, 12], tensors).unwrap_err().contains("random matrices"));
    }
}
