//! Layers in rows, one for each block, and the choice among them.

use super::options::{SearchRelaxation, SearchScope};

/// Layers of an adapter in rows: those of one block, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerGrid {
    rows: Vec<(String, Vec<String>)>,
}

impl LayerGrid {
    /// Arranges paths by the first number in them, which is that of the block.
    pub fn new<'a>(paths: impl IntoIterator<Item = &'a str>) -> Self {
        let mut rows: Vec<(String, Vec<String>)> = Vec::new();
        for path in paths {
            let (block, _) = split(path);
            match rows.iter_mut().find(|(known, _)| *known == block) {
                Some((_, row)) => row.push(path.to_string()),
                None => rows.push((block, vec![path.to_string()])),
            }
        }
        Self { rows }
    }

    /// Paths of every row.
    pub fn rows(&self) -> impl Iterator<Item = &[String]> {
        self.rows.iter().map(|(_, row)| row.as_slice())
    }

    /// Type of a layer: its path inside of its block.
    pub fn kind(path: &str) -> String {
        split(path).1
    }
}

/// Path up to the number of the block, and the path inside of it.
fn split(path: &str) -> (String, String) {
    let parts: Vec<&str> = path.split('.').collect();
    match parts.iter().position(|part| part.parse::<usize>().is_ok()) {
        Some(place) => (parts[..=place].join("."), parts[place + 1..].join(".")),
        None => (String::new(), path.to_string()),
    }
}

/// Weights of the layers for the logits of every row.
pub fn layer_weights(logits: &[Vec<f64>], relaxation: SearchRelaxation) -> Vec<Vec<f64>> {
    let weights = |row: &Vec<f64>| match relaxation {
        SearchRelaxation::Sigmoid => row.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        SearchRelaxation::Softmax => {
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = row.iter().map(|logit| (logit - most).exp()).collect();
            let share = row.len() as f64 / powers.iter().sum::<f64>();
            powers.iter().map(|power| power * share).collect()
        }
    };
    logits.iter().map(weights).collect()
}

/// Gradients of the logits for those of the weights.
pub fn logit_gradients(logits: &[Vec<f64>], relaxation: SearchRelaxation, grads: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let weights = layer_weights(logits, relaxation);
    let rows = weights.iter().zip(grads).map(|(weights, grads)| match relaxation {
        SearchRelaxation::Sigmoid => weights.iter().zip(grads).map(|(w, g)| g * w * (1.0 - w)).collect(),
        SearchRelaxation::Softmax => {
            let count = weights.len() as f64;
            let mean = weights.iter().zip(grads).map(|(w, g)| w * g).sum::<f64>() / count;
            weights.iter().zip(grads).map(|(w, g)| w * (g - mean)).collect()
        }
    });
    rows.collect()
}

/// Selects a fraction `rho` of the layers, rounded up, by the largest weights. Of equal ones the first in the row comes
/// first, then the first row.
pub fn selected_layers(
    logits: &[Vec<f64>],
    relaxation: SearchRelaxation,
    rho: f64,
    scope: SearchScope,
) -> Vec<Vec<bool>> {
    // Weights of the logistic function that round to 1 are still told apart by their logits.
    let strengths = match relaxation {
        SearchRelaxation::Sigmoid => logits.to_vec(),
        SearchRelaxation::Softmax => layer_weights(logits, relaxation),
    };
    let mut selected: Vec<Vec<bool>> = logits.iter().map(|row| vec![false; row.len()]).collect();
    let mut select = |mut places: Vec<[usize; 2]>| {
        let count = (rho * places.len() as f64).ceil() as usize;
        let strength = |[row, layer]: [usize; 2]| strengths[row][layer];
        places.sort_by(|one, two| {
            let by_strength = strength(*two).total_cmp(&strength(*one));
            by_strength.then(one[1].cmp(&two[1])).then(one[0].cmp(&two[0]))
        });
        places.into_iter().take(count).for_each(|[row, layer]| selected[row][layer] = true);
    };
    let rows = logits.iter().enumerate().map(|(row, layers)| (0..layers.len()).map(|layer| [row, layer]).collect());
    match scope {
        SearchScope::Row => rows.for_each(&mut select),
        SearchScope::Global => select(rows.flat_map(|row: Vec<[usize; 2]>| row).collect()),
    }
    selected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_stand_in_the_rows_of_their_blocks() {
        let paths = ["model.layers.0.attn.q", "model.layers.0.mlp.up", "model.layers.1.attn.q", "tall"];
        let grid = LayerGrid::new(paths);
        let rows: Vec<usize> = grid.rows().map(<[String]>::len).collect();
        assert_eq!(rows, [2, 1, 1]);
        assert_eq!(paths.map(LayerGrid::kind), ["attn.q", "mlp.up", "attn.q", "tall"]);
    }

    #[test]
    fn each_row_keeps_its_fraction_whatever_is_added_to_its_logits() {
        let logits = vec![vec![0.3, -0.1, 0.3, 0.9], vec![2.0, 2.0, 2.0, 2.0], vec![-5.0, -4.0, -3.0, -2.0]];
        for relaxation in [SearchRelaxation::Sigmoid, SearchRelaxation::Softmax] {
            let shifted: Vec<Vec<f64>> =
                logits.iter().zip([1.0, -3.0, 0.5]).map(|(row, by)| row.iter().map(|x| x + by).collect()).collect();
            for (rho, count, of_all) in [(0.25, 1, 3), (0.5, 2, 6), (0.6, 3, 8), (1.0, 4, 12)] {
                let rows = selected_layers(&logits, relaxation, rho, SearchScope::Row);
                assert!(rows.iter().all(|row| row.iter().filter(|on| **on).count() == count), "{rho}");
                assert_eq!(rows, selected_layers(&shifted, relaxation, rho, SearchScope::Row));
                let all = selected_layers(&logits, relaxation, rho, SearchScope::Global);
                assert_eq!(all.iter().flatten().filter(|on| **on).count(), of_all, "{rho}");
            }
        }
        let half = selected_layers(&logits, SearchRelaxation::Sigmoid, 0.5, SearchScope::Row);
        assert_eq!(half[..2], [vec![true, false, false, true], vec![true, true, false, false]]);
    }

    #[test]
    fn gradients_are_the_slopes_of_the_weights() {
        let logits = vec![vec![0.3, -0.1, 0.5], vec![2.0, -1.0]];
        let grads = vec![vec![0.7, -0.2, 0.4], vec![1.0, 3.0]];
        for relaxation in [SearchRelaxation::Sigmoid, SearchRelaxation::Softmax] {
            let sum = |logits: &[Vec<f64>]| -> f64 {
                let weights = layer_weights(logits, relaxation);
                weights.iter().flatten().zip(grads.iter().flatten()).map(|(w, g)| w * g).sum()
            };
            let found = logit_gradients(&logits, relaxation, &grads);
            for (row, layer) in [(0, 0), (0, 2), (1, 1)] {
                let moved = |by: f64| {
                    let mut logits = logits.clone();
                    logits[row][layer] += by;
                    sum(&logits)
                };
                let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((found[row][layer] - slope).abs() < 1e-8, "{} instead of {slope}", found[row][layer]);
            }
        }
        let equal = layer_weights(&[vec![0.4; 5]], SearchRelaxation::Softmax);
        assert!(equal[0].iter().all(|weight| (weight - 1.0).abs() < 1e-12));
    }
}
