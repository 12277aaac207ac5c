//! Weighted sum of the factors (named as in Hugging Face's `peft`, `add_weighted_adapter`).

use lowrank_optim::registry::{Entry, Kind, OptionList};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cat::TASK_ARITHMETIC;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::{Layer, Matrix};

/// `A = sum_i sign(u_i) sqrt|u_i| A_i`, `B = sum_i sqrt|u_i| B_i` with `u_i = w_i s_i`. The product holds cross terms `B_i A_j`: this is not the sum of
/// the updates, which `cat` and `svd` give.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Linear {}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[TASK_ARITHMETIC],
        memory: "r (d_in + d_out)",
        options: || OptionList::of(&Linear::default()),
        ..Entry::plain(Kind::Composition, "linear", "weighted sum of the factors, of equal ranks; has cross terms")
    },
    makes_pool: false,
    read: |options| read::<Linear>(&ENTRY, options),
};

impl Composition for Linear {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let layer = layer.padded("factors are added row by row: use cat or svd for different ranks")?;
        let rank = layer.sources[0].rank();
        let [d_in, d_out] = layer.shape();
        let (mut a, mut b) = (Matrix::zeros(rank, d_in), Matrix::zeros(d_out, rank));
        for source in &layer.sources {
            let [of_a, of_b] = root(source.weighted_scale());
            a += &source.a * of_a;
            b += &source.b * of_b;
        }
        Ok(Composed::factors(a, b))
    }
}

/// Factors of A and of B whose product is `u`: the sign goes to A.
pub(super) fn root(u: f64) -> [f64; 2] {
    let root = u.abs().sqrt();
    [if u < 0.0 { -root } else { root }, root]
}
