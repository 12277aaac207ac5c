//! What is known of a structure before one is built.

use super::config::Scaling;

/// What the registry knows of a structure.
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
