//! Concatenation: the exact weighted sum of the updates, whose rank is the sum of the ranks ("Editing Models with Task Arithmetic", arXiv
//! 2212.04089; named as in Hugging Face's `peft`).

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::algebra::stacked;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::Layer;

/// `sum_i w_i s_i B_i A_i` as `[B_1 ... B_N] [w_1 s_1 A_1; ...]`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Cat {}

pub(super) const TASK_ARITHMETIC: Paper = Paper { title: "Editing Models with Task Arithmetic", place: "2212.04089" };

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[TASK_ARITHMETIC],
        memory: "sum of the ranks (d_in + d_out)",
        options: || OptionList::of(&Cat::default()),
        ..Entry::plain(Kind::Composition, "cat", "exact weighted sum of the updates; the ranks add up")
    },
    makes_pool: false,
    read: |options| read::<Cat>(&ENTRY, options),
};

impl Composition for Cat {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let parts: Vec<_> =
            layer.sources.iter().map(|source| (&source.a, &source.b, source.weighted_scale())).collect();
        let (a, b) = stacked(&parts);
        Ok(Composed::factors(a, b))
    }
}
