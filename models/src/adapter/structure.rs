//! What an adapter is: the interface that every structure implements in the file of its name.

use std::fmt::Debug;

use burn::module::Module;
use burn::tensor::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::base::{Base, Input};
use super::config::Scaling;
use super::error::AdapterError;
use super::site::{Place, Site};

/// What one adapter does to the layer `y = x W + b` it stands on. Weights are stored `[d_in, d_out]`.
pub trait Structure: Debug + Send + Sync {
    /// The output `[rows, d_out]` of the adapted layer. No dense update is formed unless the specification of the method asks for it
    /// ([`Spec::dense_forward`] tells).
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2>;

    /// The update `[d_in, d_out]` that the adapter adds to a weight; differentiable in the adapter's tensors.
    fn update(&self, weight: &Tensor<2>) -> Tensor<2>;

    /// The bias of the merged layer, where the adapter changes it.
    fn merged_bias(&self, _weight: &Tensor<2>, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        bias
    }

    /// The weight before it was merged. As it stands right for updates that do not depend on the weight; others override it, with none where
    /// the weight cannot be had back and must be kept.
    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let update = self.update(&merged);
        Some(merged - update)
    }

    /// A term that pulls the adapter's tensors somewhere, and where it enters.
    fn penalty(&self) -> Option<Penalty> {
        None
    }

    /// Whether a trained tensor rests in this step: its gradient is dropped, so that neither it nor its optimizer state moves.
    fn rests(&self, _tensor: &str, _step: StepOf) -> bool {
        false
    }

    /// Learning rate of a trained tensor as a multiple of that of the step.
    fn lr_scale(&self, _tensor: &str) -> f64 {
        1.0
    }

    /// Frozen tensors that other layers use too.
    fn shared(&self) -> Vec<SharedBytes> {
        Vec::new()
    }

    /// Values kept in memory beside its tensors, which follow from the weight.
    fn kept(&self) -> usize {
        0
    }

    /// Whether its factors begin as part of the weight whatever the initialisation; that product is then taken from the base.
    fn begins_in_weight(&self) -> bool {
        false
    }

    /// The update as two factors `[d_in, r]` and `[r, d_out]` whose product it is, where it is one: what is written as plain LoRA.
    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        None
    }

    /// The product that its factors hold, `[d_in, r]` and `[r, d_out]`: what is taken from the base where they began as part of the weight.
    fn product(&self) -> Option<[Tensor<2>; 2]> {
        self.as_factors()
    }
}

/// Where a step lies in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepOf {
    /// Number of the optimizer step, from 0.
    pub step: u64,
    /// Steps of the whole run; none when it ends by the clock.
    pub total: Option<u64>,
}

/// A frozen tensor that several layers share: its place, and what it takes.
#[derive(Clone, Debug)]
pub struct SharedBytes {
    /// The same for all layers that share it; its name in files.
    pub key: String,
    /// Bytes it takes, once.
    pub bytes: u64,
    pub(super) values: Tensor<1>,
    /// Shape in files, and whether they hold it the other way round.
    pub(super) layout: (Vec<usize>, bool),
}

/// A term beside the loss.
#[derive(Clone, Debug)]
pub struct Penalty {
    /// Where it enters.
    pub at: PenaltyAt,
    /// Its value, shape `[1]`.
    pub value: Tensor<1>,
}

/// The Frobenius norm of a matrix, shape `[1]`. Of norms up to `least` the gradient is 0: there it is the direction of rounding errors, or 0 / 0.
pub(super) fn frobenius(matrix: Tensor<2>, least: f64) -> Tensor<1> {
    let squares = matrix.square().sum();
    let small = squares.clone().lower_equal_elem(least * least);
    let value = squares.clone().detach().sqrt();
    squares.mask_fill(small.clone(), 1.0).sqrt().mask_where(small, value)
}

/// Where a penalty enters a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PenaltyAt {
    /// Added to the loss of the step.
    Loss,
    /// Its gradient, divided by the peak learning rate, is added after clipping.
    AfterClipping,
}

/// A structure as the registry builds it.
pub trait Method: Structure + Module + Sized {
    /// Options beyond rank, alpha and dropout, with the defaults of the paper.
    type Options: Serialize + DeserializeOwned + Default + Clone + Debug;

    /// What is to be known of it.
    const SPEC: Spec;

    /// Learning rate of AdamW when none is given.
    const LR: f64 = 2e-4;

    /// Rank and alpha when none are given, where options decide; those of [`Method::SPEC`] otherwise.
    fn size(_options: &Self::Options) -> (Rank, Alpha) {
        (Self::SPEC.rank, Self::SPEC.alpha)
    }

    /// Refuses options, and places where the method has no meaning, with the reason.
    fn check(options: &Self::Options, place: &Place) -> Result<(), String>;

    /// What is allowed at a place, but rarely meant.
    fn doubt(_place: &Place) -> Option<String> {
        None
    }

    /// Builds the adapter of one layer. Tensors come from the site: from a file when one is read, else from what is given here.
    fn build(options: &Self::Options, site: &mut Site<'_>) -> Result<Self, AdapterError>;
}

/// What the registry knows of a structure.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Name in configurations.
    pub name: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// arXiv id.
    pub arxiv: &'static str,
    /// Values trained in place of a `d_in x d_out` weight: a formula of the sides, the rank r and options by their names; what other modes train
    /// may follow a semicolon.
    pub trains: &'static str,
    /// What is stored beside them and stays as it is; empty for nothing.
    pub stores: &'static str,
    /// Whether the forward pass forms a dense update, because the method cannot be had without.
    pub dense_forward: bool,
    /// Rank when none is given.
    pub rank: Rank,
    /// Alpha when none is given.
    pub alpha: Alpha,
    /// What alpha is divided by when nothing is said.
    pub scaling: Scaling,
    /// Initialisations besides its own.
    pub inits: &'static [&'static str],
    /// Whether dropout on the branch's input has a meaning.
    pub dropout: bool,
    /// Whether it can become part of the weight, or the reason why not.
    pub merges: Result<(), &'static str>,
    /// Whether merging needs a bias on the layer, or changes one.
    pub changes_bias: bool,
    /// `peft_type` in `adapter_config.json`.
    pub peft_type: &'static str,
    /// Its tensors.
    pub tensors: &'static [TensorSpec],
    /// What its options allow: name and one line each.
    pub options: &'static [(&'static str, &'static str)],
}

/// Rank when none is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// This one.
    Fixed(usize),
    /// The smaller side of the layer, at most this.
    SmallerSide(usize),
    /// The method has none; giving one is refused.
    None,
}

/// Alpha when none is given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alpha {
    /// So many times the rank.
    Ranks(f64),
    /// This number.
    Fixed(f64),
    /// The method has none; giving one is refused.
    None,
}

/// A tensor of a structure.
#[derive(Clone, Copy, Debug)]
pub struct TensorSpec {
    /// Name of the field; of a list, its first part.
    pub name: &'static str,
    /// What it is for.
    pub role: TensorRole,
    /// Whether files and papers hold a matrix the other way round, `[columns, rows]`.
    pub turned: bool,
}

/// What a tensor of an adapter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorRole {
    /// The factor at the input.
    A,
    /// The factor at the output.
    B,
    /// A square between factors.
    Core,
    /// Lengths of the weight's columns.
    Magnitude,
    /// Values along a diagonal, mixing coefficients and other vectors.
    Vector,
    /// What the weight is multiplied by.
    Transform,
    /// Where values stand.
    Position,
    /// Blocks of any other shape.
    Block,
    /// A bias.
    Bias,
    /// Not trained.
    Frozen,
}

impl TensorRole {
    /// Whether weight decay pulls it toward the base model; decay of other roles would pull it elsewhere.
    pub fn decays(self) -> bool {
        matches!(self, Self::A | Self::B | Self::Core | Self::Block)
    }
}

impl Spec {
    /// The tensor that a field path such as `a` or `cores.1` belongs to.
    pub fn tensor(&self, field: &str) -> Option<&'static TensorSpec> {
        let first = field.split('.').next().unwrap_or(field);
        self.tensors.iter().find(|tensor| tensor.name == first)
    }
}
