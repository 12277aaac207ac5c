//! Damaged variants of a file: flipped bits, cut, doubled and foreign parts, numbers out of range.

use rand::rngs::StdRng;
use rand::{Rng, RngExt};

/// Tokens that parsers treat specially.
const TOKENS: [&[u8]; 22] = [
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"18446744073709551615",
    b"9223372036854775807",
    b"4294967296",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"[[[[[[[[[[[[[[[[",
    b"{{",
    b"{%",
    b"\"",
    b"\\u0000",
    b"\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xf0\x9f\x98",
    b"../",
    b"\0\0\0\0\0\0\0\x80",
];

/// Returns the bytes with one to four changes.
pub fn damaged(bytes: &[u8], random: &mut StdRng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..random.random_range(1..=4) {
        change(&mut bytes, random);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, random: &mut StdRng) {
    let at = random.random_range(0..=bytes.len());
    let end = (at + span(random)).min(bytes.len());
    match random.random_range(0..9) {
        0 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
        1 if at < bytes.len() => bytes[at] = random.random(),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let doubled = bytes[at..end].to_vec();
            insert(bytes, at, &doubled);
        }
        5 => insert(bytes, at, TOKENS[random.random_range(0..TOKENS.len())]),
        6 => replace_number(bytes, at, TOKENS[random.random_range(0..TOKENS.len())]),
        7 => {
            let mut noise = vec![0; span(random)];
            random.fill_bytes(&mut noise);
            insert(bytes, at, &noise);
        }
        // The length that many binary files start with.
        _ => {
            let number = [0, 1, u64::MAX, 1 << 32, 1 << 40, bytes.len() as u64][random.random_range(0..6)];
            bytes.iter_mut().zip(number.to_le_bytes()).for_each(|(byte, new)| *byte = new);
        }
    }
}

fn span(random: &mut StdRng) -> usize {
    1 << random.random_range(0..7)
}

fn insert(bytes: &mut Vec<u8>, at: usize, part: &[u8]) {
    bytes.splice(at..at, part.iter().copied());
}

/// Replaces the first digits behind a position.
fn replace_number(bytes: &mut Vec<u8>, at: usize, with: &[u8]) {
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit).map(|offset| at + offset) else { return };
    let digits = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    bytes.splice(start..start + digits, with.iter().copied());
}
