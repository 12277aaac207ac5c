//! Adam on gradients projected on their leading singular directions.

use burn::config::Config;
use schemars::JsonSchema;

use crate::adam::AdamOptions;
use crate::projected::config::{Inner, ProjectedConfig, ProjectorKind, Side};
use crate::projected::named::named;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::state::moments::MomentType;

/// Configuration of GaLore: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (Zhao et al., arXiv 2403.03507), and of
/// Q-GaLore: "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients" (Zhang et al., arXiv 2407.08296).
///
/// Every `update_proj_gap` steps the leading singular directions of the gradient are taken on the smaller side; Adam runs on the projected
/// gradient. Moments keep their place when directions change. `scale` multiplies the learning rate of projected matrices alone.
#[derive(Config, Debug, JsonSchema)]
pub struct GaLoreConfig {
    /// Rank of the projection; matrices with a smaller projected dimension use AdamW.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rank: usize,
    /// Steps between decompositions.
    #[config(default = 200)]
    #[schemars(range(min = 1))]
    pub update_proj_gap: usize,
    /// Factor of the projected update.
    #[config(default = 0.25)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// Projected side of a matrix.
    #[config(default = "Side::Std")]
    pub side: Side,
    /// Choice of the directions.
    #[config(default = "ProjectorKind::Svd")]
    #[schemars(extend("enum" = ["svd", "dct", "power", "random"]))]
    pub projector: ProjectorKind,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Smallest low-rank matrix with 8-bit moments, in elements; smaller ones keep f32 moments.
    #[config(default = 4096)]
    pub min_8bit_size: usize,
    /// Bits of the stored projector; 0 for f32.
    #[config(default = 0)]
    #[schemars(extend("enum" = [0, 4, 8]))]
    pub proj_bits: u32,
    /// Elements of the stored projector that share a scale.
    #[config(default = 256)]
    #[schemars(range(min = 1))]
    pub proj_group: usize,
    /// Bits of the grid that weights are rounded to stochastically after each step; 0 for none.
    #[config(default = 0)]
    #[schemars(extend("enum" = [0, 4, 8]))]
    pub weight_bits: u32,
    /// Renewals whose mean cosine similarity decides on a longer gap; 0 keeps the gap.
    #[config(default = 0)]
    #[schemars(range(max = 1_000_000))]
    pub lazy_queue: usize,
    /// Mean cosine similarity of the first direction from which the gap grows.
    #[config(default = 0.4)]
    #[schemars(range(min = -1.0, max = 1.0))]
    pub cos_threshold: f64,
    /// Factor by which the gap grows.
    #[config(default = 2)]
    #[schemars(range(min = 1, max = 1000))]
    pub gap_growth: usize,
    /// Seed of random subspaces.
    #[config(default = 0)]
    pub seed: u64,
    /// Options of Adam.
    #[config(default = "AdamOptions::new().with_epsilon(1e-6)")]
    pub adam: AdamOptions,
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

    /// Its components.
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
            .with_adam(self.adam)
    }
}

/// Registry entry.
pub(crate) const GALORE: Method = method!(
    GaLoreConfig,
    GaLoreConfig::new(128),
    Entry {
        papers: &[Paper {
            title: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
            place: "2403.03507"
        }],
        memory: "2 n_max r + n_min r",
        needs: &["hidden matrices whose projected side is at least the rank"],
        ..Entry::plain(Kind::Optimizer, "galore", "Adam on the leading singular directions of the gradient")
    }
);

/// Registry entry.
pub(crate) const GALORE_8BIT: Method = Method {
    saves_state_of: Some("galore"),
    ..method!(
        GaLoreConfig,
        GaLoreConfig::eight_bit(128),
        Entry {
            papers: &[Paper {
                title: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
                place: "2403.03507"
            }],
            memory: "2 n_max r bytes + n_min r",
            needs: &["hidden matrices whose projected side is at least the rank"],
            ..Entry::plain(Kind::Optimizer, "galore-8bit", "GaLore with 8-bit moments")
        }
    )
};

/// Registry entry.
pub(crate) const Q_GALORE: Method = method!(
    GaLoreConfig,
    GaLoreConfig::quantised(128),
    Entry {
        papers: &[Paper {
            title: "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
            place: "2407.08296"
        }],
        memory: "2 n_max r bytes + n_min r / 2 bytes",
        needs: &["hidden matrices whose projected side is at least the rank"],
        ..Entry::plain(
            Kind::Optimizer,
            "q-galore",
            "GaLore with 8-bit moments, a 4-bit projector, weights on an 8-bit grid and rarer renewals"
        )
    }
);

named!(GaLoreConfig);
