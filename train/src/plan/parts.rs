//! Tensors of a model by the segment that they belong to.

use std::collections::BTreeMap;

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::tensor::{Int, Tensor};
use lowrank_models::{MatrixStorage, Segment, SegmentedModel};
use lowrank_optim::Part;

/// Bytes of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentBytes {
    /// Bytes of all its tensors.
    pub weights: u64,
    /// Bytes of the trained ones, which is also the size of their gradients.
    pub trained: u64,
    /// Optimizer state.
    pub state: u64,
}

impl SegmentBytes {
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            trained: self.trained + other.trained,
            state: self.state + other.state,
        }
    }
}

/// Bytes of all segments of a model.
#[derive(Clone, Debug)]
pub struct ModelBytes {
    /// Parameters before the first block.
    pub entry: SegmentBytes,
    /// Segments of the blocks.
    pub blocks: Vec<SegmentBytes>,
    /// Parameters after the last block.
    pub head: SegmentBytes,
    /// Bytes of the largest tensor that is trained or belongs to an adapter.
    pub largest: u64,
    /// Elements of the tensor with the most.
    pub widest: u64,
    segments: BTreeMap<ParamId, Segment>,
}

impl ModelBytes {
    /// Counts the weights of a model; trained parameters and their state come from its optimizer.
    ///
    /// The matrices of blocks, and those at the ends of the model, are counted as they lie in their storage, those of adapters as they are.
    pub fn of<M: SegmentedModel>(model: &M, [matrices, tables]: [MatrixStorage; 2]) -> Self {
        let none = SegmentBytes::default();
        let blocks = vec![none; model.blocks()];
        let mut bytes = Self { entry: none, blocks, head: none, largest: 0, widest: 0, segments: BTreeMap::new() };
        let blocks = (0..model.blocks()).map(Segment::Block);
        for segment in [Segment::Entry].into_iter().chain(blocks).chain([Segment::Head]) {
            (&segment.of(model) as &dyn Part).walk(&mut Measure {
                bytes: &mut bytes,
                segment,
                matrices,
                tables,
                adapter: 0,
            });
        }
        bytes
    }

    /// Returns the segment of a parameter; the head if it is in none.
    pub fn of_parameter(&mut self, id: ParamId) -> &mut SegmentBytes {
        self.segment(self.segments.get(&id).copied().unwrap_or(Segment::Head))
    }

    /// Returns true if a parameter belongs to a block.
    pub fn is_in_block(&self, id: ParamId) -> bool {
        matches!(self.segments.get(&id), Some(Segment::Block(_)))
    }

    fn segment(&mut self, segment: Segment) -> &mut SegmentBytes {
        match segment {
            Segment::Entry => &mut self.entry,
            Segment::Block(number) => &mut self.blocks[number],
            Segment::Head => &mut self.head,
        }
    }
}

struct Measure<'a> {
    bytes: &'a mut ModelBytes,
    segment: Segment,
    matrices: MatrixStorage,
    tables: MatrixStorage,
    /// Number of adapters that the visited tensor is inside.
    adapter: usize,
}

impl Measure<'_> {
    fn add(&mut self, id: ParamId, bytes: usize, saved: bool) {
        self.bytes.segments.insert(id, self.segment);
        self.bytes.segment(self.segment).weights += bytes as u64;
        if saved {
            self.bytes.largest = self.bytes.largest.max(bytes as u64);
        }
    }
}

impl ModuleVisitor for Measure<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // `val` would compose the weight of an adapted layer.
        let count = param.base().shape().num_elements();
        let storage = match self.segment {
            Segment::Block(_) => self.matrices,
            _ => self.tables,
        };
        let bytes = if D == 2 && self.adapter == 0 { storage.bytes(count) } else { 4 * count };
        self.add(param.id, bytes, self.adapter > 0 || param.is_require_grad());
        self.bytes.widest = self.bytes.widest.max(count as u64);
    }

    fn enter_module(&mut self, _name: &str, container: &str) {
        self.adapter += usize::from(container == "Reparameterization");
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.adapter -= usize::from(container == "Reparameterization");
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.val();
        self.add(param.id, tensor.shape().num_elements() * tensor.dtype().size(), true);
    }
}
