//! Stretched rotary positions, with the names and numbers of Hugging Face's `transformers`.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// Change of the rotary angles that extends a model beyond its training context, as under `rope_scaling` in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Angles divided by a factor ("Extending Context Window of Large Language Models via Positional Interpolation", arXiv 2306.15595).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// A base that grows with sequences beyond the model's positions; up to there the angles are the usual ones.
    Dynamic {
        /// The factor.
        factor: f64,
    },
    /// Slow angles divided by a factor, fast ones kept, and a smooth passage between ("The Llama 3 Herd of Models", arXiv 2407.21783).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Turns within the original positions below which an angle is divided.
        low_freq_factor: f64,
        /// Turns within the original positions above which an angle is kept.
        high_freq_factor: f64,
        /// Positions that the model was trained with.
        original_max_position_embeddings: f64,
    },
    /// As `llama3`, by a ramp over the angles, with queries and keys scaled ("YaRN: Efficient Context Window Extension of Large Language
    /// Models", arXiv 2309.00071).
    Yarn {
        /// The factor.
        factor: f64,
        /// Positions that the model was trained with.
        original_max_position_embeddings: f64,
        /// Scale of queries and keys; none: it follows from the factor.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attention_factor: Option<f64>,
        /// Turns within the original positions above which an angle is kept.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        beta_fast: Option<f64>,
        /// Turns within the original positions below which an angle is divided.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        beta_slow: Option<f64>,
        /// Weight of the factor's logarithm in the scale of queries and keys.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mscale: Option<f64>,
        /// The weight that the scale is divided by.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mscale_all_dim: Option<f64>,
        /// Rounds the ends of the ramp to whole numbers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        truncate: Option<bool>,
    },
}

impl RopeScaling {
    /// Rejects values that no model can have, naming the field.
    pub fn validate(&self) -> Result<(), ModelError> {
        let positive =
            |fields: &[(&str, f64)]| match fields.iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
                None => Ok(()),
                Some((field, value)) => {
                    Err(ModelError::Config(format!("rope_scaling.{field} is {value}; it must be greater than 0")))
                }
            };
        match *self {
            Self::Linear { factor } | Self::Dynamic { factor } => positive(&[("factor", factor)]),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                positive(&[
                    ("factor", factor),
                    ("low_freq_factor", low_freq_factor),
                    ("high_freq_factor", high_freq_factor),
                    ("original_max_position_embeddings", original_max_position_embeddings),
                ])?;
                match low_freq_factor < high_freq_factor {
                    true => Ok(()),
                    false => Err(ModelError::Config(format!(
                        "rope_scaling.high_freq_factor is {high_freq_factor}; it must be greater than low_freq_factor, {low_freq_factor}"
                    ))),
                }
            }
            Self::Yarn { factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow, .. } => {
                positive(&[
                    ("factor", factor),
                    ("original_max_position_embeddings", original_max_position_embeddings),
                    ("attention_factor", attention_factor.unwrap_or(1.0)),
                    ("beta_fast", beta_fast.unwrap_or(32.0)),
                    ("beta_slow", beta_slow.unwrap_or(1.0)),
                ])
            }
        }
    }

    /// Base of the angles in a sequence of `length` positions of a model that is meant for `positions`, for heads of this width.
    pub(crate) fn base(&self, theta: f64, head_dim: usize, positions: usize, length: usize) -> f64 {
        match *self {
            Self::Dynamic { factor } if length > positions => {
                let (width, longer) = (head_dim as f64, factor * length as f64 / positions as f64 - (factor - 1.0));
                theta * longer.powf(width / (width - 2.0))
            }
            _ => theta,
        }
    }

    /// Angles of one position for heads of this width, `rates` being the usual ones of the base `theta`.
    pub(crate) fn rates(&self, head_dim: usize, theta: f64, rates: Vec<f64>) -> Vec<f64> {
        match *self {
            Self::Linear { factor } => rates.into_iter().map(|rate| rate / factor).collect(),
            Self::Dynamic { .. } => rates,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: original } => {
                let stretched = |rate: f64| {
                    let turns = original * rate / (2.0 * PI);
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (1.0 - kept) * rate / factor + kept * rate
                };
                rates.into_iter().map(stretched).collect()
            }
            Self::Yarn {
                factor, original_max_position_embeddings: original, beta_fast, beta_slow, truncate, ..
            } => {
                let width = head_dim as f64;
                let index = |turns: f64| width * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (index(beta_fast.unwrap_or(32.0)), index(beta_slow.unwrap_or(1.0)));
                if truncate.unwrap_or(true) {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(width - 1.0));
                if low == high {
                    high += 0.001;
                }
                let stretched = |(place, rate): (usize, f64)| {
                    let divided = ((place as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    divided * rate / factor + (1.0 - divided) * rate
                };
                rates.into_iter().enumerate().map(stretched).collect()
            }
        }
    }

    /// Scale of the sines and cosines.
    pub(crate) fn attention_factor(&self) -> f64 {
        let Self::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } = *self else { return 1.0 };
        let by_weight = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        match (attention_factor, mscale, mscale_all_dim) {
            (Some(factor), ..) => factor,
            (None, Some(one), Some(all)) if one != 0.0 && all != 0.0 => by_weight(one) / by_weight(all),
            _ => by_weight(1.0),
        }
    }
}
