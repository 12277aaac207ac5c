//! Adam on gradients projected on their leading singular directions.

use burn::config::Config;

use crate::moments::MomentType;
use crate::projected::{Inner, ProjectedConfig, ProjectorKind, Side};

/// Configuration of GaLore: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (Zhao et al., arXiv 2403.03507), and of
/// Q-GaLore: "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients" (Zhang et al., arXiv 2407.08296).
///
/// Every `update_proj_gap` steps the leading singular directions of the gradient are taken on the smaller side; Adam runs on the projected
/// gradient. Moments keep their place when directions change. `scale` multiplies the learning rate of projected matrices alone.
#[derive(Config, Debug)]
pub struct GaLoreConfig {
    /// Directions, at least 1. A matrix whose projected side is smaller takes AdamW.
    pub rank: usize,
    /// Steps between decompositions, at least 1.
    #[config(default = 200)]
    pub update_proj_gap: usize,
    /// Factor of the projected update, greater than 0.
    #[config(default = 0.25)]
    pub scale: f64,
    /// Side that is projected.
    #[config(default = "Side::Std")]
    pub side: Side,
    /// How directions are chosen.
    #[config(default = "ProjectorKind::Svd")]
    pub projector: ProjectorKind,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Smallest low-rank matrix whose moments are stored in 8 bits, in values.
    #[config(default = 4096)]
    pub min_8bit_size: usize,
    /// Bits of the stored projector, 4 or 8; 0 stores it in f32.
    #[config(default = 0)]
    pub proj_bits: u32,
    /// Values of the stored projector that share a scale.
    #[config(default = 256)]
    pub proj_group: usize,
    /// Bits of the grid that weights are rounded to at random after each step; 0 for none.
    #[config(default = 0)]
    pub weight_bits: u32,
    /// Renewals whose mean cosine decides on a longer gap; 0 keeps the gap.
    #[config(default = 0)]
    pub lazy_queue: usize,
    /// Mean cosine of the first direction from which the gap grows.
    #[config(default = 0.4)]
    pub cos_threshold: f64,
    /// Factor by which the gap grows.
    #[config(default = 2)]
    pub gap_growth: usize,
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

impl GaLoreConfig {
    /// 8-bit GaLore: moments in 8-bit blocks.
    pub fn eight_bit(rank: usize) -> Self {
        Self::new(rank).with_moments(MomentType::EightBit).with_epsilon(1e-8)
    }

    /// Q-GaLore: moments in 8 bits, projector in 4, weights on a grid of 8 bits, and renewals that become rarer.
    pub fn quantised(rank: usize) -> Self {
        Self::eight_bit(rank).with_proj_bits(4).with_weight_bits(8).with_lazy_queue(5)
    }

    /// Its pieces.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.0)
            .with_update_proj_gap(self.update_proj_gap)
            .with_scale(self.scale)
            .with_side(self.side)
            .with_projector(self.projector)
            .with_moments(self.moments)
            .with_min_8bit_size(self.min_8bit_size)
            .with_proj_bits(self.proj_bits)
            .with_proj_group(self.proj_group)
            .with_weight_bits(self.weight_bits)
            .with_lazy_queue(self.lazy_queue)
            .with_cos_threshold(self.cos_threshold)
            .with_gap_growth(self.gap_growth)
            .with_seed(self.seed)
            .with_inner(Inner::AdamLegacy)
            .with_decay_after(true)
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
    }
}

crate::projected::named!(GaLoreConfig);
