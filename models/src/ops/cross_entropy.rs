//! Output layer and cross-entropy together.

use burn::tensor::{Int, Tensor, activation};

/// Target that does not count.
pub const IGNORE: i32 = -100;

/// Sum of the cross-entropies in nats of `softmax(x W)`, shape `[1]`.
///
/// - `x [n, d]`, `weight [d, vocabulary]` (also a transposed view of an embedding)
/// - `targets [n]`: token ids; [`IGNORE`] does not count
pub fn linear_cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let logarithms = activation::log_softmax(x.matmul(weight), 1);
    let ignored = targets.clone().equal_elem(IGNORE);
    let picked = logarithms.gather(1, targets.mask_fill(ignored.clone(), 0).unsqueeze_dim(1)).squeeze_dim::<1>(1);
    picked.mask_fill(ignored, 0.0).sum().neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn sums_over_the_targets_that_count() {
        let device = Device::default();
        let x = Tensor::<2>::from_data([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], &device);
        let weight = Tensor::<2>::from_data([[1.0, 0.0, -1.0], [0.5, 1.0, 0.0]], &device);
        let targets = Tensor::<1, Int>::from_data(TensorData::from([2, IGNORE, 0]), &device);
        let loss: f32 = linear_cross_entropy(x, weight, targets).into_scalar();
        let entropy = |logits: [f32; 3], target: usize| logits.map(f32::exp).iter().sum::<f32>().ln() - logits[target];
        let expected = entropy([2.0, 2.0, -1.0], 2) + entropy([3.0, 0.0, -3.0], 0);
        assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
    }
}
