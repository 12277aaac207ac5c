//! The gradient itself, scaled as Adam would scale it in a random sketch.

use burn::config::Config;

use crate::moments::MomentType;
use crate::projected::{Granularity, Inner, ProjectedConfig, ProjectorKind, Rest, Side};

/// Configuration of APOLLO and APOLLO-Mini: "APOLLO: SGD-like Memory, AdamW-level Performance" (Zhu et al., arXiv 2412.05270).
///
/// Adam runs on a random projection of the gradient only to see how it changes the size of each row or column; the whole gradient, so scaled,
/// moves the weights. The root of `scale` multiplies the update. Projections are rebuilt from their seed, not stored.
#[derive(Config, Debug)]
pub struct ApolloConfig {
    /// Directions of the sketch; 0 takes a quarter of the smaller side.
    #[config(default = 0)]
    pub rank: usize,
    /// How many scaling factors a matrix has.
    #[config(default = "Granularity::Channel")]
    pub granularity: Granularity,
    /// Its root multiplies the update; greater than 0.
    #[config(default = 1.0)]
    pub scale: f64,
    /// Whether `scale` acts before the limit of growth.
    #[config(default = false)]
    pub scale_front: bool,
    /// Steps between draws of the projection, at least 1.
    #[config(default = 200)]
    pub update_proj_gap: usize,
    /// How the sketch is made: gaussian or svd.
    #[config(default = "ProjectorKind::Gaussian")]
    pub projector: ProjectorKind,
    /// Greatest growth of the update's norm from step to step, greater than 1; 0 for no limit.
    #[config(default = 1.01)]
    pub growth_limit: f64,
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
    #[config(default = 1e-6)]
    pub epsilon: f64,
    /// Decoupled weight decay, 0 or greater.
    #[config(default = 0.0)]
    pub weight_decay: f64,
}

impl ApolloConfig {
    /// APOLLO-Mini: one direction and one factor a matrix.
    pub fn mini() -> Self {
        Self::new().with_rank(1).with_granularity(Granularity::Matrix).with_scale(128.0)
    }

    /// Its pieces.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.25)
            .with_rest(Rest::Gradient)
            .with_granularity(self.granularity)
            .with_scale(self.scale)
            .with_scale_front(self.scale_front)
            .with_update_proj_gap(self.update_proj_gap)
            .with_projector(self.projector)
            .with_growth_limit(self.growth_limit)
            .with_side(self.side)
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

crate::projected::named!(ApolloConfig);
