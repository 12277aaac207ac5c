//! AdamW in a subspace of columns of the discrete cosine transform.

use burn::config::Config;
use lowrank_kernels::dct::DctBasis;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adam::AdamOptions;
use crate::projected::config::{Norm, OnRenewal, ProjectedConfig, ProjectorKind, RenewAt, Side};
use crate::projected::named::named;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::state::error_feedback::ErrorFeedback;
use crate::state::moments::MomentType;

/// Computation of the coefficients; affects speed only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Transform {
    /// By a product with the basis.
    Matmul,
    /// By a fast Fourier transform.
    Fft,
}

/// Configuration of DCT-AdamW: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models" (Modoranu et
/// al., arXiv 2505.17967).
///
/// The moments of a matrix live in the span of the columns of one orthonormal DCT matrix that carry most of its gradient; only their indices are
/// stored. On the CPU backend with `transform = fft` and f32 moments the whole step takes two passes over memory.
#[derive(Config, Debug, JsonSchema)]
pub struct DctAdamWConfig {
    /// Rank of the projection; matrices with a smaller projected dimension use AdamW.
    #[schemars(range(min = 1, max = 1_000_000), extend("x-required" = true))]
    pub rank: usize,
    /// Steps between choices of the basis vectors.
    #[config(default = 1)]
    #[schemars(range(min = 1))]
    pub update_proj_gap: usize,
    /// Projected side of a matrix.
    #[config(default = "Side::Std")]
    #[schemars(extend("enum" = ["std", "std_left", "reverse_std", "left", "right"]))]
    pub side: Side,
    /// Size of a side that is projected whatever `side` says, so that one basis serves all matrices; 0 for none.
    #[config(default = 0)]
    pub shared_dim: usize,
    /// Orthonormal basis.
    #[config(default = "DctBasis::Dct3")]
    pub basis: DctBasis,
    /// Computation of the coefficients; affects speed only.
    #[config(default = "Transform::Fft")]
    pub transform: Transform,
    /// Score of a basis vector.
    #[config(default = "Norm::L1")]
    pub norm: Norm,
    /// Multiply scores by the norm of the basis vector.
    #[config(default = false)]
    pub weighted: bool,
    /// Rotate the moments into the new subspace.
    #[config(default = true)]
    pub rotate: bool,
    /// Treatment of the residual that the projection leaves out.
    #[config(default = "ErrorFeedback::Quantised")]
    pub error_feedback: ErrorFeedback,
    /// Quantisation levels of the stored residual; up to 15, an element takes half a byte.
    #[config(default = 255)]
    #[schemars(range(min = 1))]
    pub error_levels: u8,
    /// Learning rate of projected matrices as a multiple of that of all other parameters.
    #[config(default = 1.0)]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub proj_lr_scale: f64,
    /// Matrices with a side of this size or more use AdamW.
    #[config(default = 32_000)]
    #[schemars(range(min = 1))]
    pub max_shape: usize,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Options of Adam.
    #[config(default = "AdamOptions::new()")]
    pub adam: AdamOptions,
}

impl DctAdamWConfig {
    /// Its components.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(0.0)
            .with_update_proj_gap(self.update_proj_gap)
            .with_renew_at(RenewAt::Multiples)
            .with_side(self.side)
            .with_shared_dim(self.shared_dim)
            .with_projector(ProjectorKind::Dct)
            .with_basis(self.basis)
            .with_fft(self.transform == Transform::Fft && self.basis != DctBasis::Random)
            .with_norm(self.norm)
            .with_weighted(self.weighted)
            .with_on_renewal(if self.rotate { OnRenewal::Rotate } else { OnRenewal::Keep })
            .with_residual(self.error_feedback.into())
            .with_error_levels(self.error_levels)
            .with_max_shape(self.max_shape)
            .with_proj_lr_scale(self.proj_lr_scale)
            .with_moments(self.moments)
            .with_adam(self.adam)
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    DctAdamWConfig,
    DctAdamWConfig::new(0),
    Entry {
        papers: &[Paper {
            title: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
            place: "2505.17967"
        }],
        memory: "2 n_max r + r indices + residual (RC bytes)",
        needs: &["hidden matrices whose projected side is at least the rank"],
        ..Entry::plain(Kind::Optimizer, "dct-adamw", "AdamW on the DCT coefficients that carry most of the gradient")
    }
);

named!(DctAdamWConfig);
