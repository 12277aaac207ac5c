//! AdamW in a subspace of columns of the discrete cosine transform.

use burn::config::Config;
use lowrank_kernels::dct::DctBasis;
use serde::{Deserialize, Serialize};

use crate::moments::MomentType;
use crate::projected::{Norm, ProjectedConfig, ProjectorKind, RenewAt, Rest, Side, States};

/// What becomes of the part of the gradient that the projection leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feedback {
    /// It is dropped.
    None,
    /// It is added to the next gradient, kept in f32.
    Full,
    /// It is added to the next gradient, kept in codes of `error_levels` steps.
    Quantised,
}

/// How coefficients are computed; speed alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Config, Debug)]
pub struct DctAdamWConfig {
    /// Basis vectors that are kept, at least 1. A matrix whose projected side is smaller takes AdamW.
    pub rank: usize,
    /// Steps between choices of basis vectors, at least 1: at steps 1, gap, 2 gap and so on.
    #[config(default = 1)]
    pub update_proj_gap: usize,
    /// Side that is projected.
    #[config(default = "Side::Std")]
    pub side: Side,
    /// Size of a side that is projected whatever `side` says, so that one basis serves all matrices; 0 for none.
    #[config(default = 0)]
    pub shared_dim: usize,
    /// The basis: that of the DCT-III, of the DCT-II, or a random one.
    #[config(default = "DctBasis::Dct3")]
    pub basis: DctBasis,
    /// How coefficients are computed; speed alone.
    #[config(default = "Transform::Fft")]
    pub transform: Transform,
    /// Score of a basis vector.
    #[config(default = "Norm::L1")]
    pub norm: Norm,
    /// Whether scores are multiplied with the norm of the basis vector.
    #[config(default = false)]
    pub weighted: bool,
    /// Whether moments move with their basis vectors when others are chosen.
    #[config(default = true)]
    pub rotate: bool,
    /// What becomes of the part that the projection leaves out.
    #[config(default = "Feedback::Quantised")]
    pub error_feedback: Feedback,
    /// Steps of the kept part's quantisation, 1 to 255; up to 15 a value takes half a byte.
    #[config(default = 255)]
    pub error_levels: u8,
    /// Learning rate of projected matrices as a multiple of that of everything else, 0 or greater.
    #[config(default = 1.0)]
    pub proj_lr_scale: f64,
    /// Matrices with a side of this size or more take AdamW.
    #[config(default = 32_000)]
    pub max_shape: usize,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
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

impl DctAdamWConfig {
    /// Its pieces.
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
            .with_states(if self.rotate { States::Rotate } else { States::Keep })
            .with_rest(match self.error_feedback {
                Feedback::None => Rest::None,
                Feedback::Full => Rest::Full,
                Feedback::Quantised => Rest::Quantised,
            })
            .with_error_levels(self.error_levels)
            .with_max_shape(self.max_shape)
            .with_proj_lr_scale(self.proj_lr_scale)
            .with_moments(self.moments)
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
    }
}

crate::projected::named!(DctAdamWConfig);
