//! The list of optimizers: the source for the program, the documentation and the conformance tests.

use super::entry::{Entry, Kind, Paper};
use super::find::find;
use super::method::{Built, Method, method};
use super::options::{OptionError, Options};
use crate::error::OptimError;
use crate::methods::adamw::AdamWConfig;
use crate::methods::{adamw_8bit, apollo, dct_adamw, dion, fira, frugal, galore, ldadam, muon, scale, trion};
use crate::parameters::ParameterRoles;
use crate::state::meter::StateMeter;
use crate::state::reset::MomentResets;

/// All optimizers, one line each.
pub static METHODS: &[Method] = &[
    ADAMW,
    adamw_8bit::METHOD,
    dct_adamw::METHOD,
    galore::GALORE,
    galore::GALORE_8BIT,
    galore::Q_GALORE,
    fira::METHOD,
    frugal::METHOD,
    ldadam::METHOD,
    apollo::APOLLO,
    apollo::APOLLO_MINI,
    trion::METHOD,
    dion::METHOD,
    muon::METHOD,
    scale::METHOD,
];

// AdamW handles parameters that the others leave out, so that they all import its file: its entry is defined here.
const ADAMW: Method = method!(
    resettable AdamWConfig,
    AdamWConfig::new().with_beta_2(0.95),
    Entry {
        papers: &[Paper { title: "Decoupled Weight Decay Regularization", place: "1711.05101" }],
        memory: "2 RC",
        ..Entry::plain(Kind::Optimizer, "adamw", "Adam with decoupled weight decay, two f32 moments")
    }
);

/// The optimizer of this name.
pub fn optimizer(name: &str) -> Result<&'static Method, OptimError> {
    Ok(find(Kind::Optimizer, METHODS, name)?)
}

impl Method {
    /// As [`Method::init`], of an optimizer whose moments can be reset through the handle.
    pub fn init_resettable(
        &self,
        given: &Options,
        hidden: &ParameterRoles,
        meter: &StateMeter,
        resets: &MomentResets,
    ) -> Result<Built, OptimError> {
        let Some(build) = self.resettable else {
            let known: Vec<&str> = METHODS.iter().filter(|m| m.is_resettable()).map(|m| m.name).collect();
            let reason = "its moments live in a subspace of their own, and what a reset leaves of them is not defined";
            return Err(OptionError::value("name", self.name, format!("{reason}; use {}", known.join(", "))).into());
        };
        build(&self.entry, given, hidden, meter, resets)
    }
}
