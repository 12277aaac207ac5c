//! GaLore whose rest moves the weights too.

use burn::config::Config;

use crate::moments::MomentType;
use crate::projected::{Granularity, Inner, ProjectedConfig, ProjectorKind, Rest, Side};

/// Configuration of Fira: "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (Chen et al., arXiv 2410.01623).
///
/// What the projection leaves out of the gradient moves the weights as well, scaled by the ratio that Adam applied inside the subspace. Its norm
/// grows by no more than `growth_limit` a step. After a gradient of zeros the limit starts anew instead of freezing the matrix.
#[derive(Config, Debug)]
pub struct FiraConfig {
    /// Directions, at least 1. A matrix whose projected side is smaller takes AdamW.
    pub rank: usize,
    /// Steps between choices of directions, at least 1.
    #[config(default = 200)]
    pub update_proj_gap: usize,
    /// Factor of the projected update, greater than 0.
    #[config(default = 0.25)]
    pub scale: f64,
    /// Whether the rest is what the projection leaves out, as in the paper, and not, as in the published code, `G - scale back(low)`.
    #[config(default = false)]
    pub pure: bool,
    /// How many scaling factors a matrix has.
    #[config(default = "Granularity::Channel")]
    pub granularity: Granularity,
    /// Greatest growth of the rest's norm from step to step, greater than 1; 0 for no limit.
    #[config(default = 1.01)]
    pub growth_limit: f64,
    /// Side that is projected.
    #[config(default = "Side::Std")]
    pub side: Side,
    /// How directions are chosen.
    #[config(default = "ProjectorKind::Svd")]
    pub projector: ProjectorKind,
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
    #[config(default = 1e-6)]
    pub epsilon: f64,
    /// Decoupled weight decay, 0 or greater.
    #[config(default = 0.0)]
    pub weight_decay: f64,
}

impl FiraConfig {
    /// Its pieces.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.0)
            .with_update_proj_gap(self.update_proj_gap)
            .with_scale(self.scale)
            .with_rest(if self.pure { Rest::ScaledPure } else { Rest::Scaled })
            .with_granularity(self.granularity)
            .with_growth_limit(self.growth_limit)
            .with_side(self.side)
            .with_projector(self.projector)
            .with_moments(self.moments)
            .with_seed(self.seed)
            .with_inner(Inner::AdamLegacy)
            .with_decay_after(true)
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
    }
}

crate::projected::named!(FiraConfig);
