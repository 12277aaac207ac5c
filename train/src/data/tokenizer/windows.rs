//! Encoding of texts of any length in windows, since encoding a text takes about a hundred times its size.

use std::ops::Range;

use crate::data::DataError;

/// Token with its byte range in the text.
pub(super) type Token = (u32, Range<usize>);

/// Maximum size of a text that is encoded at once.
pub(super) const AT_ONCE: usize = 1 << 20;
/// Bytes of a window, and of its overlap with the previous one.
const WINDOW: usize = 1 << 18;
const SHARED: usize = 1 << 13;
/// Number of tokens that must be equal in both windows where they are joined.
const EQUAL: usize = 8;

/// Encodes a text; `each` receives the tokens in order, in groups, and returns whether to continue.
///
/// In the overlap of two windows, both encodings have some consecutive tokens in common: from there the second is used,
/// so that the tokens are those of the whole text if a token depends only on some thousand bytes around it.
pub(super) fn encode(
    text: &str,
    encode: impl Fn(&str) -> Result<Vec<Token>, DataError>,
    each: impl FnMut(Vec<Token>) -> bool,
) -> Result<(), DataError> {
    sized(text, [AT_ONCE, WINDOW, SHARED], encode, each)
}

fn sized(
    text: &str,
    [at_once, window, shared]: [usize; 3],
    encode: impl Fn(&str) -> Result<Vec<Token>, DataError>,
    mut each: impl FnMut(Vec<Token>) -> bool,
) -> Result<(), DataError> {
    if text.len() <= at_once {
        each(encode(text)?);
        return Ok(());
    }
    let mut pending: Vec<Token> = Vec::new();
    let mut from = 0;
    loop {
        let to = text.floor_char_boundary((from + window).min(text.len()));
        let mut tokens = encode(&text[from..to])?;
        tokens.iter_mut().for_each(|(_, span)| *span = span.start + from..span.end + from);
        let joined = join(pending, tokens, from + shared / 4);
        if to == text.len() {
            each(joined);
            return Ok(());
        }
        // Tokens that the next window may change are held back.
        from = text.floor_char_boundary(to - shared);
        let sure = joined.partition_point(|(_, span)| span.end <= from);
        pending = joined;
        let rest = pending.split_off(sure);
        if !each(pending) {
            return Ok(());
        }
        pending = rest;
    }
}

/// Joins the tokens of two windows; the second is used from the first position after `beyond` where both have the same
/// tokens.
fn join(mut first: Vec<Token>, mut second: Vec<Token>, beyond: usize) -> Vec<Token> {
    if first.is_empty() {
        return second;
    }
    let from = first.partition_point(|(_, span)| span.start < beyond);
    for at in from..first.len().saturating_sub(EQUAL) {
        let start = first[at].1.start;
        let there = second.partition_point(|(_, span)| span.start < start);
        if second.get(there..there + EQUAL).is_some_and(|second| *second == first[at..at + EQUAL]) {
            first.truncate(at);
            first.extend(second.drain(there..));
            return first;
        }
    }
    // No agreement: a run without a boundary. The second window continues after the token that ends next.
    let end = first.get(from).map_or(beyond, |(_, span)| span.end);
    first.truncate(from + 1);
    first.extend(second.into_iter().filter(|(_, span)| span.start >= end));
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words as tokens: their length, or 0 for the first of a text, as in tokenizers that add a space before it.
    fn words(text: &str) -> Result<Vec<Token>, DataError> {
        let mut tokens = Vec::new();
        let mut at = 0;
        for word in text.split_inclusive(' ') {
            tokens.push((if at == 0 { 0 } else { word.len() as u32 }, at..at + word.len()));
            at += word.len();
        }
        Ok(tokens)
    }

    #[test]
    fn windows_give_the_tokens_of_the_whole() {
        let text: String = (0..4000).map(|i| "ä".repeat(1 + i * 7 % 11) + " ").collect();
        let mut all = Vec::new();
        let mut groups = 0;
        sized(&text, [100, 2000, 400], words, |tokens| {
            groups += 1;
            all.extend(tokens);
            true
        })
        .unwrap();
        assert!(groups > 10);
        assert_eq!(all, words(&text).unwrap());
        let mut seen = 0;
        sized(&text, [100, 2000, 400], words, |tokens| {
            seen += tokens.len();
            false
        })
        .unwrap();
        assert!(seen > 0 && seen < all.len() / 4);
    }

    #[test]
    fn text_without_a_boundary_is_encoded_all_the_same() {
        let text = "x".repeat(10_000);
        let mut end = 0;
        sized(&text, [100, 2000, 400], words, |tokens| {
            for (_, span) in tokens {
                assert!(span.start >= end);
                end = span.end;
            }
            true
        })
        .unwrap();
        assert!(end >= text.len() - 2000);
    }
}
