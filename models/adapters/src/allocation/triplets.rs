//! Adapters in the form of a singular value decomposition on all layers, for the allocations that work on them.

use burn::tensor::Tensor;
use lowrank_optim::Part;

use crate::ground::stack::{Adapter, each_adapter};
use crate::ground::structure::frobenius;
use crate::structures::Triplet;

/// Visits the triplets of one adapter in a part, in the order of its layers.
pub(super) fn each_triplet(part: &dyn Part, name: &str, mut see: impl FnMut(&str, &Adapter, &Triplet)) {
    each_adapter(part, |path, stack| {
        for adapter in stack.stack.iter().filter(|adapter| adapter.control().name() == name) {
            if let Some(triplet) = adapter.structure.downcast_ref::<Triplet>() {
                see(path, adapter, triplet);
            }
        }
    });
}

/// Share of a part in `weight` times the mean, over the factors of all layers, of the distance of their components from
/// being orthonormal: the Frobenius norm of `A^T A - I`, and of `B B^T - I`. Shape `[1]`.
pub(super) fn orthogonality(part: &dyn Part, name: &str, weight: f64) -> Option<Tensor<1>> {
    let mut sum: Option<Tensor<1>> = None;
    if weight == 0.0 {
        return None;
    }
    each_triplet(part, name, |_, adapter, triplet| {
        let [a, b] = triplet.components();
        if a.dims()[1] == 0 {
            return;
        }
        let grams = [a.clone().transpose().matmul(a), b.clone().matmul(b.transpose())];
        let share = weight / (2 * adapter.control().totals().layers) as f64;
        for gram in grams {
            let unit = Tensor::<2>::eye(gram.dims()[0], &gram.device());
            let distance = frobenius(gram - unit, 0.0).mul_scalar(share);
            sum = Some(match sum.take() {
                Some(sum) => sum + distance,
                None => distance,
            });
        }
    });
    sum
}
