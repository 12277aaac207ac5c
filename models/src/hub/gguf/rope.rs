//! Rotary settings: keys of the metadata, or divisors of the frequencies in a tensor.

use std::f64::consts::PI;

use super::container::GgufFile;
use crate::error::ModelError;
use crate::llama::{LlamaConfig, RopeScaling};
use crate::ops::Rotary;

/// Tensor with a divisor of each frequency.
pub(super) const DIVISORS: &str = "rope_freqs.weight";
/// Positions that Llama 3 was trained with before its angles were stretched, and its bounds in turns within them.
const USUAL: [f64; 3] = [8192.0, 1.0, 4.0];
/// Largest relative difference of divisors that count as equal.
const NEAR: f64 = 1e-5;

/// Divisors of the frequencies of a scaling that the metadata has no keys for.
pub(super) fn divisors(config: &LlamaConfig) -> Option<Vec<f32>> {
    let scaling = config.rope_scaling.as_ref().filter(|scaling| matches!(scaling, RopeScaling::Llama3 { .. }))?;
    let rates = Rotary::rates(config.head_dim, config.rope_theta);
    let scaled = scaling.rates(config.head_dim, config.rope_theta, rates.clone());
    Some(rates.iter().zip(scaled).map(|(rate, scaled)| (rate / scaled) as f32).collect())
}

/// The scaling whose divisors are in a file. The file does not name its parameters: of those with the same angles, the
/// usual ones are preferred.
pub(super) fn of_divisors(
    file: &GgufFile,
    head_dim: usize,
    theta: f64,
    original: Option<usize>,
) -> Result<Option<RopeScaling>, ModelError> {
    let Some(shape) = file.shape(DIVISORS) else { return Ok(None) };
    if shape != [head_dim / 2] {
        let reason = format!("has the shape {shape:?}; heads of {head_dim} values have {} frequencies", head_dim / 2);
        return Err(file.tensor_error(DIVISORS, reason));
    }
    let divisors: Vec<f64> = file.values(DIVISORS)?.into_iter().map(f64::from).collect();
    let rates = Rotary::rates(head_dim, theta);
    let equal = |scaling: &RopeScaling| {
        let scaled = scaling.rates(head_dim, theta, rates.clone());
        let mut all = rates.iter().zip(scaled).zip(&divisors);
        all.all(|((rate, scaled), divisor)| (rate / scaled / divisor - 1.0).abs() <= NEAR)
    };
    let factor = divisors.iter().fold(0.0f64, |factor, divisor| factor.max(*divisor));
    if divisors.iter().all(|divisor| (divisor - 1.0).abs() <= NEAR) {
        return Ok(None);
    }
    let original = original.map_or(USUAL[0], |original| original as f64);
    let turns: Vec<f64> = rates.iter().map(|rate| original * rate / (2.0 * PI)).collect();
    let candidates = [Some((USUAL[1], USUAL[2])), bounds(&turns, &divisors, factor)].into_iter().flatten();
    let llama3 = candidates.map(|(low, high)| RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    });
    let all = std::iter::once(RopeScaling::Linear { factor }).chain(llama3);
    match all.into_iter().filter(|scaling| scaling.validate().is_ok()).find(equal) {
        Some(scaling) => Ok(Some(scaling)),
        None => Err(file.tensor_error(
            DIVISORS,
            "has divisors of the frequencies that are not those of a Llama 3 scaling; no other kind can be read".into(),
        )),
    }
}

/// Bounds in turns below which a frequency is divided by the factor and above which it is kept.
fn bounds(turns: &[f64], divisors: &[f64], factor: f64) -> Option<(f64, f64)> {
    // Fraction of the frequency that is kept undivided.
    let kept: Vec<f64> = divisors.iter().map(|divisor| (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor)).collect();
    let between = |index: &usize| kept[*index] > NEAR && kept[*index] < 1.0 - NEAR;
    let ramp: Vec<usize> = (0..kept.len()).filter(between).collect();
    // Frequencies fall: those before the ramp are kept, those behind it divided.
    match (ramp.first(), ramp.last()) {
        (Some(first), Some(last)) if first < last => {
            let width = (turns[*first] - turns[*last]) / (kept[*first] - kept[*last]);
            let low = turns[*last] - kept[*last] * width;
            Some((low, low + width))
        }
        (Some(only), _) => {
            let (at, share) = (turns[*only], kept[*only]);
            let above = only.checked_sub(1).map_or(f64::INFINITY, |index| turns[index]);
            let below = turns.get(only + 1).copied().unwrap_or(0.0);
            // The higher bound follows from the lower one, and must not reach the next frequency.
            let least = if above.is_finite() { (above * share - at) / (share - 1.0) } else { 0.0 };
            let low = (least.max(below) + at) / 2.0;
            Some((low, low + (at - low) / share))
        }
        (None, _) => {
            let first_divided = kept.iter().position(|kept| *kept <= NEAR).filter(|index| *index > 0)?;
            let (low, high) = (turns[first_divided], turns[first_divided - 1]);
            Some((low + (high - low) / 3.0, high - (high - low) / 3.0))
        }
    }
}
