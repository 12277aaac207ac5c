//! Models made of blocks that run one after another, and the backward pass block by block: only the inputs of the blocks are kept, each block
//! runs again when its gradient is computed.
//!
//! "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); updating each block at once is the fused step of "Full Parameter
//! Fine-tuning for Large Language Models with Limited Resources" (arXiv 2306.09782).

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};
use lowrank_optim::{ByPointer, Part, PartVisitor};

/// A part of a model whose gradients are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Segment {
    /// Parameters before the first block, such as a token embedding.
    Entry,
    /// A block, counted from 0.
    Block(usize),
    /// Parameters after the last block.
    Head,
}

/// A model that turns a batch into hidden states, passes them through blocks, and computes a loss from the last ones.
///
/// Whole, checkpointed and per-layer training, evaluation, and the collection of base gradients work on any model that implements it.
pub trait SegmentedModel: Module {
    /// Inputs and targets of one forward pass, on a device.
    type Batch: Rows;
    /// Hidden states between blocks: a tensor of any rank.
    type Hidden: Hidden;
    /// Tensors that all blocks of one forward pass share, such as rotary angles.
    type Context;

    /// Tensors that the blocks share in a forward pass of this batch.
    fn context(&self, batch: &Self::Batch) -> Self::Context;

    /// Hidden states before the first block.
    fn enter(&self, batch: &Self::Batch, context: &Self::Context) -> Self::Hidden;

    /// Number of blocks.
    fn blocks(&self) -> usize;

    /// Output of a block, counted from 0.
    fn block(&self, number: usize, x: Self::Hidden, context: &Self::Context) -> Self::Hidden;

    /// Sum of the losses of all targets that count, shape `[1]`, from the output of the last block.
    fn loss(&self, x: Self::Hidden, batch: &Self::Batch) -> Tensor<1>;

    /// Number of losses in that sum.
    fn counted(batch: &Self::Batch) -> u64;

    /// Parameters of [`Segment::Entry`] that the head uses too: they are updated once, with both gradients.
    fn tied(&self) -> Vec<ParamId> {
        Vec::new()
    }

    /// Passes the parameters of a segment to a visitor. Together the segments contain every parameter once.
    fn visit_segment<V: ModuleVisitor>(&self, segment: Segment, visitor: &mut V);

    /// Output of the last block.
    fn last_hidden(&self, batch: &Self::Batch) -> Self::Hidden {
        let context = self.context(batch);
        (0..self.blocks()).fold(self.enter(batch, &context), |x, number| self.block(number, x, &context))
    }
}

/// A batch made of rows that do not depend on one another.
pub trait Rows {
    /// Number of rows.
    fn rows(&self) -> usize;

    /// The rows `start..start + count`.
    fn narrow(&self, start: usize, count: usize) -> Self;
}

/// Hidden states: a tensor, or several.
pub trait Hidden: Clone {
    /// A leaf with these values, tracked where something below is trained.
    fn leaf(self, tracked: bool) -> Self;

    /// Removes the gradient of a leaf from the gradients of a backward pass.
    fn gradient(&self, grads: &mut Gradients) -> Option<Self>;

    /// Sum of the products with a gradient, shape `[1]`: its backward pass starts with that gradient.
    fn seeded(self, gradient: Self) -> Tensor<1>;
}

impl<const D: usize> Hidden for Tensor<D> {
    fn leaf(self, tracked: bool) -> Self {
        let x = Self::from_inner(self);
        if tracked { x.require_grad() } else { x }
    }

    fn gradient(&self, grads: &mut Gradients) -> Option<Self> {
        self.grad_remove(grads)
    }

    fn seeded(self, gradient: Self) -> Tensor<1> {
        (self * Self::from_inner(gradient)).sum()
    }
}

impl Segment {
    /// The lowest segment with a trained parameter: the backward pass ends there. None when everything is frozen.
    pub fn lowest_trained<M: SegmentedModel>(model: &M) -> Option<Self> {
        let blocks = (0..model.blocks()).map(Self::Block);
        let mut segments = [Self::Entry].into_iter().chain(blocks).chain([Self::Head]);
        segments.find(|segment| segment.of(model).is_trained())
    }

    /// The segment's parameters.
    pub fn of<M: SegmentedModel>(self, model: &M) -> SegmentOf<'_, M> {
        SegmentOf { model, segment: self }
    }
}

/// The parameters of one segment of a model.
#[derive(Debug)]
pub struct SegmentOf<'a, M> {
    model: &'a M,
    segment: Segment,
}

impl<M: SegmentedModel> Part for SegmentOf<'_, M> {
    fn visit_part(&self, visitor: &mut dyn PartVisitor) {
        self.model.visit_segment(self.segment, &mut ByPointer(visitor));
    }
}

impl<M: SegmentedModel> SegmentOf<'_, M> {
    fn is_trained(&self) -> bool {
        (self as &dyn Part).is_trained()
    }
}

/// One forward pass of a step and its part of the loss.
pub struct ForwardPass<'a, M: SegmentedModel> {
    /// The batch.
    pub batch: &'a M::Batch,
    /// Losses from the output of the last block.
    pub losses: Vec<WeightedLoss<'a, M>>,
}

/// A sum of losses with a factor.
pub struct WeightedLoss<'a, M: SegmentedModel> {
    /// The sum, shape `[1]`, from the output of the last block.
    pub sum: &'a dyn Fn(&M, M::Hidden) -> Tensor<1>,
    /// Its factor.
    pub factor: f64,
}

/// A moment of [`walk`] at which memory can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkPoint {
    /// Before anything is computed.
    Start,
    /// The inputs of all blocks are kept.
    InputsKept,
    /// The forward pass of the head is done.
    HeadForward,
    /// Before a block runs again.
    BlockStart,
    /// The forward pass of a block is done.
    BlockForward,
}

/// Callbacks of [`walk`]: the walker owns the model and receives the gradients.
pub trait Walker<M: SegmentedModel> {
    /// Error that ends the walk.
    type Error;

    /// The current model: segments above the one that runs next may have been updated.
    fn model(&self) -> &M;

    /// Term that is added to the loss of a segment, shape `[1]`.
    fn loss_term(&self, _segment: Segment) -> Result<Option<Tensor<1>>, Self::Error> {
        Ok(None)
    }

    /// Called at each point.
    fn measure(&mut self, _point: WalkPoint) {}

    /// Receives the gradients of a segment. Its parameters may be updated at once: nothing that follows needs the old ones.
    fn gradients(&mut self, segment: Segment, grads: GradientsParams) -> Result<(), Self::Error>;
}

/// Runs the passes of a step and delivers the gradients of their weighted sum to the walker: those of the head first, then of each block
/// from the last one down to the `lowest` segment with a trained parameter. Only one segment's gradients exist at a time unless the walker
/// keeps them.
///
/// Returns the sums of all losses, pass after pass; if one is not finite, no gradients are computed.
pub fn walk<M: SegmentedModel, W: Walker<M>>(
    passes: &[ForwardPass<'_, M>],
    lowest: Segment,
    walker: &mut W,
) -> Result<Vec<f64>, W::Error> {
    walker.measure(WalkPoint::Start);
    let blocks = walker.model().blocks();
    let mut contexts = Vec::with_capacity(passes.len());
    let mut kept: Vec<(usize, Vec<M::Hidden>)> = Vec::with_capacity(blocks);
    let mut last = Vec::with_capacity(passes.len());
    {
        let plain = walker.model().valid();
        for pass in passes {
            let context = plain.context(pass.batch);
            last.push(plain.enter(pass.batch, &context));
            contexts.push(context);
        }
        for number in 0..blocks {
            if lowest <= Segment::Block(number) {
                kept.push((number, last.clone()));
            }
            let run = |(x, context): (M::Hidden, &M::Context)| plain.block(number, x, context);
            last = last.into_iter().zip(&contexts).map(run).collect();
        }
    }
    walker.measure(WalkPoint::InputsKept);
    let leaves: Vec<M::Hidden> = last.into_iter().map(|x| x.leaf(lowest < Segment::Head)).collect();
    let model = walker.model();
    let of_pass = |(pass, leaf): (&ForwardPass<'_, M>, &M::Hidden)| -> Vec<Tensor<1>> {
        pass.losses.iter().map(|loss| (loss.sum)(model, leaf.clone())).collect()
    };
    let sums: Vec<Tensor<1>> = passes.iter().zip(&leaves).flat_map(of_pass).collect();
    walker.measure(WalkPoint::HeadForward);
    let losses: Vec<f64> = sums.iter().map(|sum| f64::from(sum.clone().inner().into_scalar::<f32>())).collect();
    if losses.iter().any(|loss| !loss.is_finite()) {
        return Ok(losses);
    }
    let factors = passes.iter().flat_map(|pass| &pass.losses).map(|loss| loss.factor);
    let loss = summed(sums.into_iter().zip(factors).map(|(sum, factor)| sum.mul_scalar(factor)));
    let mut grads = plus(loss, walker.loss_term(Segment::Head)?).backward();
    let mut outgoing = taken(&leaves, &mut grads);
    let model = walker.model();
    let mut head = GradientsParams::from_grads(grads, model);
    let mut tied = Tied { ids: model.tied(), from: &mut head, into: GradientsParams::new() };
    if !tied.ids.is_empty() {
        model.visit_segment(Segment::Entry, &mut tied);
    }
    let mut tied = tied.into;
    walker.gradients(Segment::Head, head)?;
    for (number, inputs) in kept.into_iter().rev() {
        let Some(above) = outgoing.take() else { break };
        walker.measure(WalkPoint::BlockStart);
        let segment = Segment::Block(number);
        let leaves: Vec<M::Hidden> = inputs.into_iter().map(|x| x.leaf(lowest < segment)).collect();
        let model = walker.model();
        let loss = summed(leaves.iter().zip(&contexts).zip(above).filter_map(|((leaf, context), above)| {
            let above = above?;
            Some(model.block(number, leaf.clone(), context).seeded(above))
        }));
        let loss = plus(loss, walker.loss_term(segment)?);
        walker.measure(WalkPoint::BlockForward);
        let mut grads = loss.backward();
        outgoing = taken(&leaves, &mut grads);
        let grads = (&segment.of(walker.model()) as &dyn Part).gradients(grads);
        drop(leaves);
        walker.gradients(segment, grads)?;
    }
    if let (Segment::Entry, Some(outgoing)) = (lowest, outgoing) {
        let model = walker.model();
        let loss = summed(passes.iter().zip(&contexts).zip(outgoing).filter_map(|((pass, context), grad)| {
            let grad = grad?;
            Some(model.enter(pass.batch, context).seeded(grad))
        }));
        let grads = plus(loss, walker.loss_term(Segment::Entry)?).backward();
        let mut entry = (&Segment::Entry.of(walker.model()) as &dyn Part).gradients(grads);
        if !tied.is_empty() {
            walker.model().visit_segment(Segment::Entry, &mut Joined { from: &mut tied, into: &mut entry });
        }
        walker.gradients(Segment::Entry, entry)?;
    }
    Ok(losses)
}

fn summed(losses: impl Iterator<Item = Tensor<1>>) -> Tensor<1> {
    match losses.reduce(|sum, loss| sum + loss) {
        Some(sum) => sum,
        None => unreachable!("a step has at least one pass"),
    }
}

fn plus(loss: Tensor<1>, term: Option<Tensor<1>>) -> Tensor<1> {
    match term {
        Some(term) => loss + term,
        None => loss,
    }
}

/// The gradients of the leaves, none of those that the loss does not depend on; none at all when no leaf has one.
fn taken<H: Hidden>(leaves: &[H], grads: &mut Gradients) -> Option<Vec<Option<H>>> {
    let taken: Vec<Option<H>> = leaves.iter().map(|leaf| leaf.gradient(grads)).collect();
    taken.iter().any(Option::is_some).then_some(taken)
}

/// Removes the gradients of tied parameters from those of the head.
struct Tied<'a> {
    ids: Vec<ParamId>,
    from: &'a mut GradientsParams,
    into: GradientsParams,
}

impl ModuleVisitor for Tied<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.ids.contains(&param.id)
            && let Some(grad) = self.from.remove::<D>(param.id)
        {
            self.into.register(param.id, grad);
        }
    }
}

/// Adds gradients to existing ones.
struct Joined<'a> {
    from: &'a mut GradientsParams,
    into: &'a mut GradientsParams,
}

impl ModuleVisitor for Joined<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(more) = self.from.remove::<D>(param.id) else { return };
        let sum = match self.into.remove::<D>(param.id) {
            Some(grad) => grad + more,
            None => more,
        };
        self.into.register(param.id, sum);
    }
}
