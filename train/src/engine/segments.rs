//! The backward pass block by block: only the inputs of the blocks are kept, each block runs again when its gradient is due.
//!
//! "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); updating each block at once is the fused step of "Full Parameter
//! Fine-tuning for Large Language Models with Limited Resources" (arXiv 2306.09782).

use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_models::adapter::{self, AdapterError, PenaltyAt, is_trained};
use lowrank_models::{LanguageBatch, Llama, ops};
use serde::{Deserialize, Serialize};

use super::activations::Live;
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

/// A part of the model whose gradients come together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Segment {
    /// The token embedding.
    Embedding,
    /// A block.
    Block(usize),
    /// The norm before the head, and the head.
    Head,
    /// Everything.
    Whole,
}

impl Segment {
    /// The lowest segment with a trained tensor: the backward pass ends there.
    pub fn lowest_trained(model: &Llama) -> Option<Self> {
        if is_trained(&model.model.embed_tokens) {
            return Some(Self::Embedding);
        }
        let block = model.model.layers.iter().position(is_trained);
        block.map(Self::Block).or_else(|| is_trained(model).then_some(Self::Head))
    }

    /// The gradients after what the adapters of this segment add once gradients are clipped, and without those of tensors that rest.
    pub fn after_clipping(
        self,
        model: &Llama,
        grads: GradientsParams,
        peak_lr: f64,
        resting: &[ParamId],
    ) -> Result<GradientsParams, AdapterError> {
        fn of<M: Module>(
            module: &M,
            grads: GradientsParams,
            peak_lr: f64,
            resting: &[ParamId],
        ) -> Result<GradientsParams, AdapterError> {
            Ok(adapter::drop_resting(module, adapter::add_after_clipping(module, grads, peak_lr)?, resting))
        }
        match (self, &model.lm_head) {
            (Self::Whole, _) => of(model, grads, peak_lr, resting),
            (Self::Block(layer), _) => of(&model.model.layers[layer], grads, peak_lr, resting),
            (Self::Head, Some(head)) => of(head, grads, peak_lr, resting),
            (Self::Head, None) | (Self::Embedding, _) => Ok(grads),
        }
    }
}

/// What is done with the gradients of a segment, before those of the next one exist.
pub(super) type Visit<'a> = &'a mut dyn FnMut(&mut Trainer, Segment, GradientsParams) -> Result<(), TrainError>;

impl Trainer {
    /// Gives the gradients of `factor` times the loss, and of the adapters' penalties when `penalties`, to `visit`: those of the head first, then
    /// of each block from the last to the lowest with a trained tensor, then of a trained embedding. Weights of a segment may change as soon as
    /// its gradients are there. Gives the sum of the losses in nats; when it is not finite, there are no gradients.
    pub(super) fn segments(
        &mut self,
        batch: LanguageBatch,
        factor: f64,
        penalties: bool,
        visit: Visit,
    ) -> Result<f64, TrainError> {
        let LanguageBatch { inputs, targets, starts } = batch;
        let lowest = self.lowest()?;
        let begin = Live::of(self.device());
        let model = self.model();
        let context = model.context(inputs.dims()[1], &inputs.device(), starts);
        let mut x = ops::embedding(model.model.embed_tokens.weight.val().inner(), inputs.clone());
        let mut kept = Vec::with_capacity(model.model.layers.len());
        for (layer, block) in model.model.layers.iter().enumerate() {
            if lowest <= Segment::Block(layer) {
                kept.push((layer, x.clone()));
            }
            x = block.valid().forward(x, &context);
        }
        let inputs_kept = begin.grown(self.device());
        let leaf = leaf(x, lowest < Segment::Head);
        let loss = model.loss_of(leaf.clone(), targets);
        self.activations.note(begin.grown(self.device()));
        let model = self.model();
        let nats = f64::from(loss.clone().inner().into_scalar::<f32>());
        if !nats.is_finite() {
            return Ok(nats);
        }
        let mut loss = loss.mul_scalar(factor);
        if penalties && let Some(head) = &model.lm_head {
            loss = plus_penalty(loss, head);
        }
        let mut grads = loss.backward();
        let mut slope = leaf.grad_remove(&mut grads);
        let mut head = GradientsParams::from_grads(grads, model);
        // An embedding that serves as head too is updated once, with both gradients.
        let table = model.model.embed_tokens.weight.id;
        let tied = if model.lm_head.is_none() { head.remove::<2>(table) } else { None };
        visit(self, Segment::Head, head)?;
        for (layer, x) in kept.into_iter().rev() {
            let Some(above) = slope.take() else { break };
            let begin = Live::of(self.device());
            let leaf = self::leaf(x, lowest < Segment::Block(layer));
            let block = &self.model().model.layers[layer];
            let mut loss = (block.forward(leaf.clone(), &context) * Tensor::from_inner(above)).sum();
            if penalties {
                loss = plus_penalty(loss, block);
            }
            self.activations.note(inputs_kept.zip(begin.grown(self.device())).map(|(kept, block)| kept + block));
            let mut grads = loss.backward();
            slope = leaf.grad_remove(&mut grads);
            let grads = GradientsParams::from_grads(grads, &self.model().model.layers[layer]);
            drop(leaf);
            visit(self, Segment::Block(layer), grads)?;
        }
        if let (Segment::Embedding, Some(slope)) = (lowest, slope) {
            let model = self.model();
            let out = ops::embedding(model.model.embed_tokens.weight.val(), inputs);
            let grads = (out * Tensor::from_inner(slope)).sum().backward();
            let mut embedding = GradientsParams::from_grads(grads, &model.model.embed_tokens);
            if let Some(tied) = tied
                && let Some(own) = embedding.remove::<2>(table)
            {
                embedding.register(table, own + tied);
            }
            visit(self, Segment::Embedding, embedding)?;
        }
        Ok(nats)
    }
}

/// The loss with the penalties of a module's adapters.
pub(super) fn plus_penalty<M: Module>(loss: Tensor<1>, module: &M) -> Tensor<1> {
    match adapter::penalty(module, PenaltyAt::Loss) {
        Some(penalty) => loss + penalty,
        None => loss,
    }
}

/// The input of a segment, tracked where something below is trained.
fn leaf(x: Tensor<3>, tracked: bool) -> Tensor<3> {
    let x = Tensor::from_inner(x);
    if tracked { x.require_grad() } else { x }
}
