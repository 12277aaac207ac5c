//! The gradient itself, scaled as Adam would scale it in a random sketch.

use burn::config::Config;
use schemars::JsonSchema;

use crate::adam::AdamOptions;
use crate::projected::config::{Granularity, Inner, ProjectedConfig, ProjectorKind, Residual, Side};
use crate::projected::named::named;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::state::moments::MomentType;

/// Configuration of APOLLO and APOLLO-Mini: "APOLLO: SGD-like Memory, AdamW-level Performance" (Zhu et al., arXiv 2412.05270).
///
/// Adam runs on a random projection of the gradient only to see how it changes the size of each row or column; the whole gradient, so scaled,
/// moves the weights. The root of `scale` multiplies the update. Projections are rebuilt from their seed, not stored.
#[derive(Config, Debug, JsonSchema)]
pub struct ApolloConfig {
    /// Rank of the sketch; 0 uses a quarter of the smaller side.
    #[config(default = 0)]
    #[schemars(range(max = 1_000_000))]
    pub rank: usize,
    /// Scaling factors of a matrix.
    #[config(default = "Granularity::Channel")]
    pub granularity: Granularity,
    /// Its square root multiplies the update.
    #[config(default = 1.0)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// Apply `scale` before the growth limit.
    #[config(default = false)]
    pub scale_front: bool,
    /// Steps between draws of the projection.
    #[config(default = 200)]
    #[schemars(range(min = 1))]
    pub update_proj_gap: usize,
    /// Projection of the sketch.
    #[config(default = "ProjectorKind::Gaussian")]
    #[schemars(extend("enum" = ["gaussian", "svd"]))]
    pub projector: ProjectorKind,
    /// Greatest growth of the update's norm from step to step; 0 for no limit.
    #[config(default = 1.01)]
    #[schemars(extend("anyOf" = [{ "const": 0 }, { "exclusiveMinimum": 1 }]))]
    pub growth_limit: f64,
    /// Projected side of a matrix.
    #[config(default = "Side::Std")]
    #[schemars(extend("enum" = ["std", "std_left", "reverse_std", "left", "right"]))]
    pub side: Side,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Seed of random subspaces.
    #[config(default = 0)]
    pub seed: u64,
    /// Options of Adam.
    #[config(default = "AdamOptions::new().with_epsilon(1e-6)")]
    pub adam: AdamOptions,
}

impl ApolloConfig {
    /// APOLLO-Mini: one direction and one factor per matrix.
    pub fn mini() -> Self {
        Self::new().with_rank(1).with_granularity(Granularity::Matrix).with_scale(128.0)
    }

    /// Its components.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.25)
            .with_residual(Residual::Gradient)
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
            .with_adam(self.adam)
    }
}

/// Registry entry.
pub(crate) const APOLLO: Method = method!(
    ApolloConfig,
    ApolloConfig::new(),
    Entry {
        papers: &[Paper { title: "APOLLO: SGD-like Memory, AdamW-level Performance", place: "2412.05270" }],
        memory: "2 n_max r",
        needs: &["hidden matrices whose projected side is at least the rank"],
        ..Entry::plain(
            Kind::Optimizer,
            "apollo",
            "the gradient, each row or column scaled as Adam scales it in a random sketch"
        )
    }
);

/// Registry entry.
pub(crate) const APOLLO_MINI: Method = method!(
    ApolloConfig,
    ApolloConfig::mini(),
    Entry {
        papers: &[Paper { title: "APOLLO: SGD-like Memory, AdamW-level Performance", place: "2412.05270" }],
        memory: "2 n_max",
        needs: &["hidden matrices whose projected side is at least the rank"],
        ..Entry::plain(Kind::Optimizer, "apollo-mini", "the gradient, scaled by one factor from a sketch of rank 1")
    }
);

named!(ApolloConfig);
