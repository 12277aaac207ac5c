//! Writing files: header, metadata, and tensors one after the other.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::container::{MAGIC, NAME_BYTES, USUAL_ALIGNMENT};
use super::quantise::quantise;
use super::types::TensorType;
use super::value::Kind;
use crate::error::ModelError;

/// Version of the format.
const VERSION: u32 = 3;

/// A value of the metadata to write.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Entry {
    U32(u32),
    F32(f32),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// Keys with their values, in the order in which they are written.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Metadata {
    entries: Vec<(String, Entry)>,
}

impl Metadata {
    pub fn put(&mut self, key: &str, value: Entry) {
        self.entries.push((key.to_string(), value));
    }

    pub fn extend(&mut self, other: Metadata) {
        self.entries.extend(other.entries);
    }
}

/// A tensor to write: its values are asked for when it is its turn.
pub(super) struct Written<'a> {
    pub name: String,
    /// As PyTorch lists it.
    pub shape: Vec<usize>,
    pub kind: TensorType,
    pub values: Box<dyn FnOnce() -> Result<Vec<f32>, ModelError> + 'a>,
}

/// Writes a file. An interruption leaves part of it: use a new name and rename it.
pub(super) fn write(path: &Path, metadata: &Metadata, tensors: Vec<Written>) -> Result<(), ModelError> {
    let header = header(path, metadata, &tensors)?;
    let file = File::create(path).map_err(ModelError::io(path))?;
    let mut out = BufWriter::new(file);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(ModelError::io(path));
    put(&header)?;
    put(&padding(header.len()))?;
    let mut bytes = Vec::new();
    for Written { name, shape, kind, values } in tensors {
        let values = values()?;
        debug_assert_eq!(values.len(), shape.iter().product::<usize>());
        bytes.clear();
        quantise(kind, &values, &mut bytes).map_err(|reason| ModelError::Tensor {
            path: path.into(),
            tensor: name,
            reason,
        })?;
        put(&bytes)?;
        put(&padding(bytes.len()))?;
    }
    out.flush().map_err(ModelError::io(path))
}

fn padding(length: usize) -> Vec<u8> {
    vec![0; length.next_multiple_of(USUAL_ALIGNMENT) - length]
}

fn header(path: &Path, metadata: &Metadata, tensors: &[Written]) -> Result<Vec<u8>, ModelError> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    size(tensors.len(), &mut out);
    size(metadata.entries.len(), &mut out);
    for (key, entry) in &metadata.entries {
        text(key, &mut out);
        value(entry, &mut out);
    }
    let mut offset = 0;
    for Written { name, shape, kind, .. } in tensors {
        let bad = |reason: String| ModelError::Tensor { path: path.into(), tensor: name.clone(), reason };
        if name.len() > NAME_BYTES {
            return Err(bad(format!("has a name of more than {NAME_BYTES} bytes")));
        }
        text(name, &mut out);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|dimension| size(*dimension, &mut out));
        out.extend(kind.id().to_le_bytes());
        size(offset, &mut out);
        let bytes = shape.iter().product::<usize>() / kind.block_values() * kind.block_bytes();
        offset += bytes.next_multiple_of(USUAL_ALIGNMENT);
    }
    Ok(out)
}

fn size(value: usize, out: &mut Vec<u8>) {
    out.extend((value as u64).to_le_bytes());
}

fn text(value: &str, out: &mut Vec<u8>) {
    size(value.len(), out);
    out.extend(value.as_bytes());
}

fn value(entry: &Entry, out: &mut Vec<u8>) {
    let mut kind = |kind: Kind| out.extend(kind.id().to_le_bytes());
    match entry {
        Entry::U32(number) => {
            kind(Kind::U32);
            out.extend(number.to_le_bytes());
        }
        Entry::F32(number) => {
            kind(Kind::F32);
            out.extend(number.to_le_bytes());
        }
        Entry::Flag(flag) => {
            kind(Kind::Flag);
            out.push(u8::from(*flag));
        }
        Entry::Text(content) => {
            kind(Kind::Text);
            text(content, out);
        }
        Entry::Texts(texts) => {
            list(Kind::Text, texts.len(), out);
            texts.iter().for_each(|content| text(content, out));
        }
        Entry::I32s(numbers) => {
            list(Kind::I32, numbers.len(), out);
            numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
        Entry::F32s(numbers) => {
            list(Kind::F32, numbers.len(), out);
            numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
    }
}

fn list(kind: Kind, count: usize, out: &mut Vec<u8>) {
    out.extend(Kind::List.id().to_le_bytes());
    out.extend(kind.id().to_le_bytes());
    size(count, out);
}
