//! A product of which every truncation to its leading components is trained ("DyLoRA: Parameter Efficient Tuning of
//! Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation", arXiv 2210.07558).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::components::joined;
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};

/// Name of the value of a forward pass that sets the rank, see [`PassInfo::values`](crate::PassInfo::values).
pub const RANK_OF_PASS: &str = "rank";

/// `y = x W + b + (alpha / k) (x A_k) B_k` with the first k components, where k is the rank of the forward pass: all of
/// them where it sets none.
#[derive(Module, Debug)]
pub struct Nested {
    /// Blocks of the first factor, together `[d_in, rank]`, uniform between plus and minus `1 / sqrt(d_in)` at the start.
    pub a: Vec<Param<Tensor<2>>>,
    /// Blocks of the second factor, together `[rank, d_out]`, zero at the start.
    pub b: Vec<Param<Tensor<2>>>,
    #[module(skip)]
    alpha: f64,
    #[module(skip)]
    options: NestedOptions,
}

/// Components that a step trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NestedUpdate {
    /// The last component of the step's rank; those before it are constants.
    #[default]
    Frozen,
    /// All components of the step's rank.
    All,
}

/// Options of [`Nested`].
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct NestedOptions {
    /// Components that a step trains.
    pub update: NestedUpdate,
    /// Each component has optimizer state of its own, and only the component that a step trains is touched; otherwise momentum and weight decay move
    /// all of them.
    pub strict: bool,
}

impl Nested {
    /// Largest rank.
    pub fn rank(&self) -> usize {
        self.a.iter().map(|block| block.lazy_shape()[1]).sum()
    }

    /// Components in blocks of one, of which a step trains exactly one.
    pub(crate) fn is_strict(&self) -> bool {
        self.options.strict
    }

    /// The update with the first `rank` components, at least 1; gradients reach the trained ones alone.
    fn leading(&self, rank: usize, training: bool) -> Factors {
        let scale = self.alpha / rank as f64;
        if self.options.strict {
            // Blocks without a gradient are not touched by the optimizer.
            let block = |blocks: &[Param<Tensor<2>>], component: usize| {
                let value = blocks[component].val();
                if training && component + 1 < rank { value.detach() } else { value }
            };
            let a = Tensor::cat((0..rank).map(|component| block(&self.a, component)).collect(), 1);
            let b = Tensor::cat((0..rank).map(|component| block(&self.b, component)).collect(), 0);
            return Factors { a, b, scale };
        }
        let (a, b) = (joined(&self.a, 1), joined(&self.b, 0));
        if training && self.options.update == NestedUpdate::Frozen && rank > 1 {
            let constant = rank - 1;
            let constants = [a.clone().narrow(1, 0, constant).detach(), b.clone().narrow(0, 0, constant).detach()];
            let [first_a, first_b] = constants;
            let a = Tensor::cat(vec![first_a, a.narrow(1, constant, 1)], 1);
            let b = Tensor::cat(vec![first_b, b.narrow(0, constant, 1)], 0);
            return Factors { a, b, scale };
        }
        Factors { a: a.narrow(1, 0, rank), b: b.narrow(0, 0, rank), scale }
    }
}

impl Structure for Nested {
    fn factors(&self) -> Option<Factors> {
        let rank = self.rank();
        let scale = if rank == 0 { 0.0 } else { self.alpha / rank as f64 };
        Some(Factors { a: joined(&self.a, 1), b: joined(&self.b, 0), scale })
    }

    fn scale_of(&self, rank: usize) -> Option<f64> {
        (rank > 0).then(|| self.alpha / rank as f64)
    }

    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let asked = input.pass.values.get(RANK_OF_PASS).map(|rank| *rank as usize);
        let rank = self.rank().min(asked.unwrap_or(usize::MAX));
        if rank == 0 {
            return base.forward(input.x);
        }
        let Factors { a, b, scale } = self.leading(rank, input.pass.training);
        base.plus_product(input, a, b, scale)
    }
}

impl Method for Nested {
    type Options = NestedOptions;

    const SPEC: Spec = Spec {
        name: "nested",
        title: "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
        arxiv: "2210.07558",
        summary: "a product that also works with its leading components alone; the structure of the allocation dylora",
        trains: "r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Fixed(16.0),
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

    const LR: f64 = 5e-4;

    fn check(options: &NestedOptions, place: &Place) -> Result<(), String> {
        if options.strict && options.update == NestedUpdate::All {
            return Err("adapter.options.strict = true: it is for adapter.options.update = frozen, with which a step trains one component".into());
        }
        if place.rank > 0 && place.scale != place.alpha / place.rank as f64 {
            return Err("adapter.scaling: nested divides alpha by the rank of the forward pass; set it to rank".into());
        }
        Ok(())
    }

    fn build(options: &NestedOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let (blocks, size) = if options.strict { (rank, 1) } else { (1, rank) };
        let bound = (d_in as f64).sqrt().recip();
        let mut nested = Self { a: Vec::new(), b: Vec::new(), alpha: site.place.alpha, options: *options };
        for block in 0..blocks {
            let (a, b) = (format!("a.{block}"), format!("b.{block}"));
            let start = site.trained(&a, [d_in, size], |site| Ok(site.uniform(&a, d_in * size, bound)))?;
            nested.a.push(start);
            nested.b.push(site.trained(&b, [size, d_out], |_| Ok(vec![0.0; size * d_out]))?);
        }
        Ok(nested)
    }

    fn resized(&self, keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let rank = site.place.rank;
        if rank > self.rank() || keep.len() < rank || keep.iter().copied().ne(0..rank) {
            return Err(AdapterError::Refused(format!(
                "{}: the components of nested are ordered by importance; only its leading {} can be kept",
                site.place.path,
                self.rank()
            )));
        }
        if self.options.strict {
            return Ok(Self { a: self.a[..rank].to_vec(), b: self.b[..rank].to_vec(), ..self.clone() });
        }
        let [d_in, d_out] = site.place.shape;
        Ok(Self {
            a: vec![site.resized(&self.a[0], [d_in, rank], 1, keep, |_| Vec::new())],
            b: vec![site.resized(&self.b[0], [rank, d_out], 0, keep, |_| Vec::new())],
            ..self.clone()
        })
    }
}
