//! Projected optimizers: projector, inner optimizer, rest rule and moment storage, each chosen on its own.

mod config;
mod fused;
mod state;
mod step;
#[cfg(test)]
mod tests;

pub use config::{
    BlockOrder, Granularity, Inner, Norm, ProjectedConfig, ProjectorKind, RenewAt, Rest, Side, States, Target,
};
pub use state::ProjectedState;
pub use step::{Projected, longer_gap};

/// Gives the configuration of a published method what all optimizers have, by way of its pieces.
macro_rules! named {
    ($config:ident) => {
        crate::adam::adam_builders!($config);

        impl $config {
            /// Refuses values outside what the options allow and pieces that do not go together.
            pub fn validate(&self) -> Result<(), crate::OptimError> {
                crate::registry::validate(self)?;
                self.projected().validate()
            }

            /// The bare optimizer, for [`ModuleOptimizer::with_group`](burn::optim::ModuleOptimizer::with_group).
            ///
            /// # Panics
            ///
            /// When `validate` refuses the configuration.
            pub fn build(&self) -> crate::ByMatrix<crate::Projected> {
                match crate::method::MethodConfig::optimizer(self) {
                    Ok(optimizer) => optimizer,
                    Err(error) => panic!("{error}"),
                }
            }

            /// The optimizer of a whole module.
            ///
            /// # Panics
            ///
            /// When `validate` refuses the configuration.
            pub fn init(&self) -> burn::optim::ModuleOptimizer {
                burn::optim::ModuleOptimizer::from(self.build())
            }
        }

        impl crate::method::MethodConfig for $config {
            type Optimizer = crate::ByMatrix<crate::Projected>;

            fn optimizer(&self) -> Result<Self::Optimizer, crate::OptimError> {
                self.validate()?;
                self.projected().try_build()
            }

            fn at(optimizer: Self::Optimizer, place: crate::Place) -> Self::Optimizer {
                optimizer.at(place)
            }

            fn takes(&self, shape: [usize; 2]) -> bool {
                self.projected().projects(shape)
            }

            fn others(&self) -> crate::AdamWConfig {
                self.projected().others()
            }

            fn state_bytes(&self, shape: [usize; 2]) -> usize {
                self.projected().state_bytes(shape)
            }
        }
    };
}
pub(crate) use named;
