//! LoRA in three factors whose ranks and bit widths are learned by stochastic gates ("Bayesian-LoRA: LoRA based Parameter
//! Efficient Fine-Tuning using Optimal Quantization levels and Rank Values trough Differentiable Bayesian Gates", arXiv
//! 2406.13046). The gates and the quantiser are those of Bayesian Bits; how they are joined with LoRA is our reading of
//! a paper without code.

mod gates;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::bit_quantised;
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::components::kept;
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Penalty, PenaltyAt, Structure, Totals};

use gates::nested;
pub use gates::{HardConcrete, level_penalty};

/// `y = x W + scale (x Q(A) diag(Q(E) G)) Q(B)` with quantisers Q and gates G.
#[derive(Module, Debug)]
pub struct BayesianLora {
    /// Factor at the input `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Values between the factors `[rank]`, zero at the start.
    pub e: Param<Tensor<1>>,
    /// Factor at the output `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
    /// Ranges of the quantisers of A, E and B `[3]`.
    pub x_max: Option<Param<Tensor<1>>>,
    /// Logits of the levels above 2 bits of A, E and B `[3, levels]`.
    pub phi: Option<Param<Tensor<2>>>,
    /// Logits of the components `[rank]`.
    pub psi: Option<Param<Tensor<1>>>,
    #[module(skip)]
    scale: f64,
    /// Largest side of the layers of the adapter.
    #[module(skip)]
    largest: usize,
    #[module(skip)]
    options: BayesianLoraOptions,
}

/// Gated parts of [`BayesianLora`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GatedParts {
    /// Bit widths and ranks.
    Both,
    /// Bit widths.
    Quant,
    /// Ranks.
    Rank,
}

/// Weights of the levels in the penalty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LevelWeights {
    /// 1 for every level.
    Const,
    /// Bits of the level times the share of the tensor in the multiplications of the largest one.
    Bop,
}

/// Options of [`BayesianLora`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BayesianLoraOptions {
    /// Gated parts.
    pub mode: GatedParts,
    /// A component that is off switches off all later ones.
    pub nested: bool,
    /// Bits of the highest level: 4, 8, 16 or 32, of which 32 has no effect in f32.
    pub max_bits: usize,
    /// Strength of the penalty on bit widths.
    #[schemars(range(min = 0.0, max = 1e6))]
    pub mu_q: f64,
    /// Strength of the penalty on ranks.
    #[schemars(range(min = 0.0, max = 1e6))]
    pub mu_r: f64,
    /// Weights of the levels in the penalty on bit widths.
    pub level_weights: LevelWeights,
    /// Logit of every gate at the start.
    #[schemars(range(min = -100.0, max = 100.0))]
    pub logit_init: f64,
    /// Logit up to which a level is off in training without a draw, and stays so; below 0, or null to draw every gate.
    pub dead_logit: Option<f64>,
    /// A gate is on outside of training if its probability of being off is below this.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub test_threshold: f64,
}

impl Default for BayesianLoraOptions {
    fn default() -> Self {
        Self {
            mode: GatedParts::Both,
            nested: true,
            max_bits: 16,
            mu_q: 0.01,
            mu_r: 0.01,
            level_weights: LevelWeights::Const,
            logit_init: 6.0,
            dead_logit: Some(-2.0),
            test_threshold: 0.34,
        }
    }
}

impl BayesianLoraOptions {
    fn gate(&self) -> HardConcrete {
        HardConcrete { threshold: self.test_threshold, dead_logit: self.dead_logit, ..HardConcrete::default() }
    }

    /// Number of levels above 2 bits.
    fn levels(&self) -> usize {
        self.max_bits.ilog2() as usize - 1
    }
}

/// Smallest range of a quantiser.
pub const LEAST_RANGE: f64 = 1e-6;

/// Uniform draws of the gates of one forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct GateDraws {
    /// For the levels of the quantisers of A, E and B.
    pub levels: [Vec<f32>; 3],
    /// For the components.
    pub components: Vec<f32>,
}

/// Gates of one forward pass.
#[derive(Clone, Debug)]
pub struct Gates {
    /// Levels `[levels]` of the quantisers of A, E and B; none without quantisers.
    pub levels: Option<[Tensor<1>; 3]>,
    /// Components `[rank]`; none if all are on.
    pub components: Option<Tensor<1>>,
}

impl BayesianLora {
    /// Gates for draws, or those outside of training.
    pub fn gates(&self, draws: Option<&GateDraws>) -> Gates {
        let gate = self.options.gate();
        let of = |gate: HardConcrete, phi: Tensor<1>, u: Option<&[f32]>| match u {
            Some(u) => gate.sampled(phi, u),
            None => gate.decided(phi),
        };
        let levels = self.phi.as_ref().map(|phi| {
            let levels = self.options.levels();
            let u = draws.map(|draws| draws.levels.concat());
            let all = of(gate, phi.val().reshape([3 * levels]), u.as_deref());
            [0, 1, 2].map(|tensor| all.clone().narrow(0, tensor * levels, levels))
        });
        // Only levels stay off: a component that is off can come back.
        let lively = HardConcrete { dead_logit: None, ..gate };
        let u = draws.map(|draws| draws.components.as_slice());
        let components = self.psi.as_ref().map(|psi| of(lively, psi.val(), u));
        Gates { levels, components }
    }

    /// Factor of every component `[rank]` for its gates.
    pub fn effective(&self, components: Tensor<1>) -> Tensor<1> {
        if self.options.nested { nested(components) } else { components }
    }

    /// Quantised A, E and B.
    pub fn quantised(&self, gates: &Gates) -> (Tensor<2>, Tensor<1>, Tensor<2>) {
        let (a, e, b) = (self.a.val(), self.e.val(), self.b.val());
        let (Some(x_max), Some([of_a, of_e, of_b])) = (&self.x_max, &gates.levels) else { return (a, e, b) };
        let most = |tensor: usize| x_max.val().narrow(0, tensor, 1);
        (
            bit_quantised(a, most(0), of_a.clone()),
            bit_quantised(e, most(1), of_e.clone()),
            bit_quantised(b, most(2), of_b.clone()),
        )
    }

    /// Update for these gates.
    pub fn factors_with(&self, gates: &Gates) -> Factors {
        let (a, e, b) = self.quantised(gates);
        let e = match &gates.components {
            Some(components) => e * self.effective(components.clone()),
            None => e,
        };
        Factors { a: a * e.unsqueeze(), b, scale: self.scale }
    }

    /// Penalty of the quantisers and that of the components, without their strengths.
    pub fn penalties(&self) -> [Option<Tensor<1>>; 2] {
        let gate = self.options.gate();
        let levels = self.phi.as_ref().map(|phi| {
            let levels = self.options.levels();
            let probabilities = gate.probability(phi.val().reshape([3 * levels]));
            level_penalty(
                probabilities.reshape([3, levels]),
                &[0, 1, 2].map(|tensor| self.level_weights(tensor)).concat(),
            )
        });
        let components = self.psi.as_ref().map(|psi| {
            let probabilities = gate.probability(psi.val());
            if self.options.nested { nested(probabilities).sum() } else { probabilities.sum() }
        });
        [levels, components]
    }

    fn level_weights(&self, tensor: usize) -> Vec<f64> {
        let [d_in, _] = self.a.dims();
        let [_, d_out] = self.b.dims();
        let share = [d_in, 1, d_out][tensor] as f64 / self.largest.max(1) as f64;
        let bits = (0..self.options.levels()).map(|level| (4usize << level) as f64);
        match self.options.level_weights {
            LevelWeights::Const => vec![1.0; self.options.levels()],
            LevelWeights::Bop => bits.map(|bits| bits * share).collect(),
        }
    }

    /// Bit widths of A, E and B outside of training; 32 without quantisers.
    pub fn bits(&self) -> [usize; 3] {
        let Some(levels) = self.gates(None).levels else { return [32; 3] };
        levels.map(|gates| 2 << host(gates).into_iter().take_while(|gate| *gate > 0.0).count())
    }

    /// Indices of the components that are on outside of training.
    pub fn components(&self) -> Vec<usize> {
        let rank = self.e.dims()[0];
        match self.gates(None).components {
            None => (0..rank).collect(),
            Some(gates) => {
                let factors = host(self.effective(gates));
                (0..rank).filter(|place| factors[*place] > 0.0).collect()
            }
        }
    }

    /// Bit operations of the adapter for a token with activations of these bits, and those of all components with 32
    /// bits everywhere.
    pub fn bit_operations(&self, activation_bits: usize) -> [f64; 2] {
        let ([d_in, rank], [_, d_out]) = (self.a.dims(), self.b.dims());
        let operations = |rank: usize, [a, e, b]: [usize; 3]| ((a * d_in + e + b * d_out) * rank) as f64;
        [activation_bits as f64 * operations(self.components().len(), self.bits()), 32.0 * operations(rank, [32; 3])]
    }

    fn draws(&self, input: &Input) -> GateDraws {
        let draw = |what: &str, count: usize| {
            let mut random = input.random(what);
            (0..count).map(|_| random.random::<f32>()).collect()
        };
        let levels = self.options.levels();
        GateDraws {
            levels: ["levels.a", "levels.e", "levels.b"].map(|what| draw(what, levels)),
            components: draw("components", self.e.dims()[0]),
        }
    }
}

impl Structure for BayesianLora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let draws = input.pass.training.then(|| self.draws(&input));
        let Factors { a, b, scale } = self.factors_with(&self.gates(draws.as_ref()));
        base.plus_product(input, a, b, scale)
    }

    fn factors(&self) -> Option<Factors> {
        Some(self.factors_with(&self.gates(None)))
    }

    /// Components that are off are left out.
    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        let Factors { a, b, scale } = self.factors_with(&self.gates(None));
        Some(kept(a, b.mul_scalar(scale), &self.components()))
    }

    fn active_components(&self) -> Option<Vec<usize>> {
        Some(self.components())
    }

    fn penalty(&self, _base: &Base<'_>, _totals: &Totals) -> Option<Penalty> {
        let [levels, components] = self.penalties();
        let BayesianLoraOptions { mu_q, mu_r, .. } = self.options;
        let terms = [(levels, mu_q), (components, mu_r)];
        let terms = terms.into_iter().filter_map(|(term, strength)| Some(term?.mul_scalar(strength)));
        let value = terms.reduce(|sum, term| sum + term)?;
        Some(Penalty { at: PenaltyAt::Loss, value })
    }
}

impl Method for BayesianLora {
    type Options = BayesianLoraOptions;

    const SPEC: Spec = Spec {
        name: "bayesian-lora",
        title: "Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization levels and Rank Values trough Differentiable Bayesian Gates",
        arxiv: "2406.13046",
        summary: "LoRA in three factors whose bit widths and components have trained gates",
        trains: "r (d_in + d_out + 1) + r + 12; mode quant: r (d_in + d_out + 1) + 12; mode rank: r (d_in + d_out + 2); \
                 max_bits: 3 more or less for each level",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Ranks(2.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "e", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
            TensorSpec { name: "x_max", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "phi", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "psi", role: TensorRole::Vector, transposed: false },
        ],
    };

    /// The quantised factors, and that of the input times what is between them.
    fn kept(options: &BayesianLoraOptions, place: &Place) -> usize {
        let [d_in, d_out] = place.shape;
        match options.mode {
            GatedParts::Rank => place.rank * d_in,
            _ => place.rank * (2 * d_in + d_out),
        }
    }

    fn check(options: &BayesianLoraOptions, _place: &Place) -> Result<(), String> {
        match *options {
            BayesianLoraOptions { max_bits, .. } if ![4, 8, 16, 32].contains(&max_bits) => {
                Err(format!("max_bits = {max_bits}: must be 4, 8, 16 or 32"))
            }
            BayesianLoraOptions { dead_logit: Some(dead), .. } if !(dead < 0.0 && dead.is_finite()) => {
                Err(format!("dead_logit = {dead}: must be below 0; leave it empty to draw every gate"))
            }
            _ => Ok(()),
        }
    }

    fn build(options: &BayesianLoraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let mut ranges = [1.0f32; 3];
        let mut normal = |site: &Site<'_>, what: &str, place: usize, count: usize| {
            let values = site.normal(what, count, 0.02);
            ranges[place] = values.iter().fold(LEAST_RANGE as f32, |most, value| most.max(value.abs()));
            values
        };
        let a = normal(site, "a", 0, d_in * rank);
        let b = normal(site, "b", 2, rank * d_out);
        let (a, b) = (site.trained("a", [d_in, rank], |_| Ok(a))?, site.trained("b", [rank, d_out], |_| Ok(b))?);
        let e = site.trained("e", [rank], |_| Ok(vec![0.0; rank]))?;
        let (levels, logit) = (options.levels(), options.logit_init as f32);
        let (quantises, gates) = (options.mode != GatedParts::Rank, options.mode != GatedParts::Quant);
        Ok(Self {
            a,
            e,
            b,
            x_max: match quantises {
                true => Some(site.trained("x_max", [3], |_| Ok(ranges.to_vec()))?),
                false => None,
            },
            phi: match quantises {
                true => Some(site.trained("phi", [3, levels], |_| Ok(vec![logit; 3 * levels]))?),
                false => None,
            },
            psi: match gates {
                true => Some(site.trained("psi", [rank], |_| Ok(vec![logit; rank]))?),
                false => None,
            },
            scale: site.place.scale,
            largest: site.place.largest[0].max(site.place.largest[1]),
            options: *options,
        })
    }
}
