//! What a projected optimizer is made of, what goes together and what it stores.

use std::sync::Arc;

use burn::config::Config;
use burn::optim::ModuleOptimizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Projected;
use crate::adam::{AdamOptions, adam_builders};
use crate::moments::{MomentType, Storage};
use crate::projector::{
    Blocks, DctColumns, Gaussian, PowerIteration, Projector, RandomCoordinates, RandomEntries, RandomOrthonormal,
    Rounded, Svd, TwoSidedSvd,
};
use crate::quantised::QuantisedMatrix;
use crate::{AdamWConfig, ByMatrix, OptimError, check, registry};
use lowrank_kernels::dct::DctBasis;

macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$help:meta])* $word:ident),* $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$help])* $word),* }
    };
}

words! {
    /// Which side of a matrix is projected.
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
    /// How a row or column of the transformed gradient is scored.
    Norm {
        /// Sum of absolute values.
        L1,
        /// Root of the sum of squares; keeps the most energy.
        L2,
    }
}

words! {
    /// How the subspace is chosen.
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
        /// By lot.
        Random,
        /// From both ends to the middle.
        Mirror,
    }
}

words! {
    /// When the subspace is renewed, for a gap T and steps counted from 1.
    RenewAt {
        /// Steps 1, T + 1, 2 T + 1 and so on.
        Completed,
        /// Steps 1, T, 2 T and so on.
        Multiples,
    }
}

words! {
    /// What the projector looks at.
    Target {
        /// The gradient.
        Gradient,
        /// A mix of the gradient and the momentum.
        Momentum,
    }
}

words! {
    /// What happens to moments when the subspace is renewed.
    States {
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
    /// What works inside the subspace.
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
    /// What happens to the part of the gradient outside the subspace.
    Rest {
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

words! {
    /// How many factors a matrix is scaled with.
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
    /// How the subspace is chosen.
    #[config(default = "ProjectorKind::Svd")]
    pub projector: ProjectorKind,
    /// Basis of the DCT projector.
    #[config(default = "DctBasis::Dct3")]
    pub basis: DctBasis,
    /// Whether DCT coefficients come from a fast Fourier transform rather than a matrix product; speed alone.
    #[config(default = true)]
    pub fft: bool,
    /// Score of a DCT basis vector.
    #[config(default = "Norm::L1")]
    pub norm: Norm,
    /// Whether scores are multiplied with the norm of the basis vector.
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
    /// What the projector looks at.
    #[config(default = "Target::Gradient")]
    pub target: Target,
    /// Share of the momentum in the mix that the projector looks at.
    #[config(default = 0.908)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub rho: f64,
    /// What happens to moments at a renewal.
    #[config(default = "States::Keep")]
    pub states: States,
    /// What works inside the subspace.
    #[config(default = "Inner::Adam")]
    pub inner: Inner,
    /// Factor of the update inside the subspace; of `Rest::Gradient` its root is the factor.
    #[config(default = 1.0)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// What happens outside the subspace.
    #[config(default = "Rest::None")]
    pub rest: Rest,
    /// Steps of the kept rest's quantisation, 1 to 255; up to 15 a value takes half a byte.
    #[config(default = 255)]
    #[schemars(range(min = 1))]
    pub error_levels: u8,
    /// Whether momentum that a renewal loses is kept in the rest too.
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
    /// How many scaling factors a matrix has.
    #[config(default = "Granularity::Channel")]
    pub granularity: Granularity,
    /// Greatest growth of the scaled part's norm from step to step; 0 for no limit.
    #[config(default = 1.01)]
    #[schemars(extend("anyOf" = [{ "const": 0 }, { "exclusiveMinimum": 1 }]))]
    pub growth_limit: f64,
    /// Whether `scale` of `Rest::Gradient` acts before the limit of growth.
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
    /// Whether weights decay after the update rather than before.
    #[config(default = false)]
    pub decay_after: bool,
    /// Matrices with a side of this size or more take plain AdamW.
    #[config(default = 32_000)]
    #[schemars(range(min = 1))]
    pub max_shape: usize,
}

adam_builders!(ProjectedConfig);

impl ProjectedConfig {
    /// Refuses values outside what the options allow and pieces that do not go together.
    pub fn validate(&self) -> Result<(), OptimError> {
        use ProjectorKind::{Block, Columns, Dct, Gaussian, Power, Randk, Randperm, Rows, Svd};
        fn refuse(option: &'static str, value: impl ToString, reason: &str) -> Result<(), OptimError> {
            check::refused(option, value, reason)
        }
        registry::validate(self)?;
        let by_vectors = matches!(self.projector, Svd | Dct | Power | ProjectorKind::Random | Gaussian);
        if self.rank == 0 && self.density == 0.0 && !matches!(self.rest, Rest::Sign | Rest::Sgd) {
            return refuse("rank", 0, "it must be at least 1, or density above 0: nothing would move");
        }
        if self.rank == 0 && matches!(self.projector, Power) {
            return refuse("rank", 0, "it must be at least 1");
        }
        if self.rank > 0 && matches!(self.projector, Columns | Rows | Randk | Block) {
            return refuse("rank", self.rank, "this projector takes a density, not a rank");
        }
        if self.projector == Dct && self.fft && self.basis == DctBasis::Random {
            return refuse("fft", true, "a random basis has no fast transform; take matmul");
        }
        if self.side == Side::Full && self.projector != Svd {
            return refuse("side", "full", "only singular directions are defined on both sides; take projector = svd");
        }
        if self.side == Side::Full && self.shared_dim > 0 {
            return refuse("shared_dim", self.shared_dim, "with side = full both sides are projected");
        }
        if matches!(self.states, States::Rotate | States::Transport) {
            let how = if self.states == States::Rotate { "rotate" } else { "transport" };
            if self.side == Side::Full || matches!(self.projector, Gaussian | Block | Randk) {
                return refuse("states", how, "moments move only between orthonormal vectors of one side");
            }
            if self.states == States::Transport && self.inner != Inner::Adam {
                return refuse("states", how, "it is defined for the moments of inner = adam");
            }
        }
        if self.projector == Block && self.states != States::Reset {
            return refuse(
                "states",
                "keep",
                "with projector = block a matrix without a turn has no moments; take reset",
            );
        }
        if self.projector == Gaussian && self.rest != Rest::Gradient {
            return refuse(
                "projector",
                "gaussian",
                "its directions are not orthonormal, so that nothing can be projected back; take random, or rest = gradient",
            );
        }
        let scaled = matches!(self.rest, Rest::Scaled | Rest::ScaledPure | Rest::Gradient);
        if scaled && (self.side == Side::Full || matches!(self.projector, Randk | Block)) {
            return refuse("rest", "scaled", "scaling by channel needs a projection of one side");
        }
        if self.projector == Block && matches!(self.rest, Rest::Full | Rest::Quantised) {
            return refuse("rest", "full", "with projector = block a matrix is whole or not there at all");
        }
        if self.rest == Rest::Sign
            && self.rank == 0
            && self.density == 1.0
            && (by_vectors || self.projector == Randperm)
        {
            return refuse("density", 1, "nothing but rounding is left outside, and its sign would move the weights");
        }
        if self.proj_bits > 0 && !matches!(self.projector, Svd | Power | ProjectorKind::Random) {
            return refuse("proj_bits", self.proj_bits, "this projector stores no directions");
        }
        if self.lazy_queue > 0 && (self.projector != Svd || self.side == Side::Full) {
            return refuse("lazy_queue", self.lazy_queue, "the first direction is that of projector = svd on one side");
        }
        if self.error_of_momentum && !matches!(self.rest, Rest::Full | Rest::Quantised) {
            return refuse("error_of_momentum", true, "it needs rest = full or quantised to be kept in");
        }
        Ok(())
    }

    /// The bare optimizer, for [`ModuleOptimizer::with_group`], or why the configuration is refused.
    pub fn try_build(&self) -> Result<ByMatrix<Projected>, OptimError> {
        self.validate()?;
        let others = self.others().build();
        Ok(ByMatrix::new(Projected::new(self.clone(), self.boxed()), others))
    }

    /// The bare optimizer, for [`ModuleOptimizer::with_group`].
    ///
    /// # Panics
    ///
    /// When [`ProjectedConfig::validate`] refuses the configuration.
    pub fn build(&self) -> ByMatrix<Projected> {
        match self.try_build() {
            Ok(optimizer) => optimizer,
            Err(error) => panic!("{error}"),
        }
    }

    /// The optimizer of a whole module.
    ///
    /// # Panics
    ///
    /// When [`ProjectedConfig::validate`] refuses the configuration.
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }

    /// With a projector of your own instead of the configured one.
    pub fn build_with(&self, projector: impl Projector + 'static) -> Result<ByMatrix<Projected>, OptimError> {
        self.validate()?;
        Ok(ByMatrix::new(Projected::new(self.clone(), Arc::new(projector)), self.others().build()))
    }

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

    /// Vectors or values of the subspace of a matrix.
    pub fn rank_of(&self, shape @ [rows, columns]: [usize; 2]) -> usize {
        let side = if self.right(shape) { columns } else { rows };
        match self.projector {
            _ if self.rank > 0 => self.rank,
            ProjectorKind::Columns | ProjectorKind::Rows => (self.density * side as f64) as usize,
            ProjectorKind::Randk => (self.density * (rows * columns) as f64) as usize,
            ProjectorKind::Block => 0,
            // APOLLO's quarter and FRUGAL's share round to nearest; a subspace that is wanted has a vector.
            _ if self.density > 0.0 => ((self.density * side as f64).round() as usize).max(1),
            _ => 0,
        }
    }

    /// Whether a matrix of this shape is projected and does not take plain AdamW.
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
        let rest = match self.rest {
            Rest::Full => 4 * rows * columns,
            Rest::Quantised if self.error_levels <= 15 => rows * columns.div_ceil(2) + 8 * rows,
            Rest::Quantised => rows * columns + 8 * rows,
            _ => 0,
        };
        let moments = if matches!(self.inner, Inner::Adam | Inner::AdamLegacy) { 2 } else { 1 };
        moments * self.storage().bytes(low) + subspace + rest
    }

    pub(super) fn storage(&self) -> Storage {
        Storage { min_size: self.min_8bit_size, ..self.moments.into() }
    }

    fn boxed(&self) -> Arc<dyn Projector> {
        match self.projector {
            ProjectorKind::Svd if self.side == Side::Full => Arc::new(TwoSidedSvd),
            ProjectorKind::Svd => self.rounded(Svd),
            ProjectorKind::Dct => {
                Arc::new(DctColumns { basis: self.basis, fft: self.fft, norm: self.norm, weighted: self.weighted })
            }
            ProjectorKind::Power => self.rounded(PowerIteration),
            ProjectorKind::Random => self.rounded(RandomOrthonormal),
            ProjectorKind::Gaussian => Arc::new(Gaussian),
            ProjectorKind::Columns | ProjectorKind::Rows | ProjectorKind::Randperm => Arc::new(RandomCoordinates),
            ProjectorKind::Randk => Arc::new(RandomEntries),
            ProjectorKind::Block => Arc::new(Blocks { density: self.density, order: self.block_order }),
        }
    }

    fn rounded(&self, projector: impl Projector + 'static) -> Arc<dyn Projector> {
        match self.proj_bits {
            0 => Arc::new(projector),
            bits => Arc::new(Rounded { projector, bits, group: self.proj_group }),
        }
    }
}
