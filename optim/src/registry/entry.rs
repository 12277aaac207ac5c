//! Description of a method, the same for every kind.

use std::fmt;

use super::options::{OptionError, OptionList, Options};

/// Kind of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Moves the weights by their gradients.
    Optimizer,
    /// What a linear layer holds in place of a dense weight.
    Parameterization,
    /// What an adapter adds to a frozen weight.
    Structure,
    /// How the tensors of an adapter start.
    Initialisation,
    /// How an adapter is trained.
    Rule,
    /// How ranks are distributed over the layers.
    Allocation,
    /// A term that is added to the loss.
    Penalty,
    /// How several adapters become one.
    Composition,
    /// What the loss is.
    Objective,
    /// The stages of a run.
    Recipe,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Optimizer => "optimizer",
            Self::Parameterization => "parameterization",
            Self::Structure => "adapter",
            Self::Initialisation => "initialisation",
            Self::Rule => "training rule",
            Self::Allocation => "rank allocation",
            Self::Penalty => "penalty",
            Self::Composition => "composition",
            Self::Objective => "objective",
            Self::Recipe => "recipe",
        })
    }
}

/// Where a method was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paper {
    /// Title.
    pub title: &'static str,
    /// arXiv id, or another place such as `ICLR 2025`.
    pub place: &'static str,
}

impl Paper {
    /// Place of publication for people, such as `arXiv 2403.03507`.
    pub fn cited(&self) -> String {
        let id = self.place.starts_with(|first: char| first.is_ascii_digit());
        if id { format!("arXiv {}", self.place) } else { self.place.to_string() }
    }
}

/// Description of a method: what help, documentation and checks are derived from.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Kind.
    pub kind: Kind,
    /// Name that a user types, in kebab-case.
    pub name: &'static str,
    /// Papers, the method's own first.
    pub papers: &'static [Paper],
    /// One line on what it does.
    pub summary: &'static str,
    /// Memory it takes, as a formula in words; empty when it takes none.
    pub memory: &'static str,
    /// Learning rate to start from, where the method needs another than its kind's usual one.
    pub lr: Option<f64>,
    /// What it needs from the rest of the run, one line each.
    pub needs: &'static [&'static str],
    /// What it cannot be combined with, one line each.
    pub refuses: &'static [&'static str],
    /// Options with their defaults, read off its configuration.
    pub options: fn() -> OptionList,
}

impl Entry {
    /// Entry without options, papers and conditions, to be completed with `..`.
    pub const fn plain(kind: Kind, name: &'static str, summary: &'static str) -> Self {
        Self {
            kind,
            name,
            papers: &[],
            summary,
            memory: "",
            lr: None,
            needs: &[],
            refuses: &[],
            options: OptionList::none,
        }
    }

    /// Options with their defaults.
    pub fn options(&self) -> OptionList {
        (self.options)()
    }

    /// Rejects unknown options, missing ones and values that are not allowed.
    pub fn check(&self, given: &Options) -> Result<(), OptionError> {
        self.options().check(self.name, given)
    }

    /// Configuration with the given options on top of the defaults.
    pub fn configure<C: serde::de::DeserializeOwned>(&self, given: &Options) -> Result<C, OptionError> {
        self.options().configure(self.name, given)
    }
}

/// Something with an [`Entry`]: an element of a list that [`find`](super::find) searches.
pub trait Registered {
    /// Its description.
    fn entry(&self) -> &Entry;
}

impl Registered for Entry {
    fn entry(&self) -> &Entry {
        self
    }
}
