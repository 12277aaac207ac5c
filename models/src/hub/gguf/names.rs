//! Names of tensors here and in GGUF, and the order of the rows of queries and keys.

use super::architecture::Architecture;
use crate::llama::LlamaConfig;

/// Names of the layers of a block, and of the norms within its attention: GGUF's and Hugging Face's.
const BLOCK: [(&str, &str); 9] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Names of the norms before the parts of a block.
const NORMS_BEFORE: [(&str, &str); 2] = [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];

/// Names of the norms behind the parts of a block.
const NORMS_AFTER: [(&str, &str); 2] =
    [("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")];

/// Names outside the blocks.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// GGUF's name of a tensor of Hugging Face's name.
pub(super) fn to_gguf(name: &str, norms_after: bool) -> Option<String> {
    let (path, end) = name.rsplit_once('.')?;
    if let Some((ours, _)) = OUTSIDE.iter().find(|(_, theirs)| *theirs == path) {
        return Some(format!("{ours}.{end}"));
    }
    let (number, inner) = path.strip_prefix("model.layers.")?.split_once('.')?;
    let norms = if norms_after { NORMS_AFTER } else { NORMS_BEFORE };
    let (ours, _) = BLOCK.iter().chain(&norms).find(|(_, theirs)| *theirs == inner)?;
    Some(format!("blk.{number}.{ours}.{end}"))
}

/// Hugging Face's path of the matrix that GGUF names, without `.weight`.
pub(super) fn layer_of_gguf(path: &str) -> Option<String> {
    if let Some((_, theirs)) = OUTSIDE.iter().find(|(ours, _)| *ours == path) {
        return Some((*theirs).into());
    }
    let (number, inner) = path.strip_prefix("blk.")?.split_once('.')?;
    // A number written otherwise would be another name of the same layer.
    let canonical = number.parse::<usize>().is_ok_and(|parsed| parsed.to_string() == number);
    let (_, theirs) = BLOCK.iter().find(|(ours, _)| *ours == inner).filter(|_| canonical)?;
    Some(format!("model.layers.{number}.{theirs}"))
}

/// Numbers of heads for queries, and for keys, of a model whose rows GGUF stores in another order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads(Option<[usize; 2]>);

impl Heads {
    pub fn of(config: &LlamaConfig) -> Self {
        let neighbours = Architecture::of(config).neighbours;
        Self(neighbours.then_some([config.num_attention_heads, config.num_key_value_heads]))
    }

    /// Number of heads whose rows GGUF stores in another order, in a tensor of this Hugging Face name; none if it keeps
    /// the order.
    ///
    /// Hugging Face rotates value `i` of a head with value `i + d / 2`, GGUF's Llama value `2 i` with `2 i + 1`.
    pub fn reordered(self, name: &str) -> Option<usize> {
        let [queries, keys] = self.0?;
        let of = |layer: &str| name.contains(&format!(".self_attn.{layer}."));
        if of("q_proj") {
            Some(queries)
        } else if of("k_proj") {
            Some(keys)
        } else {
            None
        }
    }
}

/// Rows in the order of GGUF, from those of Hugging Face.
pub(super) fn interleaved<T: Copy>(values: &[T], heads: usize, rows: usize) -> Vec<T> {
    moved(values, heads, rows, |row, half| row % 2 * half + row / 2)
}

/// Rows in the order of Hugging Face, from those of GGUF.
pub(super) fn in_halves<T: Copy>(values: &[T], heads: usize, rows: usize) -> Vec<T> {
    moved(values, heads, rows, |row, half| row % half * 2 + row / half)
}

/// Rows of each head, each taken from `from` of its number and half the head's width.
fn moved<T: Copy>(values: &[T], heads: usize, rows: usize, from: impl Fn(usize, usize) -> usize) -> Vec<T> {
    let (width, head) = (values.len() / rows.max(1), rows / heads.max(1));
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let source = row / head * head + from(row % head, head / 2);
        out.extend_from_slice(&values[source * width..][..width]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (ours, theirs) in [
            ("blk.3.attn_q", "model.layers.3.self_attn.q_proj"),
            ("token_embd", "model.embed_tokens"),
            ("output", "lm_head"),
        ] {
            assert_eq!(layer_of_gguf(ours).as_deref(), Some(theirs));
            assert_eq!(to_gguf(&format!("{theirs}.weight"), false).as_deref(), Some(format!("{ours}.weight").as_str()));
        }
        for strange in ["blk.03.attn_q", "blk.x.attn_q", "blk.1.attn_z", "rope_freqs"] {
            assert_eq!(layer_of_gguf(strange), None, "{strange}");
        }
    }

    #[test]
    fn rows_of_each_head_interleave_their_halves() {
        // Two heads of four rows of one value.
        let rows = [0, 1, 2, 3, 10, 11, 12, 13];
        let stored = interleaved(&rows, 2, 8);
        assert_eq!(stored, [0, 2, 1, 3, 10, 12, 11, 13]);
        assert_eq!(in_halves(&stored, 2, 8), rows);
    }
}
