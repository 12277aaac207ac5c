//! Parts of sparse merging that several compositions share: trimming by magnitude, election of signs, disjoint sums; block by block.

use std::ops::Range;

use lowrank_kernels::vectorised::vectorised;
use lowrank_optim::registry::OptionError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::average::Space;
use super::definition::Composed;
use super::error::ComposeError;
use super::linear::root;
use super::source::{Layer, Matrix, Source};
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

/// Merged tensors, and the share of entries at which the sources disagree in sign.
pub(super) struct Merged {
    pub merged: Matrix,
    pub conflicts: f64,
}

/// Combination of the pruned elements of the sources at an entry.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// Weighted sum, in the order of the sources.
    Sum,
    /// Elects a sign and sums the values that have it, times their weights, over their number or the sum of their weights.
    Elect(Election, Convention),
}

/// Elements of a tensor that are formed together.
const BLOCK: usize = 1 << 16;

/// A tensor of a source that is read in blocks of whole rows, so that an update is never in memory as a whole.
pub(super) struct Rows {
    /// `[columns, rank]`, the row space; none if `right` holds the rows themselves.
    left: Option<Matrix>,
    /// `[rank, rows]`, or `[columns, rows]`.
    right: Matrix,
}

impl Rows {
    /// Rows of a matrix.
    pub fn of(matrix: &Matrix) -> Self {
        Self { left: None, right: matrix.transpose() }
    }

    /// Rows of a source's update `[d_out, d_in]`, without its weight.
    pub fn of_update(source: &Source) -> Self {
        Self { left: Some(source.a.transpose()), right: source.b.transpose() * source.scale }
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.right.ncols(), self.left.as_ref().unwrap_or(&self.right).nrows()]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Ranges of rows that are formed together.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let [rows, columns] = self.shape();
        let step = (BLOCK / columns.max(1)).max(1);
        (0..rows).step_by(step).map(move |from| from..rows.min(from + step))
    }

    /// Some rows in row-major order.
    fn block(&self, rows: Range<usize>) -> Matrix {
        let right = self.right.columns_range(rows);
        match &self.left {
            Some(left) => left * right,
            None => right.into_owned(),
        }
    }

    /// Two magnitudes that the `kept`-th largest is probably between, by a sample.
    fn bracket(&self, kept: usize) -> (f64, f64) {
        const SAMPLE: usize = 1 << 14;
        let (count, columns) = (self.len(), self.shape()[1]);
        let size = SAMPLE.min(count.div_ceil(16));
        let step = count / size;
        // Moved within its step, so that a sample does not fall into the same columns again and again.
        let places = (0..size).map(|number| number * step + number * 7919 % step);
        let mut sample: Vec<f64> = places.map(|place| self.element(place / columns, place % columns).abs()).collect();
        let share = kept as f64 / count as f64;
        // Six standard deviations of the rank within the sample.
        let margin = (6.0 * (share * (1.0 - share) * size as f64).sqrt()).ceil() as usize + 1;
        let rank = (share * size as f64) as usize;
        let mut nth = |rank: usize| *sample.select_nth_unstable_by(rank, |a, b| b.total_cmp(a)).1;
        let low = if rank + margin < size { nth(rank + margin) } else { 0.0 };
        let high = if rank < margin { f64::INFINITY } else { nth(rank - margin) };
        (low, high)
    }

    fn element(&self, row: usize, column: usize) -> f64 {
        match &self.left {
            Some(left) => (left.row(column) * self.right.column(row))[0],
            None => self.right[(column, row)],
        }
    }

    /// Calls `each` with the blocks in order.
    pub fn each(&self, mut each: impl FnMut(&[f64])) {
        self.blocks().for_each(|rows| each(self.block(rows).as_slice()));
    }
}

/// Least magnitude that trimming keeps, and how many elements of just that magnitude.
#[derive(Clone, Copy, Debug)]
struct Cut {
    least: f64,
    equal: usize,
}

impl Cut {
    /// The cut that keeps the `floor(density n)` elements of largest magnitude.
    fn of(tensor: &Rows, density: f64) -> Result<Self, ComposeError> {
        let count = tensor.len();
        let kept = kept(count, density)?;
        if kept == count {
            return Ok(Self { least: 0.0, equal: count });
        }
        // Of the elements between two magnitudes of a sample that the one that is looked for is probably between. If it is not, it is on the other
        // side of one of them.
        let (mut low, mut high) = tensor.bracket(kept);
        loop {
            let mut above = 0;
            let mut between = Between { low, high, values: Vec::new(), count: 0 };
            tensor.each(|values| above += between.take(values));
            if above >= kept {
                (low, high) = (high.next_up(), f64::INFINITY);
            } else if above + between.count < kept {
                (low, high) = (0.0, low.next_down());
            } else if low == high {
                return Ok(Self { least: low, equal: kept - above });
            } else {
                let wanted = kept - above;
                let (larger, least, _) = between.values.select_nth_unstable_by(wanted - 1, |a, b| b.total_cmp(a));
                let least = *least;
                let larger = larger.iter().filter(|value| **value > least).count();
                return Ok(Self { least, equal: wanted - larger });
            }
        }
    }

    /// Sets the elements of a block that are not kept to 0; blocks come in order, and of equal elements the first are kept.
    fn apply(&mut self, values: &mut [f64]) {
        let least = self.least;
        let equal = vectorised(
            #[inline(always)]
            || {
                let mut equal = 0u64;
                for value in values.iter_mut() {
                    let magnitude = value.abs();
                    equal += u64::from(magnitude == least);
                    *value = masked(*value, magnitude >= least);
                }
                equal as usize
            },
        );
        if equal > self.equal {
            let equals = values.iter_mut().filter(|value| value.abs() == least);
            equals.skip(self.equal).for_each(|value| *value = 0.0);
        }
        self.equal = self.equal.saturating_sub(equal);
    }
}

/// Magnitudes from `low` to `high`, and their number; the values themselves only if the two differ.
struct Between {
    low: f64,
    high: f64,
    values: Vec<f64>,
    count: usize,
}

impl Between {
    /// Adds those of some values, and returns the number of larger ones.
    fn take(&mut self, values: &[f64]) -> usize {
        let (low, high) = (self.low, self.high);
        let [above, from_low] = vectorised(
            #[inline(always)]
            || {
                let [mut above, mut from_low] = [0u64; 2];
                for value in values {
                    above += u64::from(value.abs() > high);
                    from_low += u64::from(value.abs() >= low);
                }
                [above, from_low]
            },
        );
        let count = (from_low - above) as usize;
        self.count += count;
        if low < high && count > 0 {
            // Without a branch on the values, which no processor foresees.
            let mut part = [0.0; PART];
            for values in values.chunks(PART) {
                let mut found = 0;
                for value in values {
                    let magnitude = value.abs();
                    part[found] = magnitude;
                    found += usize::from((magnitude >= low) & (magnitude <= high));
                }
                self.values.extend_from_slice(&part[..found]);
            }
        }
        above as usize
    }
}

/// Number of elements that a density keeps. Rejects one that keeps none.
fn kept(count: usize, density: f64) -> Result<usize, ComposeError> {
    let kept = if density >= 1.0 { count } else { (density * count as f64).floor() as usize };
    if kept == 0 && count > 0 {
        let reason = format!("keeps none of the {count} elements of a matrix; give at least {}", 1.0 / count as f64);
        return Err(OptionError::value("density", density, reason).into());
    }
    Ok(kept)
}

/// Keeps the `floor(density n)` elements of largest magnitude and sets the others to 0; of equal ones those first in row-major order.
pub(super) fn trimmed(tensor: Matrix, density: f64) -> Result<Matrix, ComposeError> {
    if kept(tensor.len(), density)? == tensor.len() {
        return Ok(tensor);
    }
    let rows = Rows::of(&tensor);
    let mut cut = Cut::of(&rows, density)?;
    let mut transposed = rows.right;
    cut.apply(transposed.as_mut_slice());
    Ok(transposed.transpose())
}

/// Merges the elements of largest magnitude of tensors of the same shape.
pub(super) fn merged_largest(
    tensors: &[Rows],
    weights: &[f64],
    density: f64,
    rule: Rule,
) -> Result<Merged, ComposeError> {
    let cuts: Result<Vec<_>, _> = tensors.iter().map(|tensor| Cut::of(tensor, density)).collect();
    let mut cuts = cuts?;
    Ok(merged(tensors, weights, rule, |source, values| cuts[source].apply(values)))
}

/// Number of dense matrices in memory for tensors that are merged by [`per_tensor`]: the merged update, and the copies that its truncation needs.
pub(super) fn dense_matrices(space: Space) -> usize {
    if space == Space::Deltas { 3 } else { 0 }
}

/// Merges tensors of the same shape entry by entry. `prune` sets elements of a source's block to 0 and scales the others; blocks of each
/// source come in order.
pub(super) fn merged(
    tensors: &[Rows],
    weights: &[f64],
    rule: Rule,
    mut prune: impl FnMut(usize, &mut [f64]),
) -> Merged {
    let [rows, columns] = tensors[0].shape();
    let mut merged = Matrix::zeros(rows, columns);
    let mut conflicts = 0;
    for range in tensors[0].blocks() {
        let mut blocks: Vec<Matrix> = tensors.iter().map(|tensor| tensor.block(range.clone())).collect();
        blocks.iter_mut().enumerate().for_each(|(source, block)| prune(source, block.as_mut_slice()));
        let mut out = Matrix::zeros(columns, range.len());
        match rule {
            Rule::Sum => blocks.iter().zip(weights).for_each(|(block, weight)| out += block * *weight),
            Rule::Elect(election, convention) => {
                conflicts += elect(&mut blocks, weights, election, convention, out.as_mut_slice());
            }
        }
        merged.rows_range_mut(range).tr_copy_from(&out);
    }
    Merged { merged, conflicts: conflicts as f64 / (rows * columns).max(1) as f64 }
}

/// Writes the merged values of a block and returns the number of entries at which the sources disagree in sign.
fn elect(blocks: &mut [Matrix], weights: &[f64], election: Election, convention: Convention, out: &mut [f64]) -> usize {
    if convention == Convention::WeightNormalised {
        blocks.iter_mut().zip(weights).for_each(|(block, weight)| *block *= *weight);
    }
    let blocks: Vec<&[f64]> = blocks.iter().map(Matrix::as_slice).collect();
    let mut conflicts = 0;
    for (number, out) in out.chunks_mut(PART).enumerate() {
        let part = number * PART..number * PART + out.len();
        conflicts += vectorised(
            #[inline(always)]
            || elect_part(&blocks, part.clone(), weights, election, convention, out),
        );
    }
    conflicts
}

/// Elements whose sums stay in the innermost cache.
const PART: usize = 512;

#[inline(always)]
fn elect_part(
    blocks: &[&[f64]],
    part: Range<usize>,
    weights: &[f64],
    election: Election,
    convention: Convention,
    out: &mut [f64],
) -> usize {
    let [mut sums, mut highest, mut lowest, mut divisors] = [[0.0; PART]; 4];
    for block in blocks {
        let values = &block[part.clone()];
        for (((sum, highest), lowest), value) in sums.iter_mut().zip(&mut highest).zip(&mut lowest).zip(values) {
            *sum += match election {
                Election::Total => *value,
                Election::Frequency => sign(*value),
            };
            *highest = if *value > *highest { *value } else { *highest };
            *lowest = if *value < *lowest { *value } else { *lowest };
        }
    }
    for (block, weight) in blocks.iter().zip(weights) {
        let (factor, share) = match convention {
            Convention::Count => (*weight, 1.0),
            Convention::WeightNormalised => (1.0, *weight),
        };
        let values = &block[part.clone()];
        for (((out, divisor), sum), value) in out.iter_mut().zip(&mut divisors).zip(&sums).zip(values) {
            let elected = (*value != 0.0) & ((*value > 0.0) == (*sum >= 0.0));
            *out += masked(factor * *value, elected);
            *divisor += masked(share, elected);
        }
    }
    for (out, divisor) in out.iter_mut().zip(&divisors) {
        *out = if *divisor == 0.0 { *out } else { *out / *divisor };
    }
    highest.iter().zip(&lowest).filter(|(highest, lowest)| (**highest > 0.0) & (**lowest < 0.0)).count()
}

/// The value, or 0: by a mask of its bits, as a branch would keep a loop out of vectors.
#[inline(always)]
fn masked(value: f64, kept: bool) -> f64 {
    f64::from_bits(value.to_bits() & u64::from(kept).wrapping_neg())
}

/// Sign of a finite value: -1, 0 or 1.
#[inline(always)]
pub(super) fn sign(value: f64) -> f64 {
    masked(1.0, value > 0.0) - masked(1.0, value < 0.0)
}

/// Merges the sources of a layer tensor by tensor: both factors, each with the roots of weight and scale, or the updates.
///
/// `merge` takes the tensors of all sources, their weights, and a number for the tensor (0 for A and the update, 1 for B).
pub(super) fn per_tensor(
    layer: &Layer,
    space: Space,
    given_rank: Option<usize>,
    mut merge: impl FnMut(&[Rows], &[f64], usize) -> Result<Merged, ComposeError>,
) -> Result<Composed, ComposeError> {
    match space {
        Space::Deltas => {
            let weights: Vec<f64> = layer.sources.iter().map(Source::weight).collect();
            let rank = rank(layer, given_rank)?;
            let updates: Vec<Rows> = layer.sources.iter().map(Rows::of_update).collect();
            let Merged { merged, conflicts } = merge(&updates, &weights, 0)?;
            Ok(Composed::dense(merged, rank).with("sign_conflicts", conflicts))
        }
        Space::Factors => {
            if let Some(rank) = given_rank {
                let reason = "factors keep their rank; remove it, or set space=deltas";
                return Err(OptionError::value("rank", rank, reason).into());
            }
            let layer = layer.padded("factors are merged entry by entry: set space=deltas for different ranks")?;
            let roots: Vec<[f64; 2]> = layer.sources.iter().map(|source| root(source.weighted_scale())).collect();
            let weights = |side: usize| roots.iter().map(|root| root[side]).collect::<Vec<_>>();
            let rows = |of: fn(&Source) -> &Matrix| {
                layer.sources.iter().map(|source| Rows::of(of(source))).collect::<Vec<_>>()
            };
            let of_a = merge(&rows(|source| &source.a), &weights(0), 0)?;
            let of_b = merge(&rows(|source| &source.b), &weights(1), 1)?;
            Ok(Composed::factors(of_a.merged, of_b.merged)
                .with("sign_conflicts_a", of_a.conflicts)
                .with("sign_conflicts_b", of_b.conflicts))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trimming_keeps_exactly_the_share_and_the_first_of_equal_elements() {
        let ones = Matrix::from_element(2, 5, 1.0);
        let kept = trimmed(ones, 0.35).unwrap();
        assert_eq!(kept.row(0).iter().copied().collect::<Vec<_>>(), [1.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!(kept.row(1).sum(), 0.0);
        let error = trimmed(Matrix::from_element(2, 2, 1.0), 0.2).unwrap_err().to_string();
        assert!(error.contains("density = 0.2") && error.contains("at least 0.25"), "{error}");
    }

    #[test]
    fn trimming_is_exact_where_a_sample_misleads() {
        // One element of 16 is looked at first; these are larger, or smaller, than all others.
        let side = 300;
        let looked_at = |place: usize| place % 16 == place / 16 * 7919 % 16;
        for [sampled, other] in [[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]] {
            let value = |place: usize| if looked_at(place) { sampled } else { other } + (place % 7) as f64 / 16.0;
            let matrix = Matrix::from_fn(side, side, |r, c| value(r * side + c));
            for density in [0.01, 0.05, 0.5, 0.95] {
                let kept = trimmed(matrix.clone(), density).unwrap();
                let mut order: Vec<usize> = (0..side * side).collect();
                order.sort_by(|x, y| value(*y).total_cmp(&value(*x)));
                let mut expected = Matrix::zeros(side, side);
                let count = (density * (side * side) as f64) as usize;
                order[..count].iter().for_each(|place| expected[(place / side, place % side)] = value(*place));
                assert_eq!(kept, expected, "{sampled} {density}");
            }
        }
    }
}
