//! Orthogonalisation by Newton-Schulz iteration, as Muon and Trion use it.

use burn::tensor::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::elementwise::norm;
use crate::ops::MatrixProduct;

/// Coefficients of the iteration `X <- a X + (b Y + c Y^2) X` with `Y = X X^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Coefficients {
    /// The same in every step: singular values end between 0.68 and 1.21.
    Jordan,
    /// Five sets, one a step: between 0.97 and 1.04.
    Varying,
}

impl Coefficients {
    /// Number of steps for which there are coefficients, if it is limited.
    pub fn sets(self) -> Option<usize> {
        match self {
            Self::Jordan => None,
            Self::Varying => Some(VARYING.len()),
        }
    }
}

const JORDAN: [f64; 3] = [3.4445, -4.7750, 2.0315];

const VARYING: [[f64; 3]; 5] = [
    [4.0848, -6.8946, 2.9270],
    [3.9505, -6.3029, 2.6377],
    [3.7418, -5.5913, 2.3037],
    [2.8769, -3.1427, 1.2046],
    [2.8366, -3.0525, 1.2012],
];

/// Keeps a zero matrix zero.
const GUARD: f64 = 1e-7;

/// A matrix with the singular vectors of `x` and singular values near 1, `[rows, columns]` as `x`. With `bf16` the products are of that type, as in
/// the published code: faster on a GPU, and singular values scatter by about a hundredth.
pub fn newton_schulz(x: Tensor<2>, steps: usize, coefficients: Coefficients, bf16: bool) -> Tensor<2> {
    let [rows, columns] = x.dims();
    let tall = rows > columns;
    let size = norm(&x);
    let x = if tall { x.transpose() } else { x };
    let mut x = x.div_scalar(size + GUARD);
    if bf16 {
        x = x.cast(DType::BF16);
    }
    for step in 0..steps {
        let [a, b, c] = match coefficients {
            Coefficients::Jordan => JORDAN,
            Coefficients::Varying => VARYING[step.min(VARYING.len() - 1)],
        };
        let y = x.clone().times(x.clone().transpose());
        let y = y.clone().mul_scalar(b) + y.clone().times(y).mul_scalar(c);
        x = x.clone().mul_scalar(a) + y.times(x);
    }
    let x = x.cast(DType::F32);
    if tall { x.transpose() } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decompose::orthonormal_factor;
    use crate::host::values;
    use crate::random::normal_matrix;
    use burn::tensor::Device;

    fn near(a: Tensor<2>, b: Tensor<2>, tolerance: f32) {
        for (a, b) in values(a).iter().zip(values(b)) {
            assert!((a - b).abs() <= tolerance, "{a} {b}");
        }
    }

    #[test]
    fn turns_with_its_argument_and_forgets_its_size() {
        let device = Device::default();
        let x = normal_matrix(0, 1, [12, 7], &device);
        let q = orthonormal_factor(&normal_matrix(0, 2, [12, 12], &device));
        for coefficients in [Coefficients::Jordan, Coefficients::Varying] {
            let plain = newton_schulz(x.clone(), 5, coefficients, false);
            near(
                newton_schulz(q.clone().matmul(x.clone()), 5, coefficients, false),
                q.clone().matmul(plain.clone()),
                1e-5,
            );
            near(newton_schulz(x.clone().transpose(), 5, coefficients, false), plain.clone().transpose(), 1e-5);
            near(newton_schulz(x.clone() * 1e20, 5, coefficients, false), plain.clone(), 1e-5);
            near(newton_schulz(x.zeros_like(), 5, coefficients, false), x.zeros_like(), 0.0);
            near(newton_schulz(x.clone(), 5, coefficients, true), plain.clone(), 0.05);
        }
    }

    #[test]
    fn a_diagonal_follows_the_polynomial() {
        let (entries, device) = ([0.8f32, 0.5, 0.2], Device::default());
        let size = entries.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt() + GUARD;
        let diagonal = Tensor::<2>::from_data([[0.8, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.2]], &device);
        let result = values(newton_schulz(diagonal, 5, Coefficients::Varying, false));
        for (i, entry) in entries.iter().enumerate() {
            let expected =
                VARYING.iter().fold(f64::from(*entry) / size, |x, [a, b, c]| a * x + b * x.powi(3) + c * x.powi(5));
            assert!((f64::from(result[4 * i]) - expected).abs() < 2e-6);
        }
        assert!([1, 2, 3, 5, 6, 7].iter().all(|place| result[*place].abs() < 1e-6));
    }
}
