//! Retrieval across two spaces, on the host.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use burn::tensor::Tensor;
use lowrank_kernels::host::values as host;

/// Rows of embeddings.
struct Rows {
    values: Vec<f32>,
    width: usize,
}

impl Rows {
    /// Rows of length 1, cut to a width.
    fn normalised(embeddings: Tensor<2>, width: usize) -> Self {
        let embeddings = embeddings.without_autodiff();
        let full = embeddings.dims()[1];
        let mut values = Vec::new();
        for row in host(embeddings).chunks(full) {
            let row = &row[..width];
            let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt().max(1e-12);
            values.extend(row.iter().map(|value| (f64::from(*value) / length) as f32));
        }
        Self { values, width }
    }

    fn row(&self, number: usize) -> &[f32] {
        &self.values[number * self.width..][..self.width]
    }

    fn len(&self) -> usize {
        self.values.len() / self.width
    }
}

/// Quality of a retrieval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Retrieval {
    /// Share of the queries whose nearest item has their class.
    pub top_1: f64,
    /// Mean average precision.
    pub mean_average_precision: f64,
}

/// Retrieves for every query of `queries [items, width]` the items of a gallery by cosine; of equally near ones the first is nearer. `own` leaves the item
/// with the number of the query out, where both are embeddings of one set. Queries whose class no other item has do not count.
pub fn retrieval(queries: Tensor<2>, gallery: Tensor<2>, labels: [&[i32]; 2], own: bool) -> Retrieval {
    let width = queries.dims()[1].min(gallery.dims()[1]);
    let [queries, gallery] = [queries, gallery].map(|rows| Rows::normalised(rows, width));
    let mut sum = Retrieval::default();
    let mut counted = 0;
    for number in 0..queries.len() {
        let query = queries.row(number);
        let cosine = |item: usize| query.iter().zip(gallery.row(item)).map(|(a, b)| a * b).sum::<f32>();
        let mut ranked: Vec<(f32, usize)> =
            (0..gallery.len()).filter(|item| !(own && *item == number)).map(|item| (cosine(item), item)).collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let fits = |item: usize| labels[1][item] == labels[0][number];
        let (mut hits, mut precision) = (0, 0.0);
        for (rank, (_, item)) in ranked.iter().enumerate() {
            if fits(*item) {
                hits += 1;
                precision += f64::from(hits) / (rank + 1) as f64;
            }
        }
        if hits > 0 {
            counted += 1;
            sum.mean_average_precision += precision / f64::from(hits);
            sum.top_1 += f64::from(u8::from(fits(ranked[0].1)));
        }
    }
    let share = |value: f64| if counted == 0 { 0.0 } else { value / f64::from(counted) };
    Retrieval { top_1: share(sum.top_1), mean_average_precision: share(sum.mean_average_precision) }
}

/// Distance of each item of `mapped_old [items, width]` from the mean of its class.
pub fn centre_distances(mapped_old: Tensor<2>, labels: &[i32]) -> Vec<f64> {
    let mapped_old = mapped_old.without_autodiff();
    let width = mapped_old.dims()[1];
    let values = host(mapped_old);
    let mut centres: BTreeMap<i32, (Vec<f64>, f64)> = BTreeMap::new();
    for (row, label) in values.chunks(width).zip(labels) {
        let (sum, count) = centres.entry(*label).or_insert_with(|| (vec![0.0; width], 0.0));
        sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        *count += 1.0;
    }
    let distance = |(row, label): (&[f32], &i32)| {
        let (sum, count) = &centres[label];
        row.iter().zip(sum).map(|(value, sum)| (f64::from(*value) - sum / count).powi(2)).sum::<f64>().sqrt()
    };
    values.chunks(width).zip(labels).map(distance).collect()
}

/// Order in which old items are best embedded again: the farthest from the mean of their class first, of equal ones the first.
pub fn backfilling_order(distances: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..distances.len()).collect();
    order.sort_by(|a, b| distances[*b].partial_cmp(&distances[*a]).unwrap_or(Ordering::Equal).then(a.cmp(b)));
    order
}

/// Share of right nearest items after 0, 10, ... 100 % of the gallery have been embedded again in this order, and the area below by the trapezoid
/// rule. Queries are mapped new embeddings of the same items, each without itself.
pub fn backfilling(mapped_new: Tensor<2>, mapped_old: Tensor<2>, labels: &[i32], order: &[usize]) -> ([f64; 11], f64) {
    let (mapped_new, mapped_old) = (mapped_new.without_autodiff(), mapped_old.without_autodiff());
    let ([items, new_width], [_, old_width]) = (mapped_new.dims(), mapped_old.dims());
    let width = new_width.min(old_width);
    let [new, old] = [&mapped_new, &mapped_old].map(|rows| host(rows.clone().narrow(1, 0, width)));
    let mut gallery = old;
    let mut done = 0;
    let mut curve = [0.0; 11];
    for (tenth, point) in curve.iter_mut().enumerate() {
        let until = (items * tenth).div_ceil(10);
        for item in &order[done..until] {
            gallery[item * width..][..width].copy_from_slice(&new[item * width..][..width]);
        }
        done = until;
        let gallery = burn::tensor::TensorData::new(gallery.clone(), [items, width]);
        let gallery = Tensor::from_data(gallery, &mapped_new.device());
        *point = retrieval(mapped_new.clone(), gallery, [labels, labels], true).top_1;
    }
    let area = curve.windows(2).map(|pair| (pair[0] + pair[1]) / 20.0).sum();
    (curve, area)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[[f32; 2]]) -> Tensor<2> {
        let flat: Vec<f32> = values.iter().flatten().copied().collect();
        Tensor::from_data(burn::tensor::TensorData::new(flat, [values.len(), 2]), &Default::default())
    }

    #[test]
    fn nearest_items_and_precisions_are_counted_without_the_query() {
        let all = rows(&[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.8]]);
        let labels = [0, 0, 1, 0];
        let found = retrieval(all.clone(), all.clone(), [&labels, &labels], true);
        // Item 2 is alone in its class; of item 3 the nearest is item 2.
        assert!((found.top_1 - 2.0 / 3.0).abs() < 1e-12);
        let precision = (1.0 + 1.0 + (1.0 / 2.0 + 2.0 / 3.0) / 2.0) / 3.0;
        assert!((found.mean_average_precision - precision).abs() < 1e-12, "{found:?}");
        assert_eq!(retrieval(all.clone(), all, [&labels, &labels], false).top_1, 1.0);
    }

    #[test]
    fn the_farthest_items_come_first_and_the_curve_ends_at_the_new_embeddings() {
        let old = rows(&[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 4.0]]);
        let labels = [0, 0, 1, 1, 1];
        let distances = centre_distances(old.clone(), &labels);
        assert_eq!(backfilling_order(&distances), [4, 0, 1, 2, 3]);
        let new = rows(&[[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 1.0]]);
        let (curve, area) = backfilling(new.clone(), old, &labels, &backfilling_order(&distances));
        assert_eq!(curve[10], retrieval(new.clone(), new, [&labels, &labels], true).top_1);
        assert!(area > 0.0 && area <= 1.0, "{curve:?}");
    }
}
