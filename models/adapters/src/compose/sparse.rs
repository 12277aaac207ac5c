//! Parts of sparse merging that several compositions share: trimming by magnitude, election of signs, disjoint sums.

use lowrank_optim::registry::OptionError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::average::Space;
use super::definition::Composed;
use super::error::ComposeError;
use super::linear::root;
use super::source::{Layer, Matrix};
use super::svd::rank;

/// Quantity whose sign wins at an entry; 0 counts as positive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Election {
    /// Sum of the values.
    #[default]
    Total,
    /// Sum of the signs.
    Frequency,
}

/// Divisor of the sum of the values whose sign was elected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Convention {
    /// Their number; weights do not take part in the election (Hugging Face's `peft`).
    #[default]
    Count,
    /// The sum of their weights, which also take part in the election (`mergekit`).
    WeightNormalised,
}

/// Keeps the `floor(density n)` elements of largest magnitude and sets the others to 0; of equal ones those first in row-major order.
pub(super) fn trimmed(mut tensor: Matrix, density: f64) -> Result<Matrix, ComposeError> {
    let count = tensor.len();
    if density >= 1.0 || count == 0 {
        return Ok(tensor);
    }
    let kept = (density * count as f64).floor() as usize;
    if kept == 0 {
        let reason = format!("keeps none of the {count} elements of a matrix; give at least {}", 1.0 / count as f64);
        return Err(OptionError::value("density", density, reason).into());
    }
    let mut magnitudes: Vec<f64> = tensor.iter().map(|value| value.abs()).collect();
    let (_, least, _) = magnitudes.select_nth_unstable_by(kept - 1, |a, b| b.total_cmp(a));
    let least = *least;
    let mut equal = kept - tensor.iter().filter(|value| value.abs() > least).count();
    for row in 0..tensor.nrows() {
        for column in 0..tensor.ncols() {
            let value = &mut tensor[(row, column)];
            if value.abs() < least {
                *value = 0.0;
            } else if value.abs() == least {
                if equal == 0 {
                    *value = 0.0;
                } else {
                    equal -= 1;
                }
            }
        }
    }
    Ok(tensor)
}

/// Merged tensors, and the share of entries at which the sources disagree in sign.
pub(super) struct Elected {
    pub merged: Matrix,
    pub conflicts: f64,
}

/// Elects a sign at each entry and sums the values that have it, times their weights, over their number or the sum of their weights.
pub(super) fn elected(tensors: &[Matrix], weights: &[f64], election: Election, convention: Convention) -> Elected {
    let shape = tensors[0].shape();
    let mut merged = Matrix::zeros(shape.0, shape.1);
    let (mut conflicts, mut values) = (0usize, vec![0.0; tensors.len()]);
    for place in 0..merged.len() {
        for ((value, tensor), weight) in values.iter_mut().zip(tensors).zip(weights) {
            *value = tensor[place];
            if convention == Convention::WeightNormalised {
                *value *= weight;
            }
        }
        let sum: f64 = match election {
            Election::Total => values.iter().sum(),
            Election::Frequency => values.iter().map(|value| sign(*value)).sum(),
        };
        let positive = sum >= 0.0;
        let (mut kept, mut divisor) = (0.0, 0.0);
        for (value, weight) in values.iter().zip(weights) {
            if *value != 0.0 && (*value > 0.0) == positive {
                match convention {
                    Convention::Count => (kept, divisor) = (kept + weight * value, divisor + 1.0),
                    Convention::WeightNormalised => (kept, divisor) = (kept + value, divisor + weight),
                }
            }
        }
        conflicts += usize::from(values.iter().any(|value| *value > 0.0) && values.iter().any(|value| *value < 0.0));
        merged[place] = if divisor == 0.0 { kept } else { kept / divisor };
    }
    Elected { merged, conflicts: conflicts as f64 / (shape.0 * shape.1).max(1) as f64 }
}

pub(super) fn sign(value: f64) -> f64 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

/// Weighted sum of tensors, in order.
pub(super) fn weighted_sum(tensors: &[Matrix], weights: &[f64]) -> Elected {
    let mut merged = Matrix::zeros(tensors[0].nrows(), tensors[0].ncols());
    for (tensor, weight) in tensors.iter().zip(weights) {
        merged += tensor * *weight;
    }
    Elected { merged, conflicts: 0.0 }
}

/// Merges the sources of a layer tensor by tensor: both factors, each with the roots of weight and scale, or the updates.
///
/// `merge` takes the tensors of all sources, their weights, and a number for the tensor (0 for A and the update, 1 for B).
pub(super) fn per_tensor(
    layer: &Layer,
    space: Space,
    given_rank: Option<usize>,
    mut merge: impl FnMut(Vec<Matrix>, &[f64], usize) -> Result<Elected, ComposeError>,
) -> Result<Composed, ComposeError> {
    match space {
        Space::Deltas => {
            let weights: Vec<f64> = layer.sources.iter().map(|source| source.weight()).collect();
            let rank = rank(layer, given_rank)?;
            let Elected { merged, conflicts } =
                merge(layer.sources.iter().map(|source| source.delta()).collect(), &weights, 0)?;
            Ok(Composed::dense(merged, rank).with("sign_conflicts", conflicts))
        }
        Space::Factors => {
            if let Some(rank) = given_rank {
                let reason = "factors keep their rank; remove it, or set space=deltas";
                return Err(OptionError::value("rank", rank, reason).into());
            }
            layer.common_rank("factors are merged entry by entry: set space=deltas for different ranks")?;
            let roots: Vec<[f64; 2]> = layer.sources.iter().map(|source| root(source.weighted_scale())).collect();
            let weights = |side: usize| roots.iter().map(|root| root[side]).collect::<Vec<_>>();
            let of_a = merge(layer.sources.iter().map(|source| source.a.clone()).collect(), &weights(0), 0)?;
            let of_b = merge(layer.sources.iter().map(|source| source.b.clone()).collect(), &weights(1), 1)?;
            Ok(Composed::factors(of_a.merged, of_b.merged)
                .with("sign_conflicts_a", of_a.conflicts)
                .with("sign_conflicts_b", of_b.conflicts))
        }
    }
}
