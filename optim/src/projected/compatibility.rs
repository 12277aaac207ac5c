//! Which values and which pieces of a projected optimizer go together.

use lowrank_kernels::dct::DctBasis;

use crate::check::refused;
use crate::error::OptimError;
use crate::projected::config::ProjectorKind::{Block, Columns, Dct, Gaussian, Power, Randk, Randperm, Rows, Svd};
use crate::projected::config::{Inner, ProjectedConfig, ProjectorKind, Rest, Side, States};
use crate::registry::options;
use crate::state::error_feedback::ErrorFeedback;

impl ProjectedConfig {
    /// Rejects values outside what the options allow and pieces that do not go together.
    pub fn validate(&self) -> Result<(), OptimError> {
        options::validate(self)?;
        self.rank_fits()?;
        self.side_fits()?;
        self.states_fit()?;
        self.rest_fits()?;
        self.storage_fits()
    }

    fn rank_fits(&self) -> Result<(), OptimError> {
        if self.rank == 0 && self.density == 0.0 && !matches!(self.rest, Rest::Sign | Rest::Sgd) {
            return refused("rank", 0, "it must be at least 1, or density above 0: nothing would move");
        }
        if self.rank == 0 && self.projector == Power {
            return refused("rank", 0, "it must be at least 1");
        }
        if self.rank > 0 && matches!(self.projector, Columns | Rows | Randk | Block) {
            return refused("rank", self.rank, "this projector takes a density, not a rank");
        }
        if self.projector == Dct && self.fft && self.basis == DctBasis::Random {
            return refused("fft", true, "a random basis has no fast transform; take matmul");
        }
        Ok(())
    }

    fn side_fits(&self) -> Result<(), OptimError> {
        if self.side != Side::Full {
            return Ok(());
        }
        if self.projector != Svd {
            return refused("side", "full", "only singular directions are defined on both sides; take projector = svd");
        }
        if self.shared_dim > 0 {
            return refused("shared_dim", self.shared_dim, "with side = full both sides are projected");
        }
        Ok(())
    }

    fn states_fit(&self) -> Result<(), OptimError> {
        if matches!(self.states, States::Rotate | States::Transport) {
            let how = if self.states == States::Rotate { "rotate" } else { "transport" };
            if self.side == Side::Full || matches!(self.projector, Gaussian | Block | Randk) {
                return refused("states", how, "moments move only between orthonormal vectors of one side");
            }
            if self.states == States::Transport && self.inner != Inner::Adam {
                return refused("states", how, "it is defined for the moments of inner = adam");
            }
        }
        if self.projector == Block && self.states != States::Reset {
            return refused(
                "states",
                "keep",
                "with projector = block a matrix without a turn has no moments; take reset",
            );
        }
        Ok(())
    }

    fn rest_fits(&self) -> Result<(), OptimError> {
        if self.projector == Gaussian && self.rest != Rest::Gradient {
            return refused(
                "projector",
                "gaussian",
                "its directions are not orthonormal, so that nothing can be projected back; take random, or rest = gradient",
            );
        }
        let scaled = matches!(self.rest, Rest::Scaled | Rest::ScaledPure | Rest::Gradient);
        if scaled && (self.side == Side::Full || matches!(self.projector, Randk | Block)) {
            return refused("rest", "scaled", "scaling by channel needs a projection of one side");
        }
        if self.projector == Block && self.rest.feedback() != ErrorFeedback::None {
            return refused("rest", "full", "with projector = block a matrix is whole or not there at all");
        }
        let spans = matches!(self.projector, Svd | Dct | Power | ProjectorKind::Random | Gaussian | Randperm);
        if self.rest == Rest::Sign && self.rank == 0 && self.density == 1.0 && spans {
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
        if self.error_of_momentum && self.rest.feedback() == ErrorFeedback::None {
            return refused("error_of_momentum", true, "it needs rest = full or quantised to be kept in");
        }
        Ok(())
    }
}
