//! A low-rank branch in parallel to the layer and one after it ("Hydra: Multi-head Low-rank Adaptation for Parameter
//! Efficient Fine-tuning", arXiv 2309.06922).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_optim::inverse;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use lowrank_kernels::ops::linear;

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::initialisation::Initialisation;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};

/// Initialisations of the first factors, as in the authors' code for images.
const XAVIER: Initialisation =
    Initialisation::plain("xavier", "first factors uniform between plus and minus sqrt(6 / (d_in + r))", &[]);
const NORMAL: Initialisation =
    Initialisation::plain("normal", "first factors normal with standard deviation 0.02", &[]);

/// `y = h + scale (x A_p) B_p + scale (h A_s) B_s` with `h = x W + b`; with biases in the branches, `(x A_p + a_p) B_p + b_p`.
///
/// A branch of rank 0 has no tensors.
#[derive(Module, Debug)]
pub struct Hydra {
    /// First factor of the parallel branch `[d_in, rank_parallel]`.
    pub par_a: Option<Param<Tensor<2>>>,
    /// Second factor of the parallel branch `[rank_parallel, d_out]`, zero at the start.
    pub par_b: Option<Param<Tensor<2>>>,
    /// Bias between them `[rank_parallel]`.
    pub par_a_bias: Option<Param<Tensor<1>>>,
    /// Bias of the branch `[d_out]`.
    pub par_b_bias: Option<Param<Tensor<1>>>,
    /// First factor of the sequential branch `[d_out, rank_sequential]`.
    pub seq_a: Option<Param<Tensor<2>>>,
    /// Second factor of the sequential branch `[rank_sequential, d_out]`, zero at the start.
    pub seq_b: Option<Param<Tensor<2>>>,
    /// Bias between them `[rank_sequential]`.
    pub seq_a_bias: Option<Param<Tensor<1>>>,
    /// Bias of the branch `[d_out]`.
    pub seq_b_bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    scale: f64,
}

/// Options of [`Hydra`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct HydraOptions {
    /// Rank of the branch in parallel to the layer; 0 for none.
    pub rank_parallel: usize,
    /// Rank of the branch behind the layer; 0 for none.
    pub rank_sequential: usize,
    /// Scale of both branches, not 0.
    pub scale: f64,
    /// Gives the branches biases.
    pub branch_bias: bool,
}

impl Default for HydraOptions {
    fn default() -> Self {
        Self { rank_parallel: 4, rank_sequential: 8, scale: 1.0, branch_bias: false }
    }
}

/// One branch: two factors and its biases.
struct Branch {
    name: &'static str,
    a: Tensor<2>,
    b: Tensor<2>,
    biases: Option<[Tensor<1>; 2]>,
}

impl Branch {
    fn of(
        name: &'static str,
        factors: [&Option<Param<Tensor<2>>>; 2],
        biases: [&Option<Param<Tensor<1>>>; 2],
    ) -> Option<Self> {
        let [Some(a), Some(b)] = factors else { return None };
        let biases = match biases {
            [Some(a), Some(b)] => Some([a.val(), b.val()]),
            _ => None,
        };
        Some(Self { name, a: a.val(), b: b.val(), biases })
    }

    /// Output of the branch; dropout is applied between the factors.
    fn forward(self, input: &Input, x: Tensor<2>) -> Tensor<2> {
        let inner = linear(x, self.a);
        match self.biases {
            None => linear(input.inside(self.name, inner), self.b),
            Some([a, b]) => linear(input.inside(self.name, inner + a.unsqueeze()), self.b) + b.unsqueeze(),
        }
    }

    /// Output of the branch for a zero input, `[1, d_out]`.
    fn offset(self) -> Option<Tensor<2>> {
        let [a, b] = self.biases?;
        Some(a.unsqueeze::<2>().matmul(self.b) + b.unsqueeze())
    }
}

impl Hydra {
    fn parallel(&self) -> Option<Branch> {
        Branch::of("parallel", [&self.par_a, &self.par_b], [&self.par_a_bias, &self.par_b_bias])
    }

    fn sequential(&self) -> Option<Branch> {
        Branch::of("sequential", [&self.seq_a, &self.seq_b], [&self.seq_a_bias, &self.seq_b_bias])
    }

    /// Sum of the branches' biases, which is added to the layer's, `[1, d_out]`.
    fn offset(&self) -> Option<Tensor<2>> {
        let offsets = [self.parallel(), self.sequential()].into_iter().flatten().filter_map(Branch::offset);
        offsets.reduce(|a, b| a + b).map(|offset| offset.mul_scalar(self.scale))
    }

    /// Computes `h + scale (h A_s) B_s` of rows `h [n, d_out]`.
    fn recombined(&self, h: Tensor<2>) -> Tensor<2> {
        match self.sequential() {
            Some(branch) => h.clone() + linear(linear(h, branch.a), branch.b).mul_scalar(self.scale),
            None => h,
        }
    }

    /// Recovers the rows `h` from the output of [`Self::recombined`] by the Woodbury identity; none if they cannot be
    /// recovered.
    fn restored(&self, rows: Tensor<2>) -> Option<Tensor<2>> {
        let Some(branch) = self.sequential() else { return Some(rows) };
        let (a, b) = (branch.a.without_autodiff(), branch.b.without_autodiff().mul_scalar(self.scale));
        let [_, rank] = a.dims();
        let core = inverse(&(Tensor::eye(rank, &a.device()) + b.clone().matmul(a.clone())))?;
        Some(rows.clone() - rows.matmul(a).matmul(core).matmul(b))
    }
}

impl Structure for Hydra {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let parallel = self.parallel();
        let Some(sequential) = self.sequential() else {
            return match parallel {
                Some(Branch { a, b, biases: None, .. }) if !input.drops() => base.plus_product(input, a, b, self.scale),
                Some(branch) => {
                    let x = input.x.clone();
                    base.forward(x.clone()) + branch.forward(&input, x).mul_scalar(self.scale)
                }
                None => base.forward(input.x),
            };
        };
        let h = base.forward(input.x.clone());
        let behind = sequential.forward(&input, h.clone());
        let added = match parallel {
            Some(branch) => branch.forward(&input, input.x.clone()) + behind,
            None => behind,
        };
        h + added.mul_scalar(self.scale)
    }

    fn delta_weight(&self, weight: &Tensor<2>) -> Option<Tensor<2>> {
        let products = [
            self.parallel().map(|branch| branch.a.matmul(branch.b)),
            self.sequential().map(|branch| weight.clone().matmul(branch.a).matmul(branch.b)),
        ];
        Some(match products.into_iter().flatten().reduce(|a, b| a + b) {
            Some(sum) => sum.mul_scalar(self.scale),
            None => weight.zeros_like(),
        })
    }

    fn merged_bias(&self, _weight: &Tensor<2>, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        let own = bias.map(|bias| self.recombined(bias.unsqueeze()));
        let sum = match (own, self.offset()) {
            (Some(own), Some(offset)) => Some(own + offset),
            (own, offset) => own.or(offset),
        };
        sum.map(|bias| bias.squeeze_dim(0))
    }

    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        match self.parallel() {
            Some(branch) => self.restored(merged - branch.a.matmul(branch.b).mul_scalar(self.scale)),
            None => self.restored(merged),
        }
    }
}

impl Method for Hydra {
    type Options = HydraOptions;

    const LR: f64 = 4e-4;

    const SPEC: Spec = Spec {
        name: "hydra",
        title: "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
        arxiv: "2309.06922",
        summary: "a low-rank branch in parallel to the layer and one behind it",
        trains: "rank_parallel (d_in + d_out) + 2 rank_sequential d_out + branch_bias (rank_parallel + rank_sequential + 2 d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::None,
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[&XAVIER, &NORMAL],
        dropout: true,
        merges: Ok(()),
        changes_bias: true,
        tensors: &[
            TensorSpec { name: "par_a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "par_b", role: TensorRole::B, transposed: true },
            TensorSpec { name: "par_a_bias", role: TensorRole::Bias, transposed: false },
            TensorSpec { name: "par_b_bias", role: TensorRole::Bias, transposed: false },
            TensorSpec { name: "seq_a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "seq_b", role: TensorRole::B, transposed: true },
            TensorSpec { name: "seq_a_bias", role: TensorRole::Bias, transposed: false },
            TensorSpec { name: "seq_b_bias", role: TensorRole::Bias, transposed: false },
        ],
    };

    fn check(options: &HydraOptions, _place: &Place) -> Result<(), String> {
        if options.rank_parallel == 0 && options.rank_sequential == 0 {
            return Err("rank_parallel and rank_sequential are both 0: give one of them".into());
        }
        match options.scale {
            scale if !scale.is_finite() || scale == 0.0 => {
                Err(format!("scale = {scale}: needs a number that is not 0"))
            }
            _ => Ok(()),
        }
    }

    fn build(options: &HydraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let [d_in, d_out] = site.place.shape;
        let (parallel, sequential) = (options.rank_parallel, options.rank_sequential);
        let bias = options.branch_bias;
        Ok(Self {
            par_a: first(site, "par_a", [d_in, parallel])?,
            par_b: zeros(site, "par_b", [parallel, d_out], parallel > 0)?,
            par_a_bias: zeros(site, "par_a_bias", [parallel], bias && parallel > 0)?,
            par_b_bias: zeros(site, "par_b_bias", [d_out], bias && parallel > 0)?,
            seq_a: first(site, "seq_a", [d_out, sequential])?,
            seq_b: zeros(site, "seq_b", [sequential, d_out], sequential > 0)?,
            seq_a_bias: zeros(site, "seq_a_bias", [sequential], bias && sequential > 0)?,
            seq_b_bias: zeros(site, "seq_b_bias", [d_out], bias && sequential > 0)?,
            scale: options.scale,
        })
    }
}

/// First factor `[inputs, rank]`: uniform between plus and minus `1 / sqrt(inputs)`, as in the authors' code for
/// language; `xavier` and `normal` (standard deviation 0.02) as in their code for images.
fn first(
    site: &mut Site<'_>,
    field: &str,
    [inputs, rank]: [usize; 2],
) -> Result<Option<Param<Tensor<2>>>, AdapterError> {
    if rank == 0 {
        return Ok(None);
    }
    let start = |site: &mut Site<'_>| {
        let count = inputs * rank;
        Ok(match site.place.init.as_str() {
            name if name == XAVIER.name => site.uniform(field, count, (6.0 / (inputs + rank) as f64).sqrt()),
            name if name == NORMAL.name => site.normal(field, count, 0.02),
            _ => site.uniform(field, count, (inputs as f64).sqrt().recip()),
        })
    };
    Ok(Some(site.trained(field, [inputs, rank], start)?))
}

fn zeros<const D: usize>(
    site: &mut Site<'_>,
    field: &str,
    shape: [usize; D],
    is_there: bool,
) -> Result<Option<Param<Tensor<D>>>, AdapterError> {
    match is_there {
        true => Ok(Some(site.trained(field, shape, |_| Ok(vec![0.0; shape.iter().product()]))?)),
        false => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Bench, close, largest, near};
    use crate::{AdapterConfig, Attach, PassInfo};

    fn config(parallel: usize, sequential: usize, bias: bool) -> AdapterConfig {
        let config = AdapterConfig::new("hydra").with_option("scale", 0.5).with_option("branch_bias", bias);
        config.with_option("rank_parallel", parallel).with_option("rank_sequential", sequential)
    }

    #[test]
    fn it_starts_as_the_base_merges_with_every_bias_and_comes_off() {
        for (parallel, sequential) in [(2, 3), (2, 0), (0, 3)] {
            for (bias, own) in [(false, false), (true, false), (false, true), (true, true)] {
                let (config, bench) = (config(parallel, sequential, bias), Bench::new(10, 7, own));
                let start = bench.with(&config);
                assert_eq!(largest(start.output() - bench.output()), 0.0);
                for field in start.tensors().into_keys() {
                    let still = start.gradient(start.gradients(), &field).iter().all(|gradient| *gradient == 0.0);
                    // Tensors before a zero factor do not move yet.
                    assert_eq!(still, field.contains("_a"), "{field}");
                }
                let moved = bench.moved(&config);
                near(moved.output(), moved.merge().output(), 1e-5);
                let adapter = moved.adapter();
                let back = adapter.structure().unmerged(moved.merged()).expect("a branch that can be undone");
                near(back, bench.weight(), 1e-4);
                assert_eq!(moved.biases()[1].is_some(), bias || own);
            }
        }
    }

    #[test]
    fn the_branch_beside_the_layer_is_lora() {
        let bench = Bench::new(10, 7, true);
        let hydra = bench.moved(&config(2, 0, false));
        let mut tensors = hydra.tensors();
        let tensors =
            ["a", "b"].map(|field| (field.to_string(), tensors.remove(&format!("par_{field}")).expect("a factor")));
        let lora = AdapterConfig::new("lora").with_rank(2).with_alpha(1.0);
        near(bench.with_tensors(&lora, tensors.into()).output(), hydra.output(), 1e-6);
    }

    #[test]
    fn biases_are_refused_where_the_weight_alone_is_seen() {
        // A layer without bias whose weight is composed has no place for one.
        let weight_alone = Attach::new(config(2, 2, true)).to(Bench::new(10, 7, false));
        assert!(weight_alone.is_err_and(|error| error.to_string().contains("adds a bias")));
    }

    #[test]
    fn dropout_stands_between_the_factors() {
        let bench = Bench::new(10, 7, false);
        let config = AdapterConfig { dropout: 0.5, ..config(4, 0, false) };
        let moved = bench.moved(&config);
        let whole = moved.output();
        moved.adapter().control().set_pass(PassInfo::training(0, None));
        let dropped = moved.output();
        assert!(!close(dropped.clone(), whole, 1e-3));
        // Dropout keeps or drops whole directions of the factor for a row of the input: the added part lies in the span
        // of B's rows, each in full or not at all.
        let one = moved.input(1);
        let added = moved.forward(one.clone()) - bench.forward(one.clone());
        let (a, b) = (moved.tensor::<2>("par_a"), moved.tensor::<2>("par_b"));
        let inner: Vec<f32> = lowrank_kernels::host::values(one.inner().matmul(a.transpose()));
        let fits = (0..16).any(|mask| {
            let kept: Vec<f32> = (0..4).map(|i| if mask >> i & 1 == 1 { inner[i] } else { 0.0 }).collect();
            let kept = Tensor::<1>::from_data(kept.as_slice(), &b.device()).unsqueeze::<2>();
            close(added.clone(), kept.matmul(b.clone().transpose()), 1e-4)
        });
        assert!(fits);
    }
}
