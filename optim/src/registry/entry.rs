//! Description of a method, the same for every kind.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::options::{OptionError, OptionList, Options};

/// Kind of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Moves the weights by their gradients.
    Optimizer,
    /// Replacement of a linear layer's dense weight.
    Parameterization,
    /// Form of the update that an adapter adds to a frozen weight.
    Structure,
    /// Initialisation of an adapter's tensors.
    Initialisation,
    /// Training rule of an adapter.
    Rule,
    /// Distribution of ranks over the layers.
    Allocation,
    /// A term that is added to the loss.
    Penalty,
    /// Combination of several adapters into one.
    Composition,
    /// Loss function.
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

/// Publication of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paper {
    /// Title.
    pub title: &'static str,
    /// arXiv id, or another publication such as `ICLR 2025`.
    pub place: &'static str,
}

impl Paper {
    /// Place of publication for people, such as `arXiv 2403.03507`.
    pub fn cited(&self) -> String {
        let id = self.place.starts_with(|first: char| first.is_ascii_digit());
        if id { format!("arXiv {}", self.place) } else { self.place.to_string() }
    }
}

/// Description of a method: the source of help, documentation and checks.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Kind.
    pub kind: Kind,
    /// Name that a user types, in kebab-case.
    pub name: &'static str,
    /// Papers, the method's own first.
    pub papers: &'static [Paper],
    /// Summary of the method in one line.
    pub summary: &'static str,
    /// Memory use, as a formula in words; empty if there is none.
    pub memory: &'static str,
    /// Learning rate to start from, if it differs from the usual one of the kind.
    pub lr: Option<f64>,
    /// Requirements on the rest of the run, one line each.
    pub needs: &'static [&'static str],
    /// Incompatible settings, one line each.
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
        self.list().as_ref().clone()
    }

    /// The same, read off once: that takes much longer than any use of them.
    fn list(&self) -> Arc<OptionList> {
        static LISTS: Mutex<BTreeMap<(usize, &str), Arc<OptionList>>> = Mutex::new(BTreeMap::new());
        let key = (self.options as usize, self.name);
        let lists = || LISTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = lists().get(&key) {
            return list.clone();
        }
        // Without the lock: a list may be made of others.
        let list = Arc::new((self.options)());
        lists().entry(key).or_insert(list).clone()
    }

    /// Rejects unknown options, missing ones and values that are not allowed.
    pub fn check(&self, given: &Options) -> Result<(), OptionError> {
        self.list().check(self.name, given)
    }

    /// Configuration with the given options on top of the defaults.
    pub fn configure<C: serde::de::DeserializeOwned>(&self, given: &Options) -> Result<C, OptionError> {
        self.list().configure(self.name, given)
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
