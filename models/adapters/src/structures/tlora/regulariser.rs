//! Distance of the transform from the matrices that a penalty pulls it toward.

use burn::module::Param;
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Matrices that a penalty pulls the transform toward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Regulariser {
    /// Nowhere.
    #[default]
    None,
    /// To the identity.
    Identity,
    /// To orthogonal matrices.
    Orthogonal,
}

/// Sum of the roots, with gradient 0 where they are 0.
fn sum_of_roots<const D: usize>(squares: Tensor<D>) -> Tensor<1> {
    let zero = squares.clone().equal_elem(0.0);
    squares.mask_fill(zero.clone(), 1.0).sqrt().mask_fill(zero, 0.0).sum()
}

impl Regulariser {
    /// Distance of a transform's cores from those of the identity, or from those of orthogonal matrices; 0 for neither.
    pub(super) fn distance(self, cores: &[Param<Tensor<4>>], squared: bool) -> Tensor<1> {
        let terms = cores.iter().map(|core| {
            let ([mode, _, rank, _], device) = (core.dims(), core.device());
            let share = (rank as f32).recip();
            let squares = match self {
                Self::None => return Tensor::zeros([1], &device),
                Self::Identity => {
                    let identity = Tensor::<2>::eye(mode, &device).mul_scalar(share).reshape([mode, mode, 1, 1]);
                    (core.val() - identity).square().sum_dim(0).sum_dim(1)
                }
                Self::Orthogonal => {
                    let pairs = rank * rank;
                    // Cores of T T^T, [mode, pair of ranks, mode, pair of ranks].
                    let rows = core.val().swap_dims(1, 2).swap_dims(2, 3).reshape([mode * pairs, mode]);
                    let gram = rows.clone().matmul(rows.transpose()).reshape([mode, pairs, mode, pairs]);
                    // Rounded like the product of two shares, so that the difference is 0 at the start.
                    let identity = Tensor::<2>::eye(mode, &device).mul_scalar(share * share);
                    (gram - identity.reshape([mode, 1, mode, 1])).square().sum_dim(0).sum_dim(2)
                }
            };
            if squared { squares.sum() } else { sum_of_roots(squares) }
        });
        match terms.reduce(|sum, term| sum + term) {
            Some(sum) => sum,
            None => unreachable!("the input has at least one mode"),
        }
    }
}
