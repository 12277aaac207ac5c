//! A group of LoRAs kept orthogonal to the weight and to each other ("Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal
//! Regularization for Domain Generalization", arXiv 2407.15085).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Penalty, PenaltyAt, Structure, Totals};

/// `y = x W + scale (x A_1 B_1 + ... + x A_n B_n)`, side by side as one LoRA of rank `n r`.
#[derive(Module, Debug)]
pub struct Pego {
    /// Factors at the input `[d_in, n r]`, adapter by adapter.
    pub a: Param<Tensor<2>>,
    /// Factors at the output `[n r, d_out]`, adapter by adapter; zero at the start.
    pub b: Param<Tensor<2>>,
    #[module(skip)]
    scale: f64,
    #[module(skip)]
    options: PegoOptions,
}

/// Options of [`Pego`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PegoOptions {
    /// Number of adapters of a layer (the paper's N), each of the adapter's rank.
    #[schemars(range(min = 1, max = 1000))]
    pub adapters: usize,
    /// Strength of both terms. The sums grow with the square of d_out; the default is meant for a width of 768.
    #[schemars(range(min = 0.0, max = 1e6))]
    pub lambda: f64,
    /// Sum or mean over the entries of a product.
    pub reduction: Reduction,
    /// Squares of the entries instead of their magnitudes.
    pub squared: bool,
}

impl Default for PegoOptions {
    fn default() -> Self {
        Self { adapters: 4, lambda: 1e-3, reduction: Reduction::Sum, squared: false }
    }
}

/// Reduction of the entries of a product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Reduction {
    /// Their sum, as in the paper.
    #[default]
    Sum,
    /// Their mean.
    Mean,
}

/// Rows of a product that are in memory at once.
const BLOCK: usize = 256;

impl Pego {
    /// The terms that keep the updates orthogonal to the weight `[d_in, d_out]`, and to each other, without their strength, each of shape `[1]`.
    pub fn terms(&self, weight: &Tensor<2>) -> [Tensor<1>; 2] {
        let weight = weight.clone().without_autodiff().transpose();
        let weight = if self.a.val().device().is_autodiff() { Tensor::from_inner(weight) } else { weight };
        let (a, b) = (self.a.val(), self.b.val().mul_scalar(self.scale));
        let count = self.options.adapters;
        let rank = a.dims()[1] / count;
        let [a, b] = [a.chunk(count, 1), b.chunk(count, 0)];
        debug_assert!(rank > 0 && a.len() == count && b.len() == count);
        let mut preserve = Tensor::zeros([1], &weight.device());
        let mut diversify = preserve.clone();
        for i in 0..count {
            preserve = preserve + self.reduced(weight.clone().matmul(a[i].clone()), b[i].clone());
            for j in i + 1..count {
                // B_i (A_i A_j) is thin, so no dense update is formed.
                let left = b[i].clone().transpose().matmul(a[i].clone().transpose().matmul(a[j].clone()));
                diversify = diversify + self.reduced(left, b[j].clone());
            }
        }
        [preserve, diversify]
    }

    /// Reduction of the entries of `left [rows, r] right [r, columns]`.
    fn reduced(&self, left: Tensor<2>, right: Tensor<2>) -> Tensor<1> {
        let entries = (left.dims()[0] * right.dims()[1]) as f64;
        let sum = match self.options.squared {
            // The squares of a product follow from the products of each factor with itself.
            true => {
                let [left, right] = [left.clone().transpose().matmul(left), right.clone().matmul(right.transpose())];
                (left * right).sum()
            }
            false => sum_of_magnitudes(left, right),
        };
        match self.options.reduction {
            Reduction::Sum => sum,
            Reduction::Mean => sum.div_scalar(entries),
        }
    }
}

/// Sum of the magnitudes of the entries of `left [rows, r] right [r, columns]`, of which a block of rows exists at a time. The derivative of a
/// magnitude is 0 at 0.
fn sum_of_magnitudes(left: Tensor<2>, right: Tensor<2>) -> Tensor<1> {
    let (l, r) = (left.clone().without_autodiff(), right.clone().without_autodiff());
    let [rows, _] = l.dims();
    let mut of_left = Vec::new();
    let mut of_right: Option<Tensor<2>> = None;
    for start in (0..rows).step_by(BLOCK) {
        let block = l.clone().narrow(0, start, BLOCK.min(rows - start));
        let signs = block.clone().matmul(r.clone()).sign();
        of_left.push(signs.clone().matmul(r.clone().transpose()));
        let part = block.transpose().matmul(signs);
        of_right = Some(match of_right {
            Some(sum) => sum + part,
            None => part,
        });
    }
    let of_left = Tensor::cat(of_left, 0);
    let of_right = of_right.unwrap_or_else(|| r.zeros_like());
    // The sum is homogeneous in each factor: it is the inner product of a factor with its gradient.
    if !left.device().is_autodiff() {
        return (left * of_left).sum();
    }
    let through = (right.clone() * Tensor::from_inner(of_right)).sum();
    (left * Tensor::from_inner(of_left)).sum() + through.clone() - through.detach()
}

impl Structure for Pego {
    fn factors(&self) -> Option<Factors> {
        Some(Factors { a: self.a.val(), b: self.b.val(), scale: self.scale })
    }

    fn penalty(&self, base: &Base<'_>, _totals: &Totals) -> Option<Penalty> {
        if self.options.lambda == 0.0 {
            return None;
        }
        let [preserve, diversify] = self.terms(&base.weight());
        let value = (preserve + diversify).mul_scalar(self.options.lambda);
        Some(Penalty { at: PenaltyAt::Loss, value })
    }
}

impl Method for Pego {
    type Options = PegoOptions;

    const LR: f64 = 5e-4;

    const SPEC: Spec = Spec {
        name: "pego",
        title: "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization",
        arxiv: "2407.15085",
        summary: "a group of LoRAs kept orthogonal to the weight and to each other, for data unlike that of the training",
        trains: "adapters r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(4),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(_options: &PegoOptions, place: &Place) -> Result<(), String> {
        place.check_rank()
    }

    fn build(options: &PegoOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], width) = (site.place.shape, site.place.rank * options.adapters);
        let bound = (d_in as f64).sqrt().recip();
        Ok(Self {
            a: site.trained("a", [d_in, width], |site| Ok(site.uniform("a", d_in * width, bound)))?,
            b: site.trained("b", [width, d_out], |_| Ok(vec![0.0; width * d_out]))?,
            scale: site.place.scale,
            options: options.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::GradientsParams;
    use lowrank_kernels::host::values as host;

    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, wave};

    fn config(options: &PegoOptions) -> AdapterConfig {
        let PegoOptions { adapters, lambda, reduction, squared } = options.clone();
        let reduction = if reduction == Reduction::Sum { "sum" } else { "mean" };
        let config = AdapterConfig::new("pego").with_rank(3).with_option("adapters", adapters);
        config.with_option("lambda", lambda).with_option("reduction", reduction).with_option("squared", squared)
    }

    fn of(bench: &Bench) -> Pego {
        let adapter = bench.adapter();
        let Some(pego) = adapter.structure.downcast_ref::<Pego>() else { unreachable!() };
        pego.clone()
    }

    /// The terms of dense updates.
    fn dense(pego: &Pego, weight: Tensor<2>, squared: bool) -> [Tensor<1>; 2] {
        let sum = |product: Tensor<2>| if squared { product.square().sum() } else { product.abs().sum() };
        let count = pego.options.adapters;
        let pairs = pego.a.val().chunk(count, 1).into_iter().zip(pego.b.val().chunk(count, 0));
        let updates: Vec<Tensor<2>> = pairs.map(|(a, b)| a.matmul(b)).collect();
        let weight = Tensor::from_inner(weight.without_autodiff()).transpose();
        let mut terms = [Tensor::zeros([1], &weight.device()), Tensor::zeros([1], &weight.device())];
        for (i, update) in updates.iter().enumerate() {
            terms[0] = terms[0].clone() + sum(weight.clone().matmul(update.clone()));
            for other in &updates[i + 1..] {
                terms[1] = terms[1].clone() + sum(update.clone().transpose().matmul(other.clone()));
            }
        }
        terms
    }

    #[test]
    fn terms_of_factors_are_those_of_dense_updates() {
        // More rows than a block.
        for (d_in, d_out) in [(9, 300), (12, 5)] {
            for squared in [false, true] {
                let options = PegoOptions { adapters: 3, squared, ..PegoOptions::default() };
                let bench = Bench::new(d_in, d_out, false).moved(&config(&options));
                let pego = of(&bench);
                let weight = wave([d_in, d_out], 3);
                let gradients = |terms: [Tensor<1>; 2]| {
                    let [preserve, diversify] = terms;
                    let values = [host(preserve.clone())[0], host(diversify.clone())[0]];
                    let loss = preserve + diversify.mul_scalar(0.7);
                    let mut grads = GradientsParams::from_grads(loss.backward(), &pego);
                    let grads = [&pego.a, &pego.b].map(|factor| grads.remove::<2>(factor.id).unwrap());
                    (values, grads)
                };
                let (ours, [a, b]) = gradients(pego.terms(&weight));
                let (expected, [of_a, of_b]) = gradients(dense(&pego, weight, squared));
                for (ours, expected) in ours.into_iter().zip(expected) {
                    assert!((ours / expected - 1.0).abs() < 1e-5, "{ours} and {expected}");
                }
                near(a, of_a, 1e-4);
                near(b, of_b, 1e-4);
            }
        }
    }

    #[test]
    fn one_adapter_has_nothing_to_differ_from_and_orthogonal_ones_cost_nothing() {
        let bench = Bench::new(8, 6, false).moved(&config(&PegoOptions { adapters: 1, ..PegoOptions::default() }));
        let [preserve, diversify] = of(&bench).terms(&wave([8, 6], 3)).map(|term| host(term)[0]);
        assert!(preserve > 0.0 && diversify == 0.0);
        // A weight that reads the first inputs alone, and adapters that read one of the others each.
        let options = PegoOptions { adapters: 2, ..PegoOptions::default() };
        let bench = Bench::new(8, 6, false).moved(&config(&options));
        let mut tensors = bench.tensors();
        Bench::change(&mut tensors, "a", |place, value| if place % 8 == 2 + place / 24 { value } else { 0.0 });
        let pego = of(&Bench::new(8, 6, false).with_tensors(&config(&options), tensors));
        let weight = wave([8, 6], 3).slice_fill([2..8, 0..6], 0.0);
        assert_eq!(pego.terms(&weight).map(|term| host(term)[0]), [0.0, 0.0]);
    }

    #[test]
    fn the_terms_are_zero_at_the_start_and_grow_with_the_updates() {
        let options = PegoOptions { adapters: 2, ..PegoOptions::default() };
        let weight = wave([8, 6], 3);
        let start = of(&Bench::new(8, 6, false).with(&config(&options)));
        let [preserve, diversify] = start.terms(&weight);
        assert_eq!([preserve.clone(), diversify.clone()].map(|term| host(term)[0]), [0.0, 0.0]);
        let mut grads = GradientsParams::from_grads((preserve + diversify).backward(), &start);
        for factor in [&start.a, &start.b] {
            assert!(host(grads.remove::<2>(factor.id).unwrap()).iter().all(|value| *value == 0.0));
        }
        let moved = Bench::new(8, 6, false).moved(&config(&options));
        let mut tensors = moved.tensors();
        Bench::change(&mut tensors, "b", |_, value| -2.0 * value);
        let doubled = Bench::new(8, 6, false).with_tensors(&config(&options), tensors);
        let [one, two] = [&moved, &doubled].map(|bench| of(bench).terms(&weight).map(|term| host(term)[0]));
        assert!((two[0] / one[0] - 2.0).abs() < 1e-4 && (two[1] / one[1] - 4.0).abs() < 1e-4, "{one:?} {two:?}");
    }
}
