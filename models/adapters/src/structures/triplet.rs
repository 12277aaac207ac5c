//! A product in the form of a singular value decomposition ("Adaptive Budget Allocation for Parameter-Efficient
//! Fine-Tuning", arXiv 2303.10512), whose components can be masked, and appended in blocks ("IncreLoRA: Incremental
//! Parameter Allocation Method for Parameter-Efficient Fine-tuning", arXiv 2308.12043).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::{self, UpdateScore};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::components::{counts, joined, kept};
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};

/// Standard deviation of the factors at the start.
const STD: f64 = 0.02;

/// `y = x W + b + scale ((x A) * E) B`: every component is a triplet of a column of A, a value and a row of B. The scale
/// is `alpha / (rank + 1e-5)`.
///
/// Components beyond the rank of the layer are a reserve: their values are constants until they are activated.
#[derive(Module, Debug)]
pub struct Triplet {
    /// Blocks of the first factor, together `[d_in, components]`, normal with deviation 0.02 at the start.
    pub a: Vec<Param<Tensor<2>>>,
    /// Values of the components of each block, zero at the start.
    pub e: Vec<Param<Tensor<1>>>,
    /// Blocks of the second factor, together `[components, d_out]`, normal with deviation 0.02 at the start.
    pub b: Vec<Param<Tensor<2>>>,
    /// Components that are not a reserve.
    #[module(skip)]
    rank: usize,
    #[module(skip)]
    scale: f64,
    #[module(skip)]
    score: UpdateScore,
}

/// Options of [`Triplet`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TripletOptions {
    /// Train the factors of the reserve, which an allocation that grows the adapter appends.
    pub train_reserve: bool,
}

impl Default for TripletOptions {
    fn default() -> Self {
        Self { train_reserve: true }
    }
}

impl Triplet {
    /// Number of components that are not a reserve.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of components in each block.
    pub fn blocks(&self) -> Vec<usize> {
        counts(&self.a)
    }

    /// Factors `[d_in, components]` and `[components, d_out]` without the values, reserve included.
    pub fn components(&self) -> [Tensor<2>; 2] {
        [joined(&self.a, 1), joined(&self.b, 0)]
    }

    /// Collector of the update's importance in backward passes.
    pub(crate) fn score(&self) -> &UpdateScore {
        &self.score
    }

    /// Importance of the update over the passes that were collected since its last change.
    pub(crate) fn importance(&self) -> f64 {
        let Factors { a, b, scale } = self.product();
        self.score.sum([a, b], scale)
    }

    /// Number of blocks that are not a reserve.
    pub(crate) fn active_blocks(&self) -> usize {
        let mut components = 0;
        self.blocks()
            .iter()
            .take_while(|size| {
                components += **size;
                components <= self.rank
            })
            .count()
    }

    /// The same adapter with a reserve of `count` components behind all others, with constant values.
    pub(crate) fn with_reserve(
        &self,
        count: usize,
        value: f32,
        options: TripletOptions,
        site: &mut Site<'_>,
    ) -> Result<Self, AdapterError> {
        let mut grown = self.clone();
        grown.append(count, value, options.train_reserve, site)?;
        Ok(grown)
    }

    /// The same adapter with the first block of its reserve activated: all of it is trained and counts in the rank and
    /// scale of the layer.
    pub(crate) fn activated(&self, site: &Site<'_>) -> Self {
        let mut grown = self.clone();
        let block = self.active_blocks();
        if let Some(values) = grown.e.get_mut(block) {
            grown.rank += values.dims()[0];
            *values = trained(values);
            grown.a[block] = trained(&grown.a[block]);
            grown.b[block] = trained(&grown.b[block]);
        }
        grown.scale = scale(site.place);
        grown
    }

    fn append(&mut self, count: usize, value: f32, train: bool, site: &mut Site<'_>) -> Result<(), AdapterError> {
        let (block, [d_in, d_out]) = (self.a.len(), site.place.shape);
        let [a, e, b] = ["a", "e", "b"].map(|field| format!("{field}.{block}"));
        let draw = |site: &mut Site<'_>, field: &str, count: usize| Ok(site.normal(field, count, STD));
        let constant = |_: &mut Site<'_>| Ok(vec![value; count]);
        if train {
            self.a.push(site.trained(&a, [d_in, count], |site| draw(site, &a, d_in * count))?);
            self.b.push(site.trained(&b, [count, d_out], |site| draw(site, &b, count * d_out))?);
        } else {
            self.a.push(site.frozen(&a, [d_in, count], |site| draw(site, &a, d_in * count))?);
            self.b.push(site.frozen(&b, [count, d_out], |site| draw(site, &b, count * d_out))?);
        }
        self.e.push(site.frozen(&e, [count], constant)?);
        Ok(())
    }

    fn product(&self) -> Factors {
        let b = joined(&self.b, 0);
        let b = if b.dims()[0] == 0 { b } else { b * joined(&self.e, 0).unsqueeze_dim(1) };
        Factors { a: joined(&self.a, 1), b, scale: self.scale }
    }
}

/// A parameter with its id and values, trained.
fn trained<const D: usize>(param: &Param<Tensor<D>>) -> Param<Tensor<D>> {
    Param::initialized(param.id, trainable(param.val()))
}

/// `alpha / (rank + 1e-5)` with the rank that alpha is divided by in the scale of the layer; hardly depends on alpha
/// itself, which files may round.
fn scale(place: &Place) -> f64 {
    if place.scale == 0.0 { 0.0 } else { place.scale / (1.0 + 1e-5 * place.scale / place.alpha) }
}

impl Structure for Triplet {
    fn factors(&self) -> Option<Factors> {
        Some(self.product())
    }

    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let Factors { a, b, scale } = self.product();
        if !(self.score.is_on() && input.pass.training) {
            return base.plus_product(input, a, b, scale);
        }
        let branch = input.branch();
        let y = base.plus_product(input, a.clone(), b.clone(), scale);
        ops::scored(y, branch, [a, b], scale, &self.score)
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        let Factors { a, b, scale } = self.product();
        Some(kept(a, b.mul_scalar(scale), &self.active_components()?))
    }

    fn active_components(&self) -> Option<Vec<usize>> {
        let values: Vec<f32> = self.e.iter().flat_map(|block| host(block.val().without_autodiff())).collect();
        Some((0..self.rank).filter(|component| values[*component] != 0.0).collect())
    }
}

impl Method for Triplet {
    type Options = TripletOptions;

    const SPEC: Spec = Spec {
        name: "triplet",
        title: "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        arxiv: "2303.10512",
        summary: "a product in the form of a singular value decomposition; the structure of adalora and increlora",
        trains: "r (d_in + d_out + 1)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(12),
        alpha: Alpha::Fixed(16.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            // As the core of a decomposition: decay pulls it toward the base model.
            TensorSpec { name: "e", role: TensorRole::Core, transposed: false },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    const LR: f64 = 5e-4;

    fn check(_options: &TripletOptions, place: &Place) -> Result<(), String> {
        if place.rank > 0 && place.scale != place.alpha / place.rank as f64 {
            return Err("adapter.scaling: triplet divides alpha by the rank; set it to rank".into());
        }
        Ok(())
    }

    fn build(options: &TripletOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let stored = |block: usize| site.given_shape(&format!("a.{block}"));
        let mut blocks: Vec<usize> = (0..).map_while(stored).map(|shape| shape.first().copied().unwrap_or(0)).collect();
        if blocks.is_empty() {
            blocks.push(rank);
        }
        let mut triplet = Self {
            a: Vec::new(),
            e: Vec::new(),
            b: Vec::new(),
            rank,
            scale: scale(site.place),
            score: UpdateScore::default(),
        };
        let mut components = 0;
        for size in blocks {
            if components >= rank && size > 0 {
                triplet.append(size, 0.0, options.train_reserve, site)?;
                continue;
            }
            let [a, e, b] = ["a", "e", "b"].map(|field| format!("{field}.{}", triplet.a.len()));
            triplet.a.push(site.trained(&a, [d_in, size], |site| Ok(site.normal(&a, d_in * size, STD)))?);
            triplet.e.push(site.trained(&e, [size], |_| Ok(vec![0.0; size]))?);
            triplet.b.push(site.trained(&b, [size, d_out], |site| Ok(site.normal(&b, size * d_out, STD)))?);
            components += size;
        }
        if components != rank {
            return Err(AdapterError::Tensor {
                path: site.place.path.clone(),
                tensor: "a".into(),
                reason: format!("has blocks of {components} components where the rank is {rank}"),
            });
        }
        Ok(triplet)
    }

    fn resized(&self, keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let appended = rank - keep.len();
        let (a, e, b) = (joined(&self.a, 1), joined(&self.e, 0), joined(&self.b, 0));
        // A different random stream than that of the first components.
        let what = |field: &str| format!("{field}.{}.{rank}", self.rank);
        let [a, b] = [(a, self.a[0].id), (b, self.b[0].id)].map(|(value, id)| Param::initialized(id, trainable(value)));
        let e = Param::initialized(self.e[0].id, trainable(e));
        Ok(Self {
            a: vec![site.resized(&a, [d_in, rank], 1, keep, |site| site.normal(&what("a"), d_in * appended, STD))],
            e: vec![site.resized(&e, [rank], 0, keep, |_| vec![0.0; appended])],
            b: vec![site.resized(&b, [rank, d_out], 0, keep, |site| site.normal(&what("b"), appended * d_out, STD))],
            rank,
            ..self.clone()
        })
    }
}

/// A leaf of these values, trained if the device tracks gradients.
fn trainable<const D: usize>(value: Tensor<D>) -> Tensor<D> {
    if value.device().is_autodiff() { value.detach().require_grad() } else { value }
}
