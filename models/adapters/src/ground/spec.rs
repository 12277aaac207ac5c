//! Static description of a structure.

use super::config::Scaling;

/// Static description of a structure: name, paper, memory, tensors.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Name in configurations.
    pub name: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// arXiv id.
    pub arxiv: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    /// Values trained in place of a `d_in x d_out` weight: a formula of the sides, the rank r and options by their names; what other modes train
    /// may follow a semicolon.
    pub trains: &'static str,
    /// Frozen elements stored in addition; empty for none.
    pub stores: &'static str,
    /// True if the forward pass forms a dense update, which the method cannot do without.
    pub dense_forward: bool,
    /// Rank when none is given.
    pub rank: Rank,
    /// Alpha when none is given.
    pub alpha: Alpha,
    /// Divisor of alpha when none is given.
    pub scaling: Scaling,
    /// Initialisations besides its own.
    pub inits: &'static [&'static str],
    /// True if dropout on the branch's input is supported.
    pub dropout: bool,
    /// Ok if it can be merged into the weight, otherwise the reason why not.
    pub merges: Result<(), &'static str>,
    /// True if merging needs a bias on the layer, or changes one.
    pub changes_bias: bool,
    /// `peft_type` in `adapter_config.json`.
    pub peft_type: &'static str,
    /// Its tensors.
    pub tensors: &'static [TensorSpec],
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
    /// Role.
    pub role: TensorRole,
    /// True if files and papers hold a matrix transposed, `[columns, rows]`.
    pub transposed: bool,
}

/// Role of a tensor of an adapter.
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
    /// A factor that multiplies the weight.
    Transform,
    /// Positions of elements.
    Position,
    /// Blocks of any other shape.
    Block,
    /// A bias.
    Bias,
    /// Not trained.
    Frozen,
}

impl TensorRole {
    /// Returns true if weight decay pulls it toward the base model; decay of other roles would pull it elsewhere.
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
