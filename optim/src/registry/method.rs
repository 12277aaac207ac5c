//! An optimizer of the registry: its description and its constructor.

use std::ops::Deref;

use burn::optim::ModuleOptimizer;

use super::entry::{Entry, Registered};
use super::options::Options;
use crate::error::OptimError;
use crate::method::Table;
use crate::parameters::{Assignment, ParameterRoles};
use crate::state::meter::StateMeter;
use crate::state::reset::MomentResets;

/// An optimizer, and the optimizer assigned to each parameter.
pub type Built = (ModuleOptimizer, Vec<Assignment>);

/// One optimizer; its description is that of its [`Entry`].
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Description.
    pub entry: Entry,
    /// Check of the combination of options.
    pub(crate) check: fn(&Entry, &Options) -> Result<(), OptimError>,
    pub(crate) bytes: fn(&Entry, &Options, [usize; 2]) -> Result<usize, OptimError>,
    pub(crate) active_share: fn(&Entry, &Options) -> Result<f64, OptimError>,
    pub(crate) table_bytes: TableBytes,
    pub(crate) build: fn(&Entry, &Options, &ParameterRoles, &StateMeter) -> Result<Built, OptimError>,
    /// None if a reset of the state is not defined.
    pub(crate) resettable: Option<BuildResettable>,
    /// Optimizer that the planner replaces by this one where its state does not fit; none where it is not offered.
    pub saves_state_of: Option<&'static str>,
}

type TableBytes = fn(&Entry, &Options, Table, [usize; 2]) -> Result<Option<usize>, OptimError>;

type BuildResettable = fn(&Entry, &Options, &ParameterRoles, &StateMeter, &MomentResets) -> Result<Built, OptimError>;

/// Registry entry of an optimizer: the type of its configuration, its defaults, its description.
macro_rules! method {
    (resettable $config:ty, $standard:expr, $entry:expr) => {
        Method {
            resettable: Some(|entry, options, hidden, meter, resets| {
                let config: $config = entry.configure(options)?;
                Ok((hidden.resettable(&config, meter, resets)?, hidden.report(&config, entry.name)))
            }),
            ..method!($config, $standard, $entry)
        }
    };
    ($config:ty, $standard:expr, $entry:expr) => {
        Method {
            entry: Entry { options: || $crate::registry::OptionList::of::<$config>(&$standard), ..$entry },
            check: |entry, options| {
                $crate::method::MethodConfig::optimizer(&entry.configure::<$config>(options)?).map(|_| ())
            },
            bytes: |entry, options, shape| {
                Ok($crate::method::MethodConfig::state_bytes(&entry.configure::<$config>(options)?, shape))
            },
            active_share: |entry, options| {
                Ok($crate::method::MethodConfig::active_share(&entry.configure::<$config>(options)?))
            },
            table_bytes: |entry, options, table, shape| {
                let config = entry.configure::<$config>(options)?;
                Ok($crate::method::MethodConfig::table_bytes(&config, table, shape))
            },
            build: |entry, options, hidden, meter| {
                let config: $config = entry.configure(options)?;
                Ok((hidden.optimizer(&config, meter)?, hidden.report(&config, entry.name)))
            },
            resettable: None,
            saves_state_of: None,
        }
    };
}
pub(crate) use method;

impl Deref for Method {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Registered for Method {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}

impl Method {
    /// Rejects unknown options, missing ones, values that are not allowed and incompatible options.
    pub fn check(&self, given: &Options) -> Result<(), OptimError> {
        (self.check)(&self.entry, given)
    }

    /// Bytes of state for a matrix of this shape, while it is active.
    pub fn state_bytes(&self, given: &Options, shape: [usize; 2]) -> Result<usize, OptimError> {
        (self.bytes)(&self.entry, given, shape)
    }

    /// Share of the hidden matrices that are active at a time: the others have no state.
    pub fn active_share(&self, given: &Options) -> Result<f64, OptimError> {
        (self.active_share)(&self.entry, given)
    }

    /// Bytes of state for an embedding or head of this shape; none where AdamW steps it.
    pub fn table_bytes(&self, given: &Options, table: Table, shape: [usize; 2]) -> Result<Option<usize>, OptimError> {
        (self.table_bytes)(&self.entry, given, table, shape)
    }

    /// Returns true if its moments can be reset in the middle of a run.
    pub fn is_resettable(&self) -> bool {
        self.resettable.is_some()
    }

    /// The optimizer for the parameters of a module, whose states report to the meter, and the optimizer assigned to each parameter.
    pub fn init(&self, given: &Options, hidden: &ParameterRoles, meter: &StateMeter) -> Result<Built, OptimError> {
        (self.build)(&self.entry, given, hidden, meter)
    }
}
