//! Sparse updates of high rank from two small factors ("Expanding Sparse Tuning for Low Memory Usage", SNELL, arXiv
//! 2411.01800; with a mixture "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
//! SNELLA, arXiv 2510.24037).

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::{DistanceKernel, KeptValue, Sparsify};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};

/// `y = x (W + S)`, where `S` has the largest entries of the distances between the rows of `p` and of `q`.
///
/// `S` is recomputed in the backward pass and exists a block of rows at a time. It is not zero at the start, only small.
#[derive(Module, Debug)]
pub struct Snell {
    /// Points of the inputs `[heads, d_in, rank / heads]` (the authors' In).
    pub p: Param<Tensor<3>>,
    /// Points of the outputs `[heads, d_out, rank / heads]` (the authors' Out).
    pub q: Param<Tensor<3>>,
    /// Mixture `(a, t, b)` of SNELLA: `K + a softmax(K / t) + b`.
    pub mixture: Option<Param<Tensor<1>>>,
    /// Sparsity of this layer, the sum of three values, which an allocation may change; f32 alone would move the
    /// threshold by an entry.
    pub sparsity: Param<Tensor<1>>,
    #[module(skip)]
    options: SnellOptions,
}

/// Values of the entries that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SnellMode {
    /// `M |M|`, as in the authors' code, with a constant factor `|M|`.
    Official,
    /// `M (|M| - threshold)`, as in the paper, with a constant factor.
    Paper,
    /// `M`.
    Hard,
    /// All entries are kept as they are.
    None,
}

/// Options of [`Snell`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SnellOptions {
    /// Number of kernels that are added with alternating signs; divides the rank.
    #[schemars(range(min = 1))]
    pub heads: usize,
    /// Factor of the kernels, not 0.
    pub coef: f64,
    /// Fraction of the entries that are zero; without a mixture 0 keeps all entries as they are.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub sparsity: f64,
    /// Value of the entries that are kept.
    pub mode: SnellMode,
    /// Adds the trained mixture of SNELLA.
    pub mixture: bool,
}

impl Default for SnellOptions {
    fn default() -> Self {
        Self { heads: 2, coef: 0.1, sparsity: 0.9, mode: SnellMode::Official, mixture: false }
    }
}

impl Snell {
    /// Matrix `[d_in, d_out]` before it is made sparse.
    pub fn kernel(&self) -> Tensor<2> {
        DistanceKernel { sparsify: None, ..self.distances() }.matrix(self.p.val(), self.q.val(), self.mixed())
    }

    /// Fraction of the entries that are zero.
    pub fn sparsity(&self) -> f64 {
        host(self.sparsity.val().without_autodiff()).into_iter().map(f64::from).sum()
    }

    /// A sparsity as the three values that are stored.
    pub fn stored_sparsity(sparsity: f64) -> Vec<f32> {
        let mut rest = sparsity;
        let part = |_| {
            let part = rest as f32;
            rest -= f64::from(part);
            part
        };
        (0..3).map(part).collect()
    }

    /// Returns the structure with another sparsity.
    pub fn with_sparsity(self, sparsity: f64) -> Self {
        let own = self.sparsity;
        let device = own.val().device();
        let value = Tensor::from_data(TensorData::new(Self::stored_sparsity(sparsity), [3]), &device);
        Self { sparsity: Param::initialized(own.id, value).set_require_grad(false), ..self }
    }

    fn distances(&self) -> DistanceKernel {
        let SnellOptions { heads, coef, mode, mixture, .. } = self.options;
        let coefficients = (0..heads).map(|head| if head % 2 == 0 { coef as f32 } else { -coef as f32 });
        let sparsity = self.sparsity();
        let kept = match mode {
            SnellMode::Official => Some(KeptValue::Weighted),
            SnellMode::Paper => Some(KeptValue::AboveThreshold),
            SnellMode::Hard => Some(KeptValue::Plain),
            SnellMode::None => None,
        };
        // Without a mixture, no sparsity is the plain kernel.
        let kept = kept.filter(|_| mixture || sparsity > 0.0);
        DistanceKernel {
            coefficients: coefficients.collect(),
            mixed: mixture,
            sparsify: kept.map(|kept| Sparsify { sparsity, kept }),
        }
    }

    fn mixed(&self) -> Tensor<1> {
        match &self.mixture {
            Some(mixture) => mixture.val(),
            None => Tensor::zeros([3], &self.p.val().device().inner()),
        }
    }
}

impl Structure for Snell {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus(input, |x| self.distances().linear(x, self.p.val(), self.q.val(), self.mixed()))
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.distances().matrix(self.p.val(), self.q.val(), self.mixed()))
    }
}

impl Method for Snell {
    type Options = SnellOptions;

    const LR: f64 = 1e-3;

    const SPEC: Spec = Spec {
        name: "snell",
        title: "Expanding Sparse Tuning for Low Memory Usage",
        arxiv: "2411.01800",
        summary: "the largest distances between two sets of points as a sparse update of high rank",
        trains: "r (d_in + d_out) + 3 mixture",
        stores: "3",
        dense_forward: false,
        rank: Rank::Fixed(32),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "p", role: TensorRole::A, transposed: false },
            TensorSpec { name: "q", role: TensorRole::B, transposed: false },
            TensorSpec { name: "mixture", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "sparsity", role: TensorRole::Frozen, transposed: false },
        ],
    };

    fn check(options: &SnellOptions, place: &Place) -> Result<(), String> {
        let SnellOptions { heads, coef, .. } = *options;
        match coef {
            coef if !coef.is_finite() || coef == 0.0 => {
                return Err(format!("coef = {coef}: needs a number other than 0"));
            }
            _ => {}
        }
        match place.rank.is_multiple_of(heads) {
            true => Ok(()),
            false => Err(format!("{heads} heads do not divide rank {}", place.rank)),
        }
    }

    fn build(options: &SnellOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], heads) = (site.place.shape, options.heads);
        let width = site.place.rank / heads;
        // The fan-in of a tensor of three dimensions is the product of the last two.
        let bound = |side: usize| ((side * width) as f64).sqrt().recip();
        let points = |what: &'static str, side: usize| {
            move |site: &mut Site<'_>| Ok(site.uniform(what, heads * side * width, bound(side)))
        };
        let mixture = match options.mixture {
            true => Some(site.trained("mixture", [3], |_| Ok(vec![1.0, 1.0, 0.0]))?),
            false => None,
        };
        Ok(Self {
            p: site.trained("p", [heads, d_in, width], points("p", d_in))?,
            q: site.trained("q", [heads, d_out, width], points("q", d_out))?,
            mixture,
            sparsity: site.frozen("sparsity", [3], |_| Ok(Self::stored_sparsity(options.sparsity)))?,
            options: *options,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, norm, rank};

    fn config(sparsity: f64) -> AdapterConfig {
        AdapterConfig::new("snell").with_rank(4).with_option("sparsity", sparsity)
    }

    fn snell(bench: &Bench) -> Snell {
        bench.adapter().structure.downcast_ref::<Snell>().expect("snell").clone()
    }

    #[test]
    fn the_kernel_has_full_rank_and_the_largest_entries_stay() {
        let bench = Bench::new(20, 16, false).with(&config(0.0));
        assert_eq!(rank(&bench.update()), 16, "a product of as many parameters has rank 4");
        for sparsity in [0.1, 0.5, 0.9] {
            let bench = Bench::new(20, 16, false).with(&config(sparsity));
            let values = host(bench.update());
            let kept = values.iter().filter(|value| **value != 0.0).count();
            assert_eq!(kept, ((1.0 - sparsity) * 319.0).ceil() as usize, "{sparsity}");
            let mut sizes: Vec<f32> = host(snell(&bench).kernel().inner()).into_iter().map(f32::abs).collect();
            sizes.sort_by(f32::total_cmp);
            let least = values.iter().map(|value| value.abs()).filter(|value| *value > 0.0).fold(f32::MAX, f32::min);
            let expected = sizes[320 - kept] * sizes[320 - kept];
            assert!((least - expected).abs() <= 1e-6 * expected, "{least} instead of {expected}");
        }
        let share = norm(bench.update()) / norm(bench.weight());
        assert!(share > 0.0 && share < 0.1, "{share}");
    }

    #[test]
    fn moving_all_points_changes_nothing() {
        let bench = Bench::new(9, 7, false).with(&config(0.3));
        let mut tensors = bench.tensors();
        for field in ["p", "q"] {
            Bench::change(&mut tensors, field, |place, value| value + if place % 2 == 0 { 0.25 } else { -0.5 });
        }
        near(Bench::new(9, 7, false).with_tensors(&config(0.3), tensors).update(), bench.update(), 1e-4);
    }

    #[test]
    fn a_mixture_of_nothing_is_the_kernel() {
        let plain = Bench::new(9, 7, false).with(&config(0.3));
        let mixed = config(0.3).with_option("mixture", true);
        let mut tensors = plain.tensors();
        tensors.insert("mixture".into(), (vec![0.0, 1.0, 0.0], vec![3]));
        near(Bench::new(9, 7, false).with_tensors(&mixed, tensors).update(), plain.update(), 1e-6);
    }

    #[test]
    fn a_sparsity_is_stored_exactly() {
        for sparsity in [0.1, 0.7, 0.9, 1.0 / 3.0, 0.0, 1.0 - 1e-15] {
            assert_eq!(Snell::stored_sparsity(sparsity).into_iter().map(f64::from).sum::<f64>(), sparsity);
            let bench = Bench::new(9, 7, false).with(&config(0.3));
            assert_eq!(snell(&bench).with_sparsity(sparsity).sparsity(), sparsity);
        }
    }

    #[test]
    fn both_forms_give_the_same_gradients() {
        let bench = Bench::new(9, 7, true).with(&config(0.5).with_option("mixture", true));
        for field in ["p", "q", "mixture"] {
            let factored = bench.gradient(bench.gradients(), field);
            let x = bench.input(5);
            let dense = x.matmul(snell(&bench).delta_weight(&bench.weight()).expect("an update"));
            let base = bench.base(bench.input(5).inner()).autodiff();
            let error = base + dense - crate::bench::matrix(5, 7, 0.53).autodiff();
            let loss = error.square().mean().mul_scalar(0.5);
            let grads = burn::optim::GradientsParams::from_grads(loss.backward(), &bench);
            let expected = bench.gradient(grads, field);
            let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
            for (ours, expected) in factored.iter().zip(&expected) {
                assert!((ours - expected).abs() <= 1e-5 * largest, "{field}: {ours} instead of {expected}");
            }
        }
    }
}
