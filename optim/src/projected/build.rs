//! A projected optimizer from its configuration.

use std::sync::Arc;

use burn::optim::ModuleOptimizer;

use crate::error::OptimError;
use crate::matrix::ByMatrix;
use crate::projected::config::{ProjectedConfig, ProjectorKind, Side};
use crate::projected::projector::{
    ActiveMatrices, DctColumns, Gaussian, PowerIteration, Projector, RandomCoordinates, RandomEntries,
    RandomOrthonormal, Rounded, Svd, TwoSidedSvd,
};
use crate::projected::step::Projected;

impl ProjectedConfig {
    /// The bare optimizer, for [`ModuleOptimizer::with_group`], or the reason why the configuration is rejected.
    pub fn try_build(&self) -> Result<ByMatrix<Projected>, OptimError> {
        self.validate()?;
        let others = self.others().build();
        Ok(ByMatrix::new(Projected::new(self.clone(), self.boxed()), others))
    }

    /// The bare optimizer, for [`ModuleOptimizer::with_group`].
    ///
    /// # Panics
    ///
    /// When [`ProjectedConfig::validate`] rejects the configuration.
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
    /// When [`ProjectedConfig::validate`] rejects the configuration.
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }

    /// With a projector of your own instead of the configured one.
    pub fn build_with(&self, projector: impl Projector + 'static) -> Result<ByMatrix<Projected>, OptimError> {
        self.validate()?;
        Ok(ByMatrix::new(Projected::new(self.clone(), Arc::new(projector)), self.others().build()))
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
            ProjectorKind::Block => Arc::new(ActiveMatrices { density: self.density, order: self.block_order }),
        }
    }

    fn rounded(&self, projector: impl Projector + 'static) -> Arc<dyn Projector> {
        match self.proj_bits {
            0 => Arc::new(projector),
            bits => Arc::new(Rounded { projector, bits, group: self.proj_group }),
        }
    }
}
