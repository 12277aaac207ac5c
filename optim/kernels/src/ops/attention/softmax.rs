//! Softmax of the scores of one query, and its gradient.

use crate::ops::flex::exp;

/// Scores become weights, and the gradients of weights those of scores. A single weight, which is 1, has a gradient of exactly 0.
#[inline(always)]
pub fn softmax_slopes(scores: &mut [f32], gradients: &mut [f32], logarithm: f32) {
    let mut sums = [0.0f32; 16];
    let ((lanes, rest), (slope_lanes, gradient_rest)) = (scores.as_chunks_mut::<16>(), gradients.as_chunks::<16>());
    for (lane, gradients) in lanes.iter_mut().zip(slope_lanes) {
        for ((sum, score), gradient) in sums.iter_mut().zip(lane).zip(gradients) {
            *score = exp(*score - logarithm);
            *sum += *score * gradient;
        }
    }
    let mut pull: f32 = sums.iter().sum();
    for (score, gradient) in rest.iter_mut().zip(gradient_rest) {
        *score = exp(*score - logarithm);
        pull += *score * gradient;
    }
    for (weight, gradient) in scores.iter().zip(gradients) {
        *gradient = *weight * (*gradient - pull);
    }
}

/// Softmax in place; the logarithm of the sum of exponentials.
#[inline(always)]
pub fn softmax(scores: &mut [f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; 16];
    let (lanes, rest) = scores.as_chunks::<16>();
    for lane in lanes {
        for (most, score) in most.iter_mut().zip(lane) {
            *most = most.max(*score);
        }
    }
    let most = most.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let mut sums = [0.0f32; 16];
    let (lanes, rest) = scores.as_chunks_mut::<16>();
    for lane in lanes {
        for (sum, score) in sums.iter_mut().zip(lane) {
            *score = exp(*score - most);
            *sum += *score;
        }
    }
    let mut total: f32 = sums.iter().sum();
    for score in rest {
        *score = exp(*score - most);
        total += *score;
    }
    let factor = 1.0 / total;
    scores.iter_mut().for_each(|score| *score *= factor);
    most + total.ln()
}
