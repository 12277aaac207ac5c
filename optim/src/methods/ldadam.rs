//! Adam in a subspace that moves a little at every step.

use burn::config::Config;
use schemars::JsonSchema;

use crate::adam::AdamOptions;
use crate::projected::config::{OnRenewal, ProjectFrom, ProjectedConfig, ProjectorKind, Residual, Side};
use crate::projected::named::named;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::state::moments::MomentType;

/// Configuration of LDAdam: "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics" (Robert et al., arXiv 2410.16103).
///
/// The subspace follows a mix of momentum and gradient by one step of power iteration; moments move into it, the second as variance and squared
/// mean; what the projection leaves out and what the move loses comes back with the next gradient. The error has a buffer of its own, so that
/// gradients may be clipped and freed as ever.
#[derive(Config, Debug, JsonSchema)]
pub struct LdAdamConfig {
    /// Rank of the projection; matrices with a smaller projected dimension use AdamW.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rank: usize,
    /// Share of the momentum in the mix that the subspace follows (the paper's rho).
    #[config(default = 0.908)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub rho: f64,
    /// Choice of the subspace.
    #[config(default = "ProjectorKind::Power")]
    #[schemars(extend("enum" = ["power", "svd", "dct"]))]
    pub projector: ProjectorKind,
    /// Learning rate of projected matrices as a multiple of that of all other parameters.
    #[config(default = 1.0)]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub proj_lr_scale: f64,
    /// Add what the projection loses to the next gradient.
    #[config(default = true)]
    pub error_feedback: bool,
    /// Projected side of a matrix.
    #[config(default = "Side::StdLeft")]
    #[schemars(extend("enum" = ["std", "std_left", "reverse_std", "left", "right"]))]
    pub side: Side,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Options of Adam.
    #[config(default = "AdamOptions::new().with_beta_1(0.908).with_beta_2(0.99)")]
    pub adam: AdamOptions,
}

impl LdAdamConfig {
    /// Its components.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.0)
            .with_update_proj_gap(1)
            .with_project_from(ProjectFrom::Momentum)
            .with_rho(self.rho)
            .with_proj_lr_scale(self.proj_lr_scale)
            .with_projector(self.projector)
            .with_on_renewal(OnRenewal::Transport)
            .with_residual(if self.error_feedback { Residual::Full } else { Residual::None })
            .with_error_of_momentum(self.error_feedback)
            .with_side(self.side)
            .with_moments(self.moments)
            .with_adam(self.adam)
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    LdAdamConfig,
    LdAdamConfig::new(16),
    Entry {
        papers: &[Paper {
            title: "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
            place: "2410.16103"
        }],
        memory: "2 n_max r + n_min r + residual (RC)",
        needs: &["hidden matrices whose projected side is at least the rank"],
        ..Entry::plain(Kind::Optimizer, "ldadam", "Adam in a subspace that follows momentum and gradient at every step")
    }
);

named!(LdAdamConfig);
