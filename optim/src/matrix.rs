//! From a rule for one matrix to an optimizer for any parameter.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::optim::{Optimizer, RecordState};
use burn::tensor::{Device, Tensor};

use crate::change::WeightChange;
use crate::matrix_id::MatrixId;
use crate::methods::adamw::{AdamW, AdamWState};
use crate::precision::in_f32;

/// Update rule of one matrix. Matrices are passed in f32, laid out as they are stored.
pub trait MatrixRule: Clone + Debug + Send + Sync + 'static {
    /// State kept between steps.
    type State: RecordState + Clone + Debug;

    /// Reports whether this rule steps matrices of this shape, instead of plain AdamW.
    fn takes(&self, shape: [usize; 2]) -> bool;

    /// State before the first step.
    fn fresh(&self, shape: [usize; 2], place: MatrixId, device: &Device) -> Self::State;

    /// One step at a learning rate with a gradient.
    fn step(&self, lr: f64, w: Tensor<2>, g: Tensor<2>, state: Self::State) -> (Tensor<2>, Self::State);

    /// The state on another device.
    fn to_device(state: Self::State, device: &Device) -> Self::State;
}

/// Optimizer that uses a rule for matrices and AdamW for every other parameter.
#[derive(Clone, Debug)]
pub struct ByMatrix<R> {
    rule: R,
    others: AdamW,
    place: Option<MatrixId>,
    met: Arc<AtomicU64>,
}

/// State of [`ByMatrix`] for one parameter.
#[derive(Clone, Debug, RecordState)]
pub struct ByMatrixState<const D: usize, S: RecordState> {
    /// State of a parameter that uses AdamW.
    pub plain: Option<AdamWState<D>>,
    /// State of a matrix that uses the rule.
    pub matrix: Option<S>,
}

impl<R: MatrixRule> ByMatrix<R> {
    /// Joins a rule with the optimizer of everything else.
    pub fn new(rule: R, others: AdamW) -> Self {
        Self { rule, others, place: None, met: Arc::default() }
    }

    /// Assigns the optimizer to one matrix; without it, matrices are numbered in the order of their first steps.
    pub fn at(mut self, place: MatrixId) -> Self {
        self.place = Some(place);
        self
    }

    /// The rule.
    pub fn rule(&self) -> &R {
        &self.rule
    }

    /// The optimizer of everything else.
    pub fn others(&self) -> &AdamW {
        &self.others
    }

    fn place(&self) -> MatrixId {
        self.place.unwrap_or_else(|| {
            let number = self.met.fetch_add(1, Ordering::Relaxed);
            MatrixId { key: number, number: number as usize, count: 0 }
        })
    }
}

impl<R: MatrixRule> Optimizer for ByMatrix<R> {
    type State<const D: usize> = ByMatrixState<D, R::State>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let shape = tensor.dims();
        let matrix = <[usize; 2]>::try_from(&shape[..]).ok().filter(|shape| self.rule.takes(*shape));
        let Some(matrix_shape) = matrix else {
            let (tensor, plain) = self.others.step(lr, tensor, grad, state.and_then(|state| state.plain));
            return (tensor, Some(ByMatrixState { plain, matrix: None }));
        };
        let state = state
            .and_then(|state| state.matrix)
            .unwrap_or_else(|| self.rule.fresh(matrix_shape, self.place(), &tensor.device()));
        in_f32(tensor, grad, |tensor, grad| {
            let (w, state) = self.rule.step(lr, tensor.reshape(matrix_shape), grad.reshape(matrix_shape), state);
            (w.reshape(shape), Some(ByMatrixState { plain: None, matrix: Some(state) }))
        })
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        ByMatrixState {
            plain: state.plain.map(|plain| AdamW::to_device(plain, device)),
            matrix: state.matrix.map(|matrix| R::to_device(matrix, device)),
        }
    }
}

impl<R: MatrixRule> WeightChange for ByMatrix<R> {}

/// Implements the common interface of optimizers for the configuration of a matrix rule.
macro_rules! matrix_method {
    ($config:ident, $rule:ident) => {
        crate::adam::adam_builders!($config);

        impl $config {
            /// With this scale of the update by the shape of the matrix.
            pub fn with_scaling(mut self, scaling: crate::methods::orthogonal::Scaling) -> Self {
                self.update.scaling = scaling;
                self
            }

            /// For matrices stored `[d_out, d_in]`, or Burn's `[d_in, d_out]`.
            pub fn with_rows_are_outputs(mut self, rows_are_outputs: bool) -> Self {
                self.update.rows_are_outputs = rows_are_outputs;
                self
            }

            /// With this learning rate of all other parameters, as a multiple of that of the matrices.
            pub fn with_others_lr_scale(mut self, others_lr_scale: f64) -> Self {
                self.update.others_lr_scale = others_lr_scale;
                self
            }

            fn rule(&self) -> $rule {
                $rule { config: self.clone() }
            }

            /// AdamW of everything else.
            pub fn others(&self) -> crate::methods::adamw::AdamWConfig {
                crate::methods::adamw::AdamWConfig::new()
                    .with_adam(self.adam)
                    .with_lr_scale(self.update.others_lr_scale)
            }

            /// The bare optimizer, for [`ModuleOptimizer::with_group`](burn::optim::ModuleOptimizer::with_group).
            ///
            /// # Panics
            ///
            /// If `validate` rejects the configuration.
            pub fn build(&self) -> crate::matrix::ByMatrix<$rule> {
                match crate::method::MethodConfig::optimizer(self) {
                    Ok(optimizer) => optimizer,
                    Err(error) => panic!("{error}"),
                }
            }

            /// The optimizer of a whole module: of every matrix in it, embeddings and head included.
            ///
            /// # Panics
            ///
            /// If `validate` rejects the configuration.
            pub fn init(&self) -> burn::optim::ModuleOptimizer {
                burn::optim::ModuleOptimizer::from(self.build())
            }
        }

        impl crate::method::MethodConfig for $config {
            type Optimizer = crate::matrix::ByMatrix<$rule>;

            fn optimizer(&self) -> Result<crate::matrix::ByMatrix<$rule>, crate::error::OptimError> {
                self.validate()?;
                Ok(crate::matrix::ByMatrix::new(self.rule(), self.others().build()))
            }

            fn at(optimizer: Self::Optimizer, place: crate::matrix_id::MatrixId) -> Self::Optimizer {
                optimizer.at(place)
            }

            fn takes(&self, shape: [usize; 2]) -> bool {
                self.rule().takes(shape)
            }

            fn others(&self) -> crate::methods::adamw::AdamWConfig {
                self.others()
            }

            fn state_bytes(&self, shape: [usize; 2]) -> usize {
                self.state_bytes(shape)
            }
        }
    };
}
pub(crate) use matrix_method;
