//! Average of the adapters, factor by factor or as updates ("Model soups: averaging weights of multiple fine-tuned models improves accuracy without
//! increasing inference time", arXiv 2203.05482).

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::algebra::stacked;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::linear::root;
use super::source::{Layer, Matrix};

/// `B = sum_i w_i sqrt|s_i| B_i` and `A = sum_i w_i sqrt|s_i| A_i`, or `sum_i w_i s_i B_i A_i` of the updates. A weight that is not given is 1 / N.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Average {
    /// Averaged quantity.
    pub space: Space,
}

/// Quantity that a composition works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Space {
    /// A and B each by itself, of equal ranks; the rank stays.
    #[default]
    Factors,
    /// The updates `s B A`.
    Deltas,
}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[Paper {
            title: "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
            place: "2203.05482",
        }],
        memory: "r (d_in + d_out); of updates the sum of the ranks (d_in + d_out)",
        options: || OptionList::of(&Average::default()),
        ..Entry::plain(Kind::Composition, "average", "mean of the factors, or of the updates")
    },
    makes_pool: false,
    read: |options| read::<Average>(&ENTRY, options),
};

impl Composition for Average {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let equal = (layer.sources.len() as f64).recip();
        if self.space == Space::Deltas {
            let parts = layer.sources.iter();
            let parts: Vec<_> =
                parts.map(|source| (&source.a, &source.b, source.weight.unwrap_or(equal) * source.scale)).collect();
            let (a, b) = stacked(&parts);
            return Ok(Composed::factors(a, b));
        }
        let layer = layer.padded("factors are averaged row by row: set space=deltas for different ranks")?;
        let rank = layer.sources[0].rank();
        let [d_in, d_out] = layer.shape();
        let (mut a, mut b) = (Matrix::zeros(rank, d_in), Matrix::zeros(d_out, rank));
        for source in &layer.sources {
            let ([of_a, of_b], weight) = (root(source.scale), source.weight.unwrap_or(equal));
            a += &source.a * (weight * of_a);
            b += &source.b * (weight * of_b);
        }
        Ok(Composed::factors(a, b))
    }
}
