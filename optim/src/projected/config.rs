//! Pieces of a projected optimizer, and their stored state.

use burn::config::Config;
use lowrank_kernels::dct::DctBasis;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adam::{AdamOptions, adam_builders};
use crate::methods::adamw::AdamWConfig;
use crate::state::error_feedback::ErrorFeedback;
use crate::state::moments::{MomentType, Storage};
use crate::state::quantised::QuantisedMatrix;

macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$help:meta])* $word:ident),* $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$help])* $word),* }
    };
}

words! {
    /// Projected side of a matrix.
    Side {
        /// The smaller dimension; of a square matrix the columns.
        Std,
        /// The smaller dimension; of a square matrix the rows.
        StdLeft,
        /// The larger dimension; of a square matrix the rows.
        ReverseStd,
        /// The rows.
        Left,
        /// The columns.
        Right,
        /// Both.
        Full,
    }
}

words! {
    /// Score of a row or column of the transformed gradient.
    Norm {
        /// Sum of absolute values.
        L1,
        /// Root of the sum of squares; keeps the most energy.
        L2,
    }
}

words! {
    /// Choice of the subspace.
    ProjectorKind {
        /// Leading singular directions of the gradient.
        Svd,
        /// Columns of the discrete cosine transform.
        Dct,
        /// One step of block power iteration.
        Power,
        /// Random orthonormal directions.
        Random,
        /// Random normal directions, not orthonormal and not stored.
        Gaussian,
        /// Random columns of the matrix, whatever the side.
        Columns,
        /// Random rows of the matrix, whatever the side.
        Rows,
        /// Random rows or columns, by the side.
        Randperm,
        /// Random single values.
        Randk,
        /// Whole matrices in turn.
        Block,
    }
}

words! {
    /// In which order matrices are active.
    BlockOrder {
        /// From the last to the first.
        Descending,
        /// From the first to the last.
        Ascending,
        /// Random.
        Random,
        /// From both ends to the middle.
        Mirror,
    }
}

words! {
    /// Steps at which the subspace is renewed, for a gap T and steps counted from 1.
    RenewAt {
        /// Steps 1, T + 1, 2 T + 1 and so on.
        Completed,
        /// Steps 1, T, 2 T and so on.
        Multiples,
    }
}

words! {
    /// Matrix that the projector is computed from.
    ProjectFrom {
        /// The gradient.
        Gradient,
        /// A mix of the gradient and the momentum.
        Momentum,
    }
}

words! {
    /// Treatment of moments when the subspace is renewed.
    OnRenewal {
        /// They stay in their place.
        Keep,
        /// They start at 0, and so does the correction of their bias.
        Reset,
        /// They move with the vectors of the subspace.
        Rotate,
        /// They move, the second moment as variance and squared mean.
        Transport,
    }
}

words! {
    /// Optimizer inside the subspace.
    Inner {
        /// Adam: bias is corrected before epsilon is added.
        Adam,
        /// Adam whose epsilon is added to the uncorrected root.
        AdamLegacy,
        /// Sign of a moving average.
        Lion,
        /// Momentum.
        Momentum,
    }
}

words! {
    /// Treatment of the residual, the part of the gradient outside the subspace.
    Residual {
        /// It is dropped.
        None,
        /// It is added to the next gradient, kept in f32.
        Full,
        /// It is added to the next gradient, kept in codes.
        Quantised,
        /// Its sign moves the weights.
        Sign,
        /// It moves the weights.
        Sgd,
        /// It moves the weights, scaled as Adam scaled the inside; the inside counts as `scale` times itself.
        Scaled,
        /// It moves the weights, scaled as Adam scaled the inside.
        ScaledPure,
        /// The whole gradient moves the weights, scaled as Adam scaled the inside; the inside moves nothing itself.
        Gradient,
    }
}

impl Residual {
    /// Error feedback, if the residual is kept for the next gradient.
    pub fn feedback(self) -> ErrorFeedback {
        match self {
            Self::Full => ErrorFeedback::Full,
            Self::Quantised => ErrorFeedback::Quantised,
            _ => ErrorFeedback::None,
        }
    }
}

impl From<ErrorFeedback> for Residual {
    fn from(feedback: ErrorFeedback) -> Self {
        match feedback {
            ErrorFeedback::None => Self::None,
            ErrorFeedback::Full => Self::Full,
            ErrorFeedback::Quantised => Self::Quantised,
        }
    }
}

words! {
    /// Scaling factors of a matrix.
    Granularity {
        /// One a row on the right, one a column on the left.
        Channel,
        /// One.
        Matrix,
    }
}

/// Configuration of a projected optimizer, piece by piece. The published methods are choices of these: see
/// [`GaLoreConfig`](crate::GaLoreConfig) and the others.
#[derive(Config, Debug, JsonSchema)]
pub struct ProjectedConfig {
    /// Vectors of the subspace; 0 takes `density`.
    #[schemars(range(max = 1_000_000))]
    pub rank: usize,
    /// Share of the projected side, of the values or of the matrices, where the rank is 0.
    #[config(default = 0.25)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub density: f64,
    /// Side that is projected.
    #[config(default = "Side::Std")]
    pub side: Side,
    /// Size of a side that is projected whatever `side` says, so that one basis serves all matrices; 0 for none.
    #[config(default = 0)]
    pub shared_dim: usize,
    /// Choice of the subspace.
    #[config(default = "ProjectorKind::Svd")]
    pub projector: ProjectorKind,
    /// Basis of the DCT projector.
    #[config(default = "DctBasis::Dct3")]
    pub basis: DctBasis,
    /// Compute DCT coefficients by a fast Fourier transform instead of a matrix product; affects speed only.
    #[config(default = true)]
    pub fft: bool,
    /// Score of a DCT basis vector.
    #[config(default = "Norm::L1")]
    pub norm: Norm,
    /// Multiply scores by the norm of the basis vector.
    #[config(default = false)]
    pub weighted: bool,
    /// Order of active matrices of the block projector.
    #[config(default = "BlockOrder::Descending")]
    pub block_order: BlockOrder,
    /// Seed of random subspaces.
    #[config(default = 0)]
    pub seed: u64,
    /// Steps between renewals, at least 1.
    #[config(default = 200)]
    #[schemars(range(min = 1))]
    pub update_proj_gap: usize,
    /// At which steps the subspace is renewed.
    #[config(default = "RenewAt::Completed")]
    pub renew_at: RenewAt,
    /// Matrix that the projector is computed from.
    #[config(default = "ProjectFrom::Gradient")]
    pub project_from: ProjectFrom,
    /// Share of the momentum in the mix that the projector looks at.
    #[config(default = 0.908)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub rho: f64,
    /// Treatment of moments at a renewal.
    #[config(default = "OnRenewal::Keep")]
    pub on_renewal: OnRenewal,
    /// Optimizer inside the subspace.
    #[config(default = "Inner::Adam")]
    pub inner: Inner,
    /// Factor of the update inside the subspace; of `Residual::Gradient` its root is the factor.
    #[config(default = 1.0)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// Treatment of the residual.
    #[config(default = "Residual::None")]
    pub residual: Residual,
    /// Steps of the kept rest's quantisation, 1 to 255; up to 15 a value takes half a byte.
    #[config(default = 255)]
    #[schemars(range(min = 1))]
    pub error_levels: u8,
    /// Keep momentum that a renewal loses in the residual as well.
    #[config(default = false)]
    pub error_of_momentum: bool,
    /// Learning rate outside the subspace as a multiple of that inside.
    #[config(default = 1.0)]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub inactive_lr_scale: f64,
    /// Learning rate of projected matrices as a multiple of the learning rate.
    #[config(default = 1.0)]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub proj_lr_scale: f64,
    /// Scaling factors of a matrix.
    #[config(default = "Granularity::Channel")]
    pub granularity: Granularity,
    /// Greatest growth of the scaled part's norm from step to step; 0 for no limit.
    #[config(default = 1.01)]
    #[schemars(extend("anyOf" = [{ "const": 0 }, { "exclusiveMinimum": 1 }]))]
    pub growth_limit: f64,
    /// Apply `scale` of `Residual::Gradient` before the growth limit.
    #[config(default = false)]
    pub scale_front: bool,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Smallest tensor whose moments are stored in 8 bits, in values.
    #[config(default = 4096)]
    pub min_8bit_size: usize,
    /// Bits of the stored projector, 4 or 8; 0 stores it in f32.
    #[config(default = 0)]
    #[schemars(extend("enum" = [0, 4, 8]))]
    pub proj_bits: u32,
    /// Values of the stored projector that share a scale.
    #[config(default = 256)]
    #[schemars(range(min = 1))]
    pub proj_group: usize,
    /// Bits of the grid that weights are rounded to at random after each step, 4 or 8; 0 for none.
    #[config(default = 0)]
    #[schemars(extend("enum" = [0, 4, 8]))]
    pub weight_bits: u32,
    /// Values of the weight that share a scale.
    #[config(default = 256)]
    #[schemars(range(min = 1))]
    pub weight_group: usize,
    /// Renewals whose mean cosine decides on a longer gap; 0 keeps the gap.
    #[config(default = 0)]
    #[schemars(range(max = 1_000_000))]
    pub lazy_queue: usize,
    /// Mean cosine of the first direction from which the gap grows.
    #[config(default = 0.4)]
    #[schemars(range(min = -1.0, max = 1.0))]
    pub cos_threshold: f64,
    /// Factor by which the gap grows.
    #[config(default = 2)]
    #[schemars(range(min = 1, max = 1000))]
    pub gap_growth: usize,
    /// Options of Adam.
    #[config(default = "AdamOptions::new()")]
    pub adam: AdamOptions,
    /// Decay weights after the update instead of before.
    #[config(default = false)]
    pub decay_after: bool,
    /// Matrices with a side of this size or more use plain AdamW.
    #[config(default = 32_000)]
    #[schemars(range(min = 1))]
    pub max_shape: usize,
}

adam_builders!(ProjectedConfig);

impl ProjectedConfig {
    /// AdamW of the same kind, for parameters that are not projected.
    pub fn others(&self) -> AdamWConfig {
        AdamWConfig::new()
            .with_adam(self.adam)
            .with_legacy_epsilon(self.inner == Inner::AdamLegacy)
            .with_decay_after(self.decay_after)
    }

    /// The side of a matrix that is projected, true for the right: `G P`.
    pub fn right(&self, [rows, columns]: [usize; 2]) -> bool {
        match (self.projector, self.side) {
            (ProjectorKind::Columns, _) => true,
            (ProjectorKind::Rows, _) => false,
            _ if self.shared_dim > 0 && columns == self.shared_dim => true,
            _ if self.shared_dim > 0 && rows == self.shared_dim => false,
            (_, Side::Std | Side::Full) => rows >= columns,
            (_, Side::StdLeft) => rows > columns,
            (_, Side::ReverseStd) => rows < columns,
            (_, Side::Left) => false,
            (_, Side::Right) => true,
        }
    }

    /// Number of vectors or elements of the subspace of a matrix.
    pub fn rank_of(&self, shape @ [rows, columns]: [usize; 2]) -> usize {
        let side = if self.right(shape) { columns } else { rows };
        match self.projector {
            _ if self.rank > 0 => self.rank,
            ProjectorKind::Columns | ProjectorKind::Rows => (self.density * side as f64) as usize,
            ProjectorKind::Randk => (self.density * (rows * columns) as f64) as usize,
            ProjectorKind::Block => 0,
            // APOLLO's quarter and FRUGAL's share round to nearest; a requested subspace has at least one vector.
            _ if self.density > 0.0 => ((self.density * side as f64).round() as usize).max(1),
            _ => 0,
        }
    }

    /// Reports whether a matrix of this shape is projected; others use plain AdamW.
    pub fn projects(&self, shape @ [rows, columns]: [usize; 2]) -> bool {
        let side = match (self.side, self.right(shape)) {
            (Side::Full, _) => rows.min(columns),
            (_, true) => columns,
            (_, false) => rows,
        };
        self.rank <= side && rows.max(columns) < self.max_shape
    }

    /// Bytes of state for a matrix of this shape; of a block projector while it is active.
    pub fn state_bytes(&self, shape @ [rows, columns]: [usize; 2]) -> usize {
        if !self.projects(shape) {
            return 8 * rows * columns;
        }
        let (rank, right) = (self.rank_of(shape), self.right(shape));
        let (side, long) = if right { (columns, rows) } else { (rows, columns) };
        let low = match (self.projector, self.side) {
            (ProjectorKind::Block, _) => rows * columns,
            (ProjectorKind::Randk, _) => rank,
            (_, Side::Full) => rank * rank,
            _ => long * rank,
        };
        let subspace = match (self.projector, self.side) {
            _ if rank == 0 => 0,
            (_, Side::Full) => 4 * (rows + columns) * rank,
            _ if self.proj_bits > 0 => QuantisedMatrix::bytes(side * rank, self.proj_bits, self.proj_group),
            (ProjectorKind::Svd | ProjectorKind::Power | ProjectorKind::Random, _) => 4 * side * rank,
            (ProjectorKind::Gaussian | ProjectorKind::Block, _) => 0,
            _ => 4 * rank,
        };
        let rest = match self.residual {
            Residual::Full => 4 * rows * columns,
            Residual::Quantised if self.error_levels <= 15 => rows * columns.div_ceil(2) + 8 * rows,
            Residual::Quantised => rows * columns + 8 * rows,
            _ => 0,
        };
        let moments = if matches!(self.inner, Inner::Adam | Inner::AdamLegacy) { 2 } else { 1 };
        moments * self.storage().bytes(low) + subspace + rest
    }

    /// Share of the hidden matrices that have their state at a time.
    pub fn active_share(&self) -> f64 {
        let block = self.projector == ProjectorKind::Block && self.on_renewal == OnRenewal::Reset;
        if block { self.density } else { 1.0 }
    }

    pub(super) fn storage(&self) -> Storage {
        Storage { min_size: self.min_8bit_size, ..self.moments.into() }
    }

    /// Reports whether the subspace is renewed at the step after `done` steps.
    pub(super) fn renews(&self, done: usize, gap: usize) -> bool {
        match self.renew_at {
            RenewAt::Completed => done.is_multiple_of(gap),
            RenewAt::Multiples => (done + 1).is_multiple_of(gap),
        }
    }
}
