//! Adam on a part of the gradient, its sign for everything else.

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::moments::MomentType;
use crate::projected::{BlockOrder, Inner, ProjectedConfig, ProjectorKind, Rest, Side, States};

/// How the inactive part moves the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InactiveRule {
    /// By its sign.
    SignSgd,
    /// By itself.
    Sgd,
    /// Not at all.
    No,
}

/// Configuration of FRUGAL: "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training" (Zmushko et al., arXiv
/// 2411.07837).
///
/// A share of the projected matrices' gradient has Adam's moments, the rest moves the weights by its sign. The share changes every `update_proj_gap`
/// steps, when the moments start anew. `projector = block`, whole matrices in turn, has to know how many there are: build it with
/// [`HiddenMatrices::optimizer`](crate::HiddenMatrices::optimizer).
#[derive(Config, Debug)]
pub struct FrugalConfig {
    /// Share that has moments, from 0 (sign descent) to 1.
    #[config(default = 0.25)]
    pub density: f64,
    /// Directions of svd, random and dct instead of a share of the smaller side; 0 takes `density`.
    #[config(default = 0)]
    pub rank: usize,
    /// Steps between choices of the active part, at least 1.
    #[config(default = 200)]
    pub update_proj_gap: usize,
    /// What the active part is made of.
    #[config(default = "ProjectorKind::Block")]
    pub projector: ProjectorKind,
    /// In which order matrices are active with `projector = block`.
    #[config(default = "BlockOrder::Descending")]
    pub block_order: BlockOrder,
    /// How the inactive part moves the weights.
    #[config(default = "InactiveRule::SignSgd")]
    pub inactive_rule: InactiveRule,
    /// Learning rate of the inactive part as a multiple of that of the active one, 0 or greater.
    #[config(default = 1.0)]
    pub inactive_lr_scale: f64,
    /// Learning rate of projected matrices as a multiple of the learning rate, 0 or greater.
    #[config(default = 1.0)]
    pub proj_lr_scale: f64,
    /// Whether moments start anew with the active part.
    #[config(default = true)]
    pub reset_statistics: bool,
    /// What works in the active part.
    #[config(default = "Inner::Adam")]
    pub inner: Inner,
    /// Side that is projected.
    #[config(default = "Side::Std")]
    pub side: Side,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Seed of random subspaces.
    #[config(default = 0)]
    pub seed: u64,
    /// Decay of the first moment, from 0 to below 1.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// Decay of the second moment, from 0 to below 1.
    #[config(default = 0.999)]
    pub beta_2: f64,
    /// Added to the root of the second moment, greater than 0.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// Decoupled weight decay, 0 or greater.
    #[config(default = 0.0)]
    pub weight_decay: f64,
}

impl FrugalConfig {
    /// Its pieces.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(self.density)
            .with_update_proj_gap(self.update_proj_gap)
            .with_projector(self.projector)
            .with_block_order(self.block_order)
            .with_rest(match self.inactive_rule {
                InactiveRule::SignSgd => Rest::Sign,
                InactiveRule::Sgd => Rest::Sgd,
                InactiveRule::No => Rest::None,
            })
            .with_inactive_lr_scale(self.inactive_lr_scale)
            .with_proj_lr_scale(self.proj_lr_scale)
            .with_states(if self.reset_statistics { States::Reset } else { States::Keep })
            .with_inner(self.inner)
            .with_side(self.side)
            .with_moments(self.moments)
            .with_seed(self.seed)
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
    }
}

crate::projected::named!(FrugalConfig);
