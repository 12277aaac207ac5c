//! Two factors that now and then step along the manifold of their products ("Parameter and Memory Efficient Pretraining via Low-rank Riemannian
//! Optimization", ICLR 2025). The layer is [`LowRank`] with another beginning; what differs is how it is stepped.

use burn::tensor::Tensor;
use lowrank_optim::OptimError;
use lowrank_optim::loro::{Factors, LoroSteps, exact_step};
use rayon::prelude::*;

use super::relora::trained;
use super::{Linear, LowRank};
use crate::error::ModelError;
use crate::llama::Llama;
use crate::weights::{Builder, Init, Layout};

impl LowRank {
    /// Both factors normal, of deviation `sqrt(2 / (rows + columns))`.
    pub(super) fn build_loro(
        builder: &mut Builder,
        path: &str,
        d_in: usize,
        d_out: usize,
        rank: usize,
    ) -> Result<Self, ModelError> {
        let xavier = |side: usize| Init::Normal((2.0 / (side + rank) as f64).sqrt());
        Ok(Self {
            a: builder.matrix(&format!("{path}.a"), [d_in, rank], Layout::Transposed, xavier(d_in))?,
            b: builder.matrix(&format!("{path}.b"), [rank, d_out], Layout::Transposed, xavier(d_out))?,
        })
    }
}

/// A layer whose pair of factors has directions: `W = M N^T` is the transposed weight, so that `N` is the first factor and `M` the second, turned.
struct Pair<'a> {
    path: String,
    layer: &'a mut LowRank,
    directions: Factors,
    step: f64,
}

impl Pair<'_> {
    fn stepped(&self) -> Result<Factors, OptimError> {
        let factors = Factors { m: self.layer.b.val().inner().transpose(), n: self.layer.a.val().inner() };
        exact_step(&factors, &self.directions, self.step).map_err(|error| match error {
            OptimError::Value { option, value, reason } => {
                OptimError::Value { option, value, reason: format!("in {} {reason}", self.path) }
            }
            other => other,
        })
    }
}

impl Llama {
    /// Takes the exact steps whose directions the factors' optimizers have left behind. When one fails, none is taken.
    pub fn exact_steps(&mut self, steps: &LoroSteps) -> Result<(), OptimError> {
        let mut pairs = Vec::new();
        for (number, block) in self.model.layers.iter_mut().enumerate() {
            for (name, linear) in block.linears_mut() {
                let Linear::LowRank(layer) = linear else { continue };
                let first = steps.take(layer.a.id.val());
                let second = steps.take(layer.b.id.val());
                if let (Some((n, step)), Some((m, _))) = (first, second) {
                    let directions = Factors { m: m.transpose(), n };
                    pairs.push(Pair { path: format!("model.layers.{number}.{name}"), layer, directions, step });
                }
            }
        }
        let stepped = pairs.par_iter().map(Pair::stepped).collect::<Result<Vec<Factors>, _>>()?;
        for (pair, Factors { m, n }) in pairs.into_iter().zip(stepped) {
            pair.layer.a = trained(pair.layer.a.id, n);
            pair.layer.b = trained(pair.layer.b.id, contiguous(m.transpose()));
        }
        Ok(())
    }
}

/// A turned matrix written out: a view would be copied at each product.
fn contiguous(x: Tensor<2>) -> Tensor<2> {
    let (data, device) = (x.to_data(), x.device());
    Tensor::from_data(data, &device)
}
