//! Keys and values of earlier positions, cached while text is generated.

use burn::tensor::Tensor;

/// Keys and values of every block, `[batch, positions, kv_heads, head_dim]`.
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

    /// Appends the keys and values of one block and returns those of all positions. Blocks come in order.
    pub(crate) fn append(&mut self, block: usize, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        if block == self.blocks.len() {
            self.blocks.push((keys, values));
        } else {
            let (k, v) = &mut self.blocks[block];
            *k = Tensor::cat(vec![k.clone(), keys], 1);
            *v = Tensor::cat(vec![v.clone(), values], 1);
        }
        self.blocks[block].clone()
    }

    pub(crate) fn advance(&mut self, positions: usize) {
        self.len += positions;
    }
}
