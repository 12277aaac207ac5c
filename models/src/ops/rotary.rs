//! Rotary position embedding.

use burn::tensor::{Device, Tensor, TensorData};

/// Sines and cosines of the angles of positions.
///
/// "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864).
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `[positions, head_dim / 2]`, plain tensors: no gradient flows into them.
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl Rotary {
    /// Angles of the first `positions` positions for heads of an even width: `position * theta^(-2 i / head_dim)`.
    pub fn new(head_dim: usize, positions: usize, theta: f64, device: &Device) -> Self {
        let half = head_dim / 2;
        let rates: Vec<f64> = (0..half).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let device = device.clone().inner();
        let table = |f: fn(f64) -> f64| {
            let values = (0..positions).flat_map(|position| rates.iter().map(move |rate| f(position as f64 * rate) as f32));
            Tensor::from_data(TensorData::new(values.collect::<Vec<_>>(), [positions, half]), &device)
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }
}

/// Rotates each head of `x [b, t, h, d]`, whose first position has index `offset`.
///
/// Pairs are the halves of a head, as in Hugging Face's LLaMA: value `i` turns with value `i + d / 2`.
pub fn rotary(x: Tensor<4>, table: &Rotary, offset: usize) -> Tensor<4> {
    let [_, positions, _, width] = x.dims();
    let half = width / 2;
    let rows = |table: &Tensor<2>| table.clone().slice([offset..offset + positions]).reshape([1, positions, 1, half]);
    let (cos, sin) = (rows(&table.cos), rows(&table.sin));
    let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let turned_second = second * cos + first * sin;
    Tensor::cat(vec![turned_first, turned_second], 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotate(values: [f32; 4], offset: usize) -> Vec<f32> {
        let device = Device::default();
        let x = Tensor::<4>::from_data(TensorData::new(values.to_vec(), [1, 1, 1, 4]), &device);
        rotary(x, &Rotary::new(4, 9, 100.0, &device), offset).into_data().try_into_vec().unwrap()
    }

    #[test]
    fn halves_turn_by_position_times_rate() {
        let turned = rotate([1.0, 0.0, 0.0, 2.0], 3);
        // The second pair has rate 100^(-2/4) = 0.1.
        let expected = [3f32.cos(), -2.0 * 0.3f32.sin(), 3f32.sin(), 2.0 * 0.3f32.cos()];
        for (ours, expected) in turned.iter().zip(expected) {
            assert!((ours - expected).abs() < 1e-6, "{turned:?}");
        }
        assert_eq!(rotate([1.0, 2.0, 3.0, 4.0], 0), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn products_depend_on_the_distance_alone() {
        let dot = |a: usize, b: usize| {
            let (q, k) = (rotate([0.3, -1.0, 0.5, 2.0], a), rotate([1.0, 0.7, -0.2, 0.4], b));
            q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()
        };
        assert!((dot(5, 2) - dot(8, 5)).abs() < 1e-5);
    }
}
