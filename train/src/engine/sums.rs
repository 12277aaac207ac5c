//! Sums of gradients over the processes that train together.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

use super::TrainError;
use crate::process::Peers;

/// Returns the sums of the gradients of all processes, which must have gradients of the same parameters.
pub(super) fn sum_gradients<M: Module>(
    peers: Peers,
    module: &M,
    mut grads: GradientsParams,
) -> Result<GradientsParams, TrainError> {
    if peers.is_alone() {
        return Ok(grads);
    }
    let mut read = Read { grads: &grads, values: Vec::new() };
    module.visit(&mut read);
    let values = read.values;
    let counts: Vec<u64> = peers.all(&[values.len() as u64]).concat();
    if let Some(rank) = counts.iter().position(|count| *count != counts[0]) {
        return Err(TrainError::OtherGradients { rank, count: counts[rank], first: counts[0] });
    }
    let sums = peers.sum(values);
    module.visit(&mut Write { grads: &mut grads, sums: &sums });
    Ok(grads)
}

struct Read<'a> {
    grads: &'a GradientsParams,
    values: Vec<f32>,
}

impl ModuleVisitor for Read<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            self.values.extend(grad.into_data().convert::<f32>().iter::<f32>());
        }
    }
}

struct Write<'a> {
    grads: &'a mut GradientsParams,
    /// Sums of the parameters that are not yet visited.
    sums: &'a [f32],
}

impl ModuleVisitor for Write<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            let (sums, others) = self.sums.split_at(grad.shape().num_elements());
            self.sums = others;
            let sum = Tensor::<D>::from_data(TensorData::new(sums.to_vec(), grad.shape()), &grad.device());
            self.grads.register(param.id, sum.cast(grad.dtype()));
        }
    }
}
