//! Adam in a subspace that moves a little at every step.

use burn::config::Config;

use crate::moments::MomentType;
use crate::projected::{ProjectedConfig, ProjectorKind, Rest, Side, States, Target};

/// Configuration of LDAdam: "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics" (Robert et al., arXiv 2410.16103).
///
/// The subspace follows a mix of momentum and gradient by one step of power iteration; moments move into it, the second as variance and squared
/// mean; what the projection leaves out and what the move loses comes back with the next gradient. The error has a buffer of its own, so that
/// gradients may be clipped and freed as ever.
#[derive(Config, Debug)]
pub struct LdAdamConfig {
    /// Directions, at least 1. A matrix whose projected side is smaller takes AdamW.
    pub rank: usize,
    /// Share of the momentum in what the subspace follows, from 0 to below 1.
    #[config(default = 0.908)]
    pub rho: f64,
    /// How the subspace follows: power, svd or dct.
    #[config(default = "ProjectorKind::Power")]
    pub projector: ProjectorKind,
    /// Learning rate of projected matrices as a multiple of that of everything else, 0 or greater.
    #[config(default = 1.0)]
    pub proj_lr_scale: f64,
    /// Whether what is lost comes back with the next gradient.
    #[config(default = true)]
    pub error_feedback: bool,
    /// Side that is projected.
    #[config(default = "Side::StdLeft")]
    pub side: Side,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Decay of the first moment, from 0 to below 1.
    #[config(default = 0.908)]
    pub beta_1: f64,
    /// Decay of the second moment, from 0 to below 1.
    #[config(default = 0.99)]
    pub beta_2: f64,
    /// Added to the root of the second moment, greater than 0.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// Decoupled weight decay, 0 or greater.
    #[config(default = 0.0)]
    pub weight_decay: f64,
}

impl LdAdamConfig {
    /// Its pieces.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.0)
            .with_update_proj_gap(1)
            .with_target(Target::Momentum)
            .with_rho(self.rho)
            .with_proj_lr_scale(self.proj_lr_scale)
            .with_projector(self.projector)
            .with_states(States::Transport)
            .with_rest(if self.error_feedback { Rest::Full } else { Rest::None })
            .with_error_of_momentum(self.error_feedback)
            .with_side(self.side)
            .with_moments(self.moments)
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
    }
}

crate::projected::named!(LdAdamConfig);
