//! The list of optimizers: what the program offers, the documentation lists and the conformance tests run.

use super::entry::{Entry, Kind, Paper};
use super::find::find;
use super::method::{Method, method};
use crate::{AdamWConfig, OptimError, adamw_8bit, apollo, dct_adamw, dion, fira, frugal, galore, ldadam, muon, trion};

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
];

// AdamW steps what the others leave out, so that they all import its file: its entry stands here, above them.
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
