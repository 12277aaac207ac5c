//! SentencePiece's byte-pair encoding: pieces with scores, as merges in order.

use std::collections::HashMap;

use serde_json::{Value, json};

/// Character that stands for a space.
pub(super) const SPACE: char = '\u{2581}';

/// The pairs that are merged, in order: of two pairs the one whose piece has the higher score comes first.
pub(super) fn merges(tokens: &[&str], scores: &[f64], mergeable: impl Fn(usize) -> bool) -> Vec<[String; 2]> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|(id, _)| mergeable(*id)).map(|(id, token)| (*token, id)).collect();
    let mut pairs = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| mergeable(*id)) {
        let mut own = Vec::new();
        for (at, _) in token.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (ids.get(&token[..at]), ids.get(&token[at..])) {
                own.push((*left, *right, at));
            }
        }
        own.sort_by_key(|(left, right, _)| (*left, *right));
        pairs.extend(own.into_iter().map(|(_, _, at)| (id, at)));
    }
    pairs.sort_by(|(a, _), (b, _)| scores[*b].total_cmp(&scores[*a]));
    pairs.into_iter().map(|(id, at)| [tokens[id][..at].to_string(), tokens[id][at..].to_string()]).collect()
}

/// Scores that restore the order of the merges: those of pieces that no merge makes are 0, as of single characters.
pub(super) fn scores(tokens: &[String], merges: &[String]) -> Vec<f32> {
    let mut first: HashMap<String, usize> = HashMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        first.entry(merge.replacen(' ', "", 1)).or_insert(rank);
    }
    tokens.iter().map(|token| first.get(token).map_or(0.0, |rank| -(*rank as f32) - 1.0)).collect()
}

/// The parts of a `tokenizer.json` around the vocabulary.
pub(super) fn normalizer(prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE.to_string()});
    match prefix {
        true => {
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE.to_string()}, replace]})
        }
        false => replace,
    }
}

pub(super) fn decoder(prefix: bool) -> Value {
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE.to_string()}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}

/// Returns true if a space is put before every text; none if texts are prepared in another way.
pub(super) fn prefix_of(file: &Value) -> Option<bool> {
    let pre = &file["pre_tokenizer"];
    if pre["type"] == "Metaspace" && pre["replacement"] == SPACE.to_string() && pre["split"] == json!(false) {
        return match (file["normalizer"].is_null(), pre["prepend_scheme"].as_str()) {
            // "first" differs from "always" behind special tokens alone, where llama.cpp puts none.
            (true, Some("first" | "always")) => Some(true),
            (true, Some("never")) => Some(false),
            _ => None,
        };
    }
    [true, false].into_iter().find(|prefix| pre.is_null() && file["normalizer"] == normalizer(*prefix))
}
