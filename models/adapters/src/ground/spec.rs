//! Static description of a structure.

use super::config::Scaling;
use super::initialisation::Initialisation;

/// Static description of a structure: name, paper, memory, tensors.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Name in configurations.
    pub name: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// arXiv id, or another publication such as `ICLR 2025`.
    pub arxiv: &'static str,
    /// One-line summary.
    pub summary: &'static str,
    /// Parameters trained in place of a `d_in x d_out` weight: a formula of the sides, the rank r and named options;
    /// those of other modes may follow a semicolon.
    pub trains: &'static str,
    /// Frozen elements stored in addition; empty for none.
    pub stores: &'static str,
    /// True if the method requires a dense update in the forward pass.
    pub dense_forward: bool,
    /// Default rank.
    pub rank: Rank,
    /// Default alpha.
    pub alpha: Alpha,
    /// Default divisor of alpha.
    pub scaling: Scaling,
    /// Supported initialisations in addition to its own.
    pub inits: &'static [&'static Initialisation],
    /// True if dropout on the branch's input is supported.
    pub dropout: bool,
    /// Ok if it can be merged into the weight, otherwise the reason.
    pub merges: Result<(), &'static str>,
    /// True if merging needs a bias on the layer, or changes one.
    pub changes_bias: bool,
    /// Tensors of the structure.
    pub tensors: &'static [TensorSpec],
}

/// Default rank of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Fixed rank.
    Fixed(usize),
    /// The smaller side of the layer, at most this.
    SmallerSide(usize),
    /// No rank; giving one is an error.
    None,
}

/// Default alpha of a structure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alpha {
    /// Multiple of the rank.
    Ranks(f64),
    /// Fixed alpha.
    Fixed(f64),
    /// No alpha; giving one is an error.
    None,
}

/// Tensor of a structure.
#[derive(Clone, Copy, Debug)]
pub struct TensorSpec {
    /// Name of the field; its first part for a list.
    pub name: &'static str,
    /// Role of the tensor.
    pub role: TensorRole,
    /// True if files and papers hold a matrix transposed, `[columns, rows]`.
    pub transposed: bool,
}

/// Role of a tensor in an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorRole {
    /// Factor at the input.
    A,
    /// Factor at the output.
    B,
    /// Square matrix between factors.
    Core,
    /// Norms of the weight's columns.
    Magnitude,
    /// Values along a diagonal, mixing coefficients and other vectors.
    Vector,
    /// Factor that multiplies the weight.
    Transform,
    /// Positions of elements.
    Position,
    /// Blocks of any other shape.
    Block,
    /// Bias of the layer or a branch.
    Bias,
    /// Frozen tensor.
    Frozen,
}

impl TensorRole {
    /// Returns true if weight decay pulls the tensor toward the base model; decay of other roles would pull it
    /// elsewhere.
    pub fn decays(self) -> bool {
        matches!(self, Self::A | Self::B | Self::Core | Self::Block)
    }
}

impl Spec {
    /// Returns the initialisation with this name, if the structure has it; none for its own default.
    pub fn init(&self, name: &str) -> Option<&'static Initialisation> {
        self.inits.iter().copied().find(|init| init.name == name)
    }

    /// Returns the tensor that a field path such as `a` or `cores.1` belongs to.
    pub fn tensor(&self, field: &str) -> Option<&'static TensorSpec> {
        let first = field.split('.').next().unwrap_or(field);
        self.tensors.iter().find(|tensor| tensor.name == first)
    }
}
