//! Leading singular values scaled and shifted individually, the remaining ones mixed by a low-rank matrix ("SALT:
//! Singular Value Adaptation with Low-Rank Transformation", arXiv 2503.16055).

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};
use lowrank_optim::thin_svd;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::initialisation::Initialisation;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Penalty, PenaltyAt, Structure, Totals, frobenius};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::linear;

/// Initialisation of the low-rank factors.
const SMALL_RANDOM: Initialisation = Initialisation {
    changes_output: true,
    ..Initialisation::plain(
        "small_random",
        "low-rank factors normal with standard deviation 0.01; changes the output",
        &[],
    )
};

/// `y = x W + x V (C - S) U` with the singular value decomposition `W = V S U` and a core C that replaces S: the
/// diagonal `scale * s + shift` for the first `k` values, `diag(s) + low_y low_x` for the remaining ones. The output of
/// the layer is unchanged at the start, bit for bit.
///
/// The core is in the layout of the weight: the transpose of the paper's.
#[derive(Module, Debug)]
pub struct Salt {
    /// Directions at the output `[q, d_out]`, `q` the smaller side.
    pub u: Param<Tensor<2>>,
    /// Singular values `[q]`.
    pub s: Param<Tensor<1>>,
    /// Directions at the input `[d_in, q]`.
    pub vt: Param<Tensor<2>>,
    /// Factors of the first values `[k]`.
    pub scale: Param<Tensor<1>>,
    /// Shifts of the first values `[k]`.
    pub shift: Param<Tensor<1>>,
    /// Factor of the remaining values `[rank, q - k]`; none if there are none.
    pub low_x: Option<Param<Tensor<2>>>,
    /// Factor of the remaining values `[q - k, rank]`.
    pub low_y: Option<Param<Tensor<2>>>,
    #[module(skip)]
    relu: SaltRelu,
    #[module(skip)]
    pull: f64,
}

/// Entries of the core that are clamped at zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SaltRelu {
    /// Every entry, as the authors have it: of the low-rank matrix the positive entries alone take part.
    #[default]
    Matrix,
    /// The diagonal.
    Diagonal,
    /// Nothing: the update is a product of two factors.
    None,
}

/// Options of [`Salt`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SaltOptions {
    /// Fraction of the singular values adapted one by one; at least one value.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub ratio: f64,
    /// Number of singular values adapted one by one, in place of `ratio`.
    #[schemars(extend("x-unset" = "from ratio"))]
    pub top_k: Option<usize>,
    /// Entries of the core that are clamped at zero.
    pub relu: SaltRelu,
    /// Weight of the penalty on the change of the singular values and on the low-rank matrix.
    #[schemars(range(min = 0.0))]
    pub reg_multiplier: f64,
}

impl Default for SaltOptions {
    fn default() -> Self {
        Self { ratio: 0.1, top_k: None, relu: SaltRelu::Matrix, reg_multiplier: 0.0 }
    }
}

impl SaltOptions {
    /// Number of values of `side` that are adapted individually.
    fn top(&self, side: usize) -> usize {
        self.top_k.unwrap_or(((self.ratio * side as f64).floor() as usize).max(1))
    }
}

impl Salt {
    /// Number of values adapted individually, and of all values.
    fn sizes(&self) -> [usize; 2] {
        [self.scale.val().dims()[0], self.s.val().dims()[0]]
    }

    /// First values after and before the change, `[k]`.
    fn first(&self) -> [Tensor<1>; 2] {
        let [top, _] = self.sizes();
        let s = self.s.val().narrow(0, 0, top);
        [s.clone() * self.scale.val() + self.shift.val(), s]
    }

    /// Change of the first values, `[1, k]`.
    fn moved(&self) -> Tensor<2> {
        let [values, s] = self.first();
        let values = if self.relu == SaltRelu::None { values } else { activation::relu(values) };
        (values - s).unsqueeze()
    }

    /// Factors `[q - k, rank]` and `[rank, q - k]` of the remaining values.
    fn low(&self) -> Option<[Tensor<2>; 2]> {
        Some([self.low_y.as_ref()?.val(), self.low_x.as_ref()?.val()])
    }

    /// Multiplies `h [n, q - k]`, along the remaining input directions, by the change of their block of the core.
    fn rest(&self, h: Tensor<2>, [y, x]: [Tensor<2>; 2]) -> Tensor<2> {
        let [top, all] = self.sizes();
        let s = self.s.val().narrow(0, top, all - top).unsqueeze::<2>();
        match self.relu {
            SaltRelu::None => linear(linear(h, y), x),
            SaltRelu::Diagonal => {
                let added: Tensor<2> = (y.clone().transpose() * x.clone()).sum_dim(0);
                let lifted = activation::relu(s.clone() + added.clone()) - s - added;
                linear(linear(h.clone(), y), x) + h * lifted
            }
            SaltRelu::Matrix => {
                let diagonal = Tensor::<2>::eye(all - top, &s.device()) * s;
                linear(h, activation::relu(diagonal.clone() + y.matmul(x)) - diagonal)
            }
        }
    }

    /// Maps `h [n, q]`, along the input directions, through the change of the core to the output, `[n, d_out]`.
    fn through(&self, h: Tensor<2>) -> Tensor<2> {
        let [top, all] = self.sizes();
        let first = h.clone().narrow(1, 0, top) * self.moved();
        let mixed = match self.low() {
            Some(low) => Tensor::cat(vec![first, self.rest(h.narrow(1, top, all - top), low)], 1),
            None => first,
        };
        linear(mixed, self.u.val())
    }
}

impl Structure for Salt {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        if let Some([a, b]) = self.as_factors() {
            return base.plus_product(input, a, b, 1.0);
        }
        // For more rows than the core has, the dense update costs less and is kept once instead of for each row.
        match input.x.dims()[0] > self.sizes()[1] {
            true => base.plus_update(input.x, self.through(self.vt.val())),
            false => base.plus(input, |x| self.through(linear(x, self.vt.val()))),
        }
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(match self.as_factors() {
            Some([a, b]) => a.matmul(b),
            None => self.through(self.vt.val()),
        })
    }

    fn penalty(&self, _base: &Base<'_>, _totals: &Totals) -> Option<Penalty> {
        if self.pull == 0.0 {
            return None;
        }
        let [values, s] = self.first();
        let moved = frobenius((values - s).unsqueeze(), 0.0);
        let sum = match self.low() {
            Some([y, x]) => moved + frobenius(y.matmul(x), 0.0),
            None => moved,
        };
        Some(Penalty { at: PenaltyAt::Loss, value: sum.mul_scalar(self.pull) })
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        if self.relu != SaltRelu::None {
            return None;
        }
        let [top, all] = self.sizes();
        let (u, v) = (self.u.val(), self.vt.val());
        let (mut left, mut right) =
            (vec![v.clone().narrow(1, 0, top) * self.moved()], vec![u.clone().narrow(0, 0, top)]);
        if let Some([y, x]) = self.low() {
            left.push(v.narrow(1, top, all - top).matmul(y));
            right.push(x.matmul(u.narrow(0, top, all - top)));
        }
        Some([Tensor::cat(left, 1), Tensor::cat(right, 0)])
    }
}

impl Method for Salt {
    type Options = SaltOptions;

    const LR: f64 = 1e-4;

    const SPEC: Spec = Spec {
        name: "salt",
        title: "SALT: Singular Value Adaptation with Low-Rank Transformation",
        arxiv: "2503.16055",
        summary: "scales and shifts the leading singular values, mixes the others by a low-rank matrix",
        trains: "2 top_k + 2 r (min(d_in, d_out) - top_k)",
        stores: "min(d_in, d_out) (d_in + d_out + 1)",
        dense_forward: true,
        rank: Rank::Fixed(4),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[&SMALL_RANDOM],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "u", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "s", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "vt", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "scale", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "shift", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "low_x", role: TensorRole::A, transposed: true },
            TensorSpec { name: "low_y", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(options: &SaltOptions, place: &Place) -> Result<(), String> {
        let side = place.shape[0].min(place.shape[1]);
        if options.top_k.is_some() && options.ratio != SaltOptions::default().ratio {
            return Err("ratio and top_k say the same; give one of them".into());
        }
        let top = options.top(side);
        if top < 1 || top > side {
            return Err(format!("top_k = {top}: needs 1 to {side}, the smaller side"));
        }
        match side - top {
            rest if rest > 0 && !(1..=rest).contains(&place.rank) => Err(format!(
                "rank {} is larger than {rest}, the number of values that are not among the first {top}",
                place.rank
            )),
            _ => Ok(()),
        }
    }

    fn build(options: &SaltOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let side = d_in.min(d_out);
        let top = options.top(side);
        let rest = side - top;
        let start = (!site.is_given()).then(|| thin_svd(&site.weight().transpose(), side));
        let (u, s, vt) = start.map_or_else(Default::default, |svd| {
            let values = svd.values.iter().map(|value| *value as f32).collect();
            (host(svd.left.transpose()), values, host(svd.right))
        });
        let small = site.place.init == SMALL_RANDOM.name;
        // Kaiming bound of a rectifier with `rank` inputs.
        let bound = (6.0 / rank as f64).sqrt();
        let mut low_x = None;
        let mut low_y = None;
        if rest > 0 {
            low_x = Some(site.trained("low_x", [rank, rest], |site| {
                let count = rank * rest;
                Ok(if small { site.normal("low_x", count, 0.01) } else { site.uniform("low_x", count, bound) })
            })?);
            low_y = Some(site.trained("low_y", [rest, rank], |site| {
                let count = rank * rest;
                Ok(if small { site.normal("low_y", count, 0.01) } else { vec![0.0; count] })
            })?);
        }
        Ok(Self {
            u: site.frozen("u", [side, d_out], |_| Ok(u))?,
            s: site.frozen("s", [side], |_| Ok(s))?,
            vt: site.frozen("vt", [d_in, side], |_| Ok(vt))?,
            scale: site.trained("scale", [top], |_| Ok(vec![1.0; top]))?,
            shift: site.trained("shift", [top], |_| Ok(vec![0.0; top]))?,
            low_x,
            low_y,
            relu: options.relu,
            pull: options.reg_multiplier,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, largest, near};

    const MODES: [&str; 3] = ["matrix", "diagonal", "none"];

    fn config(relu: &str) -> AdapterConfig {
        AdapterConfig::new("salt").with_rank(2).with_option("top_k", 3).with_option("relu", relu)
    }

    /// `U' (W') V` of the paper, transposed.
    fn core(bench: &Bench) -> Tensor<2> {
        bench.tensor::<2>("vt").matmul(bench.merged()).matmul(bench.tensor::<2>("u"))
    }

    #[test]
    fn it_starts_as_the_base_and_all_ways_to_run_it_agree() {
        for relu in MODES {
            let bench = Bench::new(9, 7, true);
            let start = bench.with(&config(relu));
            assert!(largest(start.output() - bench.output()) == 0.0);
            assert!(
                start.adapter().shapes().iter().map(|t| t.shape.iter().product::<usize>()).sum::<usize>()
                    == 7 * (9 + 7 + 1) + 2 * 3 + 2 * 2 * 4
            );
            let moved = bench.moved(&config(relu));
            for rows in [3, 40] {
                near(moved.forward(moved.input(rows)), moved.merge().forward(moved.input(rows)), 1e-5);
            }
            let random = AdapterConfig { init: "small_random".into(), ..config(relu) };
            assert!(largest(bench.with(&random).output() - bench.output()) > 0.0);
        }
    }

    #[test]
    fn the_core_has_its_blocks_and_signs() {
        let bench = Bench::new(9, 7, false);
        let off = |core: &Tensor<2>| {
            let [first, rest] = [core.clone().slice([0..3, 3..7]), core.clone().slice([3..7, 0..3])];
            largest(first).max(largest(rest))
        };
        for relu in MODES {
            let core = core(&bench.moved(&config(relu)));
            assert!(off(&core) < 1e-5);
            let lowest: f32 = core.clone().min().into_scalar();
            assert_eq!(lowest > -1e-6, relu == "matrix");
        }
        // Values shifted below zero are clamped.
        let all = AdapterConfig::new("salt").with_option("top_k", 7).with_option("relu", "diagonal");
        let mut tensors = bench.with(&all).tensors();
        assert!(!tensors.contains_key("low_x"));
        let s = tensors["s"].0.clone();
        Bench::change(&mut tensors, "shift", |_, _| -s[3]);
        let core = core(&bench.with_tensors(&all, tensors));
        let values: Vec<f32> = host((core * Tensor::eye(7, &Default::default())).sum_dim(0));
        assert!(values.iter().zip(&s).all(|(value, s0)| (value - (s0 - s[3]).max(0.0)).abs() < 1e-5));
    }

    #[test]
    fn the_first_step_moves_the_diagonal_and_a_zero_penalty_pulls_nowhere() {
        let bench = Bench::new(9, 7, true);
        let start = bench.with(&config("matrix").with_option("reg_multiplier", 0.5));
        assert_eq!(start.penalty(PenaltyAt::Loss).into_scalar::<f32>(), 0.0);
        let plain = bench.with(&config("matrix"));
        for field in ["scale", "shift", "low_x", "low_y"] {
            assert_eq!(start.gradient(start.gradients(), field), plain.gradient(plain.gradients(), field));
        }
        assert!(plain.gradient(plain.gradients(), "low_x").iter().all(|gradient| *gradient == 0.0));
        // In the mode without rectifier the whole block passes its gradient; here only its diagonal does: column j of
        // low_y moves along row j of low_x.
        let x = plain.values("low_x");
        let gradient = plain.gradient(plain.gradients(), "low_y");
        for j in 0..4 {
            let along = [gradient[j] / x[2 * j], gradient[4 + j] / x[2 * j + 1]];
            assert!(gradient[j] != 0.0 && (along[0] / along[1] - 1.0).abs() < 1e-4, "{along:?}");
        }
    }
}
