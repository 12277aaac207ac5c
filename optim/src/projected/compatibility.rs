//! Compatibility of the pieces of a projected optimizer.

use lowrank_kernels::dct::DctBasis;

use crate::check::refused;
use crate::error::OptimError;
use crate::projected::config::ProjectorKind::{Block, Columns, Dct, Gaussian, Power, Randk, Randperm, Rows, Svd};
use crate::projected::config::{Inner, OnRenewal, ProjectedConfig, ProjectorKind, Residual, Side};
use crate::registry::options;
use crate::state::error_feedback::ErrorFeedback;

impl ProjectedConfig {
    /// Rejects values outside what the options allow and incompatible components.
    pub fn validate(&self) -> Result<(), OptimError> {
        options::validate(self)?;
        self.rank_fits()?;
        self.side_fits()?;
        self.renewal_fits()?;
        self.residual_fits()?;
        self.storage_fits()
    }

    fn rank_fits(&self) -> Result<(), OptimError> {
        if self.rank == 0 && self.density == 0.0 && !matches!(self.residual, Residual::Sign | Residual::Sgd) {
            return refused("rank", 0, "it must be at least 1, or density above 0: nothing would move");
        }
        if self.rank == 0 && self.projector == Power {
            return refused("rank", 0, "it must be at least 1");
        }
        if self.rank > 0 && matches!(self.projector, Columns | Rows | Randk | Block) {
            return refused("rank", self.rank, "this projector takes a density, not a rank");
        }
        if self.projector == Dct && self.fft && self.basis == DctBasis::Random {
            return refused("fft", true, "a random basis has no fast transform; use matmul");
        }
        Ok(())
    }

    fn side_fits(&self) -> Result<(), OptimError> {
        if self.side != Side::Full {
            return Ok(());
        }
        if self.projector != Svd {
            return refused("side", "full", "only singular directions are defined on both sides; use projector = svd");
        }
        if self.shared_dim > 0 {
            return refused("shared_dim", self.shared_dim, "with side = full both sides are projected");
        }
        Ok(())
    }

    fn renewal_fits(&self) -> Result<(), OptimError> {
        if matches!(self.on_renewal, OnRenewal::Rotate | OnRenewal::Transport) {
            let how = if self.on_renewal == OnRenewal::Rotate { "rotate" } else { "transport" };
            if self.side == Side::Full || matches!(self.projector, Gaussian | Block | Randk) {
                return refused("on_renewal", how, "moments move only between orthonormal vectors of one side");
            }
            if self.on_renewal == OnRenewal::Transport && self.inner != Inner::Adam {
                return refused("on_renewal", how, "it is defined for the moments of inner = adam");
            }
        }
        if self.projector == Block && self.on_renewal != OnRenewal::Reset {
            return refused(
                "on_renewal",
                "keep",
                "with projector = block a matrix without a turn has no moments; use reset",
            );
        }
        Ok(())
    }

    fn residual_fits(&self) -> Result<(), OptimError> {
        if self.projector == Gaussian && self.residual != Residual::Gradient {
            return refused(
                "projector",
                "gaussian",
                "its directions are not orthonormal, so that nothing can be projected back; use random, or residual = gradient",
            );
        }
        let scaled = matches!(self.residual, Residual::Scaled | Residual::ScaledPure | Residual::Gradient);
        if scaled && (self.side == Side::Full || matches!(self.projector, Randk | Block)) {
            return refused("residual", "scaled", "scaling by channel needs a projection of one side");
        }
        if self.projector == Block && self.residual.feedback() != ErrorFeedback::None {
            return refused("residual", "full", "with projector = block a matrix is whole or not there at all");
        }
        let spans = matches!(self.projector, Svd | Dct | Power | ProjectorKind::Random | Gaussian | Randperm);
        if self.residual == Residual::Sign && self.rank == 0 && self.density == 1.0 && spans {
            return refused("density", 1, "nothing but rounding is left outside, and its sign would move the weights");
        }
        Ok(())
    }

    fn storage_fits(&self) -> Result<(), OptimError> {
        if self.proj_bits > 0 && !matches!(self.projector, Svd | Power | ProjectorKind::Random) {
            return refused("proj_bits", self.proj_bits, "this projector stores no directions");
        }
        if self.lazy_queue > 0 && (self.projector != Svd || self.side == Side::Full) {
            return refused(
                "lazy_queue",
                self.lazy_queue,
                "the first direction is that of projector = svd on one side",
            );
        }
        if self.error_of_momentum && self.residual.feedback() == ErrorFeedback::None {
            return refused("error_of_momentum", true, "it needs residual = full or quantised to be kept in");
        }
        Ok(())
    }
}
