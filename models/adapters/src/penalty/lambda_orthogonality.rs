//! Orthogonality that is relaxed within a radius ("Lambda-Orthogonality Regularization for Compatible Representation Learning", arXiv 2509.16664).
//! The steepness of the switch is not stated in the paper.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{MatrixPenalty, PenaltyEntry};
use crate::ground::structure::frobenius;

/// `sigmoid(alpha (v - lambda)) v` of the distance `v = |W W^T - I|` from orthonormal rows, or columns of a tall matrix. It has almost no force
/// where `v` is below `lambda`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LambdaOrthogonality {
    /// Distance from orthogonality that costs nothing. It scales with the root of the smaller side; 12 is meant for 512 to 1024.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub lambda: f64,
    /// Steepness of the switch at `lambda`.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub alpha: f64,
    /// Strength of the term; below about 0.1 other terms win and `lambda` has no effect.
    #[schemars(range(min = 0.0, max = 1e6))]
    pub weight: f64,
}

impl Default for LambdaOrthogonality {
    fn default() -> Self {
        Self { lambda: 12.0, alpha: 10.0, weight: 1.0 }
    }
}

pub(super) static ENTRY: PenaltyEntry = PenaltyEntry {
    entry: Entry {
        papers: &[Paper {
            title: "Lambda-Orthogonality Regularization for Compatible Representation Learning",
            place: "2509.16664",
        }],
        memory: "r r of a matrix whose smaller side is r",
        options: || OptionList::of(&LambdaOrthogonality::default()),
        ..Entry::plain(
            Kind::Penalty,
            "lambda-orthogonality",
            "keeps matrices within a radius of orthogonality, and leaves them free inside",
        )
    },
    read: |options| {
        let penalty = ENTRY.entry.configure::<LambdaOrthogonality>(options);
        Ok(Box::new(penalty.map_err(|error| error.under("penalty.options"))?))
    },
};

/// Distances below this have no gradient: the norm is not differentiable at 0.
const LEAST: f64 = 1e-12;

impl LambdaOrthogonality {
    /// Distance `|W W^T - I|` of the rows of a matrix from orthonormal ones, or of its columns if those are fewer; shape `[1]`.
    pub fn defect(matrix: Tensor<2>) -> Tensor<1> {
        let [rows, columns] = matrix.dims();
        let products = match rows <= columns {
            true => matrix.clone().matmul(matrix.transpose()),
            false => matrix.clone().transpose().matmul(matrix),
        };
        let unit = Tensor::eye(rows.min(columns), &products.device());
        frobenius(products - unit, LEAST)
    }
}

impl MatrixPenalty for LambdaOrthogonality {
    fn of(&self, matrix: Tensor<2>) -> Option<Tensor<1>> {
        if self.weight == 0.0 || self.lambda.is_infinite() {
            return None;
        }
        let defect = Self::defect(matrix);
        let switch = sigmoid(defect.clone().sub_scalar(self.lambda).mul_scalar(self.alpha));
        Some((switch * defect).mul_scalar(self.weight))
    }
}

#[cfg(test)]
mod tests {
    use lowrank_kernels::host::values as host;

    use super::*;
    use crate::bench::{near, wave};

    fn value(penalty: LambdaOrthogonality, matrix: Tensor<2>) -> f32 {
        host(penalty.of(matrix).unwrap())[0]
    }

    fn gradient(penalty: LambdaOrthogonality, matrix: Tensor<2>) -> Tensor<2> {
        let matrix = Tensor::from_inner(matrix.without_autodiff()).require_grad();
        let mut grads = penalty.of(matrix.clone()).unwrap().backward();
        matrix.grad_remove(&mut grads).unwrap()
    }

    #[test]
    fn the_gradient_is_that_of_the_formula_on_either_side_of_lambda() {
        for (shape, lambda) in [([6, 6], 0.0), ([6, 6], 3.0), ([4, 9], 1.0), ([9, 4], 50.0)] {
            let penalty = LambdaOrthogonality { lambda, alpha: 0.7, weight: 1.0 };
            let w = wave(shape, 2).without_autodiff();
            let wide = if shape[0] <= shape[1] { w.clone() } else { w.clone().transpose() };
            let n = wide.dims()[0];
            let g = wide.clone().matmul(wide.clone().transpose()) - Tensor::eye(n, &wide.device());
            let v = f64::from(host(LambdaOrthogonality::defect(w.clone()))[0]);
            let s = 1.0 / (1.0 + (-0.7 * (v - lambda)).exp());
            let expected = g.matmul(wide).mul_scalar((s + 0.7 * v * s * (1.0 - s)) * 2.0 / v);
            let expected = if shape[0] <= shape[1] { expected } else { expected.transpose() };
            near(gradient(penalty, w), expected, 1e-4);
        }
    }

    #[test]
    fn orthogonal_matrices_cost_nothing_and_the_value_is_half_at_lambda() {
        let unit = Tensor::<2>::eye(5, &Default::default());
        let penalty = LambdaOrthogonality { lambda: 2.0, ..LambdaOrthogonality::default() };
        assert_eq!(value(penalty, unit.clone()), 0.0);
        assert!(host(gradient(penalty, unit.clone())).iter().all(|value| *value == 0.0));
        // |c^2 I - I| = |c^2 - 1| sqrt(5).
        let at = |v: f64| unit.clone().mul_scalar((1.0 + v / 5f64.sqrt()).sqrt());
        assert!((value(penalty, at(2.0)) - 1.0).abs() < 1e-4);
        let values: Vec<f32> = (1..40).map(|tenth| value(penalty, at(f64::from(tenth) / 10.0))).collect();
        assert!(values.windows(2).all(|pair| pair[0] < pair[1]), "{values:?}");
        assert!(value(penalty, at(1.0)) < 1e-4 && (value(penalty, at(3.5)) - 3.5).abs() < 1e-4);
    }

    #[test]
    fn turning_a_matrix_changes_nothing_and_no_weight_is_no_term() {
        let (sine, cosine) = 0.7f32.sin_cos();
        let turn = Tensor::<2>::from_data([[cosine, -sine], [sine, cosine]], &Default::default());
        let w = wave([2, 5], 4).without_autodiff();
        let penalty = LambdaOrthogonality { lambda: 1.0, ..LambdaOrthogonality::default() };
        let [one, two] = [w.clone(), turn.matmul(w.clone())].map(|matrix| value(penalty, matrix));
        assert!((one - two).abs() < 1e-5 * one.abs(), "{one} {two}");
        assert!(LambdaOrthogonality { weight: 0.0, ..penalty }.of(w.clone()).is_none());
        assert!(LambdaOrthogonality { lambda: f64::INFINITY, ..penalty }.of(w).is_none());
    }
}
