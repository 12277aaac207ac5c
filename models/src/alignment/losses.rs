//! Loss of an alignment.

use std::collections::BTreeMap;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Tensor, TensorData};
use lowrank_adapters::{LambdaOrthogonality, MatrixPenalty};

use super::maps::{AlignmentMaps, Backward};

/// Weights of the terms; the paper does not state its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossWeights {
    /// Distance of mapped old embeddings from mapped new ones.
    pub forward: f64,
    /// Distance of mapped new embeddings from old ones.
    pub backward: f64,
    /// Contrast of classes.
    pub contrastive: f64,
}

impl Default for LossWeights {
    fn default() -> Self {
        Self { forward: 1.0, backward: 1.0, contrastive: 1.0 }
    }
}

/// Loss of a batch of pairs of embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AlignmentLoss {
    /// Weights of the terms.
    pub weights: LossWeights,
    /// Temperature of the contrast.
    pub temperature: f64,
    /// Penalty on the weight of an affine map.
    pub penalty: LambdaOrthogonality,
}

/// Parts of the loss, each of shape `[1]` and without its weight.
#[derive(Clone, Debug)]
pub struct LossParts {
    /// Mean squared distance of mapped old embeddings from mapped new ones.
    pub forward: Tensor<1>,
    /// Mean squared distance of mapped new embeddings from old ones.
    pub backward: Tensor<1>,
    /// Contrast of mapped old embeddings with mapped new ones, and with old ones.
    pub contrastive: Tensor<1>,
    /// Penalty on the map; none for a rotation, or if it is off.
    pub penalty: Option<Tensor<1>>,
}

impl AlignmentLoss {
    /// Parts for embeddings `old [pairs, d_old]` and `new [pairs, d_new]` of the same items. Without labels each item is its own class.
    pub fn parts(&self, maps: &AlignmentMaps, old: Tensor<2>, new: Tensor<2>, labels: Option<&[i32]>) -> LossParts {
        let (mapped_new, mapped_old) = (maps.new_in_old(new), maps.old_in_new(old.clone()));
        let contrast = |candidates: &Tensor<2>| {
            let (anchors, candidates) = cut(mapped_old.clone(), candidates.clone());
            contrastive(anchors, candidates, labels, self.temperature)
        };
        LossParts {
            forward: distance(mapped_old.clone(), mapped_new.clone()),
            backward: distance(mapped_new.clone(), old.clone()),
            contrastive: contrast(&mapped_new) + contrast(&old),
            penalty: match &maps.backward {
                Backward::Affine(map) => self.penalty.of(map.weight.val()),
                Backward::Rotation(_) => None,
            },
        }
    }

    /// Weighted sum of the parts.
    pub fn sum(&self, parts: &LossParts) -> Tensor<1> {
        let LossWeights { forward, backward, contrastive } = self.weights;
        let sum = parts.forward.clone().mul_scalar(forward)
            + parts.backward.clone().mul_scalar(backward)
            + parts.contrastive.clone().mul_scalar(contrastive);
        match &parts.penalty {
            Some(penalty) => sum + penalty.clone(),
            None => sum,
        }
    }
}

/// The leading coordinates that both have.
fn cut(one: Tensor<2>, two: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let width = one.dims()[1].min(two.dims()[1]);
    (one.narrow(1, 0, width), two.narrow(1, 0, width))
}

/// Squared distance, summed over coordinates, mean over rows.
fn distance(one: Tensor<2>, two: Tensor<2>) -> Tensor<1> {
    let (one, two) = cut(one, two);
    (one - two).square().sum_dim(1).mean()
}

/// Rows of length 1.
fn normalised(rows: Tensor<2>) -> Tensor<2> {
    let lengths = rows.clone().square().sum_dim(1).sqrt();
    rows / lengths.clamp_min(1e-12)
}

/// Cross-entropy between the softmax of cosines over `temperature` and the uniform distribution over the candidates of the anchor's class.
pub fn contrastive(anchors: Tensor<2>, candidates: Tensor<2>, labels: Option<&[i32]>, temperature: f64) -> Tensor<1> {
    let rows = anchors.dims()[0];
    let logits = normalised(anchors).matmul(normalised(candidates).transpose()).div_scalar(temperature);
    let mut counts: BTreeMap<i32, usize> = BTreeMap::new();
    labels.into_iter().flatten().for_each(|label| *counts.entry(*label).or_default() += 1);
    let share = |i: usize, j: usize| match labels {
        None => f32::from(i == j),
        Some(labels) if labels[i] == labels[j] => 1.0 / counts[&labels[i]] as f32,
        Some(_) => 0.0,
    };
    let shares: Vec<f32> = (0..rows * rows).map(|place| share(place / rows, place % rows)).collect();
    let shares = Tensor::<2>::from_data(TensorData::new(shares, [rows, rows]), &logits.device());
    (log_softmax(logits, 1) * shares).sum().div_scalar(rows as f64).neg()
}
