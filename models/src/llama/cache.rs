//! Keys and values of earlier positions, cached while text is generated.

use burn::tensor::Tensor;

/// Keys and values of every block, `[batch, positions, kv_heads, head_dim]`: of all positions, or of those that a block with a window may
/// still see.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    blocks: Vec<(Tensor<4>, Tensor<4>)>,
    len: usize,
}

impl KvCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of positions in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if nothing is cached yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the keys and values of one block and returns them with those before. Blocks come in order. With a window, only the positions
    /// that the next one sees are kept.
    pub(crate) fn append(
        &mut self,
        block: usize,
        keys: Tensor<4>,
        values: Tensor<4>,
        window: Option<usize>,
    ) -> (Tensor<4>, Tensor<4>) {
        if block == self.blocks.len() {
            self.blocks.push((keys, values));
        } else {
            let (k, v) = &mut self.blocks[block];
            *k = Tensor::cat(vec![k.clone(), keys], 1);
            *v = Tensor::cat(vec![v.clone(), values], 1);
        }
        let whole = self.blocks[block].clone();
        if let Some(window) = window {
            let (positions, kept) = (whole.0.dims()[1], (window - 1).max(1));
            if positions > kept {
                let last = |x: &Tensor<4>| x.clone().narrow(1, positions - kept, kept);
                self.blocks[block] = (last(&whole.0), last(&whole.1));
            }
        }
        whole
    }

    pub(crate) fn advance(&mut self, positions: usize) {
        self.len += positions;
    }
}
