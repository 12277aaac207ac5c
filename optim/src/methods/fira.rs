//! GaLore with a weight update from the residual too.

use burn::config::Config;
use schemars::JsonSchema;

use crate::adam::AdamOptions;
use crate::projected::config::{Granularity, Inner, ProjectedConfig, ProjectorKind, Residual, Side};
use crate::projected::named::named;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::state::moments::MomentType;

/// Configuration of Fira: "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (Chen et al., arXiv 2410.01623).
///
/// The residual of the projection moves the weights as well, scaled by the ratio that Adam applied inside the subspace. Its norm
/// grows by no more than `growth_limit` a step. After a gradient of zeros the limit is reset instead of freezing the matrix.
#[derive(Config, Debug, JsonSchema)]
pub struct FiraConfig {
    /// Rank of the projection; matrices with a smaller projected dimension use AdamW.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rank: usize,
    /// Steps between choices of the subspace.
    #[config(default = 200)]
    #[schemars(range(min = 1))]
    pub update_proj_gap: usize,
    /// Factor of the projected update.
    #[config(default = 0.25)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// Compute the residual as `G - P P^T G` (paper) instead of `G - scale P P^T G` (official code).
    #[config(default = false)]
    pub pure: bool,
    /// Scaling factors of a matrix.
    #[config(default = "Granularity::Channel")]
    pub granularity: Granularity,
    /// Greatest growth of the residual's norm from step to step; 0 for no limit.
    #[config(default = 1.01)]
    #[schemars(extend("anyOf" = [{ "const": 0 }, { "exclusiveMinimum": 1 }]))]
    pub growth_limit: f64,
    /// Projected side of a matrix.
    #[config(default = "Side::Std")]
    #[schemars(extend("enum" = ["std", "std_left", "reverse_std", "left", "right"]))]
    pub side: Side,
    /// Choice of the directions.
    #[config(default = "ProjectorKind::Svd")]
    #[schemars(extend("enum" = ["svd", "dct", "power", "random"]))]
    pub projector: ProjectorKind,
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

impl FiraConfig {
    /// Its components.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.0)
            .with_update_proj_gap(self.update_proj_gap)
            .with_scale(self.scale)
            .with_residual(if self.pure { Residual::ScaledPure } else { Residual::Scaled })
            .with_granularity(self.granularity)
            .with_growth_limit(self.growth_limit)
            .with_side(self.side)
            .with_projector(self.projector)
            .with_moments(self.moments)
            .with_seed(self.seed)
            .with_inner(Inner::AdamLegacy)
            .with_decay_after(true)
            .with_adam(self.adam)
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    FiraConfig,
    FiraConfig::new(128),
    Entry {
        papers: &[Paper {
            title: "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
            place: "2410.01623"
        }],
        memory: "2 n_max r + n_min r",
        needs: &["hidden matrices whose projected side is at least the rank"],
        ..Entry::plain(
            Kind::Optimizer,
            "fira",
            "GaLore whose residual moves the weights too, scaled as Adam scaled the projected gradient"
        )
    }
);

named!(FiraConfig);
