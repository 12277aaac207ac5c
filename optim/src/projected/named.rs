//! Common interface of published methods with a projection.

/// Gives the configuration of a published method the common interface of optimizers, by way of its components.
macro_rules! named {
    ($config:ident) => {
        crate::adam::adam_builders!($config);

        impl $config {
            /// Rejects values outside what the options allow and incompatible components.
            pub fn validate(&self) -> Result<(), crate::error::OptimError> {
                crate::registry::options::validate(self)?;
                self.projected().validate()
            }

            /// The bare optimizer, for [`ModuleOptimizer::with_group`](burn::optim::ModuleOptimizer::with_group).
            ///
            /// # Panics
            ///
            /// If `validate` rejects the configuration.
            pub fn build(&self) -> crate::matrix::ByMatrix<crate::projected::step::Projected> {
                match crate::method::MethodConfig::optimizer(self) {
                    Ok(optimizer) => optimizer,
                    Err(error) => panic!("{error}"),
                }
            }

            /// The optimizer of a whole module.
            ///
            /// # Panics
            ///
            /// If `validate` rejects the configuration.
            pub fn init(&self) -> burn::optim::ModuleOptimizer {
                burn::optim::ModuleOptimizer::from(self.build())
            }
        }

        impl crate::method::MethodConfig for $config {
            type Optimizer = crate::matrix::ByMatrix<crate::projected::step::Projected>;

            fn optimizer(&self) -> Result<Self::Optimizer, crate::error::OptimError> {
                self.validate()?;
                self.projected().try_build()
            }

            fn at(optimizer: Self::Optimizer, place: crate::matrix_id::MatrixId) -> Self::Optimizer {
                optimizer.at(place)
            }

            fn takes(&self, shape: [usize; 2]) -> bool {
                self.projected().projects(shape)
            }

            fn others(&self) -> crate::methods::adamw::AdamWConfig {
                self.projected().others()
            }

            fn state_bytes(&self, shape: [usize; 2]) -> usize {
                self.projected().state_bytes(shape)
            }

            fn active_share(&self) -> f64 {
                self.projected().active_share()
            }
        }
    };
}
pub(crate) use named;
