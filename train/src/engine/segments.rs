//! The backward pass block by block: only the inputs of the blocks are kept, each block runs again when its gradient is due.
//!
//! "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); updating each block at once is the fused step of "Full Parameter
//! Fine-tuning for Large Language Models with Limited Resources" (arXiv 2306.09782).

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_models::{LanguageBatch, ops};
use serde::{Deserialize, Serialize};

use super::{TrainError, Trainer};

/// How gradients are computed; the numbers are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackwardMode {
    /// All blocks at once: everything that they compute is kept.
    #[default]
    Whole,
    /// Block by block: only the inputs of the blocks are kept, and all gradients.
    Checkpointed,
    /// Block by block, and each block is updated at once: only its gradients are kept.
    PerLayer,
}

/// What is done with the gradients of a segment, before those of the next one exist.
pub(super) type Visit<'a> = &'a mut dyn FnMut(&mut Trainer, GradientsParams) -> Result<(), TrainError>;

impl Trainer {
    /// Gives the gradients of `factor` times the loss to `visit`: those of the head first, then of each block from the last to the first, then
    /// of the embedding. Weights of a segment may change as soon as its gradients are there. Gives the sum of the losses in nats; when it is
    /// not finite, there are no gradients.
    pub(super) fn segments(&mut self, batch: LanguageBatch, factor: f64, visit: Visit) -> Result<f64, TrainError> {
        let LanguageBatch { inputs, targets, starts } = batch;
        let model = self.model();
        let context = model.context(inputs.dims()[1], &inputs.device(), starts);
        let mut x = ops::embedding(model.model.embed_tokens.weight.val().inner(), inputs.clone());
        let mut kept = Vec::with_capacity(model.model.layers.len());
        for block in &model.model.layers {
            kept.push(x.clone());
            x = block.valid().forward(x, &context);
        }
        let leaf = Tensor::from_inner(x).require_grad();
        let loss = model.loss_of(leaf.clone(), targets);
        let nats = f64::from(loss.clone().inner().into_scalar::<f32>());
        if !nats.is_finite() {
            return Ok(nats);
        }
        let mut grads = loss.mul_scalar(factor).backward();
        let mut slope = gradient(&leaf, &mut grads);
        let mut head = GradientsParams::from_grads(grads, model);
        // An embedding that serves as head too is updated once, with both gradients.
        let table = model.model.embed_tokens.weight.id;
        let tied = if model.lm_head.is_none() { head.remove::<2>(table) } else { None };
        visit(self, head)?;
        for (layer, x) in kept.into_iter().enumerate().rev() {
            let leaf = Tensor::from_inner(x).require_grad();
            let model = self.model();
            let out = model.model.layers[layer].forward(leaf.clone(), &context);
            let mut grads = (out * Tensor::from_inner(slope)).sum().backward();
            slope = gradient(&leaf, &mut grads);
            let block = GradientsParams::from_grads(grads, &model.model.layers[layer]);
            drop(leaf);
            visit(self, block)?;
        }
        let model = self.model();
        let out = ops::embedding(model.model.embed_tokens.weight.val(), inputs);
        let grads = (out * Tensor::from_inner(slope)).sum().backward();
        let mut embedding = GradientsParams::from_grads(grads, &model.model.embed_tokens);
        if let Some(tied) = tied
            && let Some(own) = embedding.remove::<2>(table)
        {
            embedding.register(table, own + tied);
        }
        visit(self, embedding)?;
        Ok(nats)
    }
}

fn gradient(leaf: &Tensor<3>, grads: &mut burn::tensor::Gradients) -> Tensor<3> {
    match leaf.grad_remove(grads) {
        Some(gradient) => gradient,
        None => unreachable!("a leaf that the loss depends on has a gradient"),
    }
}
