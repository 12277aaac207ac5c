//! Values of the metadata.

use std::ops::Range;

/// Type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Flag,
    Text,
    List,
    U64,
    I64,
    F64,
}

/// The types in the order of their numbers, with their names and the bytes of those of a fixed size.
const KINDS: [(Kind, &str, Option<usize>); 13] = [
    (Kind::U8, "u8", Some(1)),
    (Kind::I8, "i8", Some(1)),
    (Kind::U16, "u16", Some(2)),
    (Kind::I16, "i16", Some(2)),
    (Kind::U32, "u32", Some(4)),
    (Kind::I32, "i32", Some(4)),
    (Kind::F32, "f32", Some(4)),
    (Kind::Flag, "bool", Some(1)),
    (Kind::Text, "text", None),
    (Kind::List, "array", None),
    (Kind::U64, "u64", Some(8)),
    (Kind::I64, "i64", Some(8)),
    (Kind::F64, "f64", Some(8)),
];

impl Kind {
    pub fn of_id(id: u32) -> Result<Self, String> {
        match KINDS.get(id as usize) {
            Some((kind, ..)) => Ok(*kind),
            None => Err(format!("has the type {id}, which does not exist: the file is damaged")),
        }
    }

    pub fn id(self) -> u32 {
        self as u32
    }

    pub fn name(self) -> &'static str {
        KINDS[self as usize].1
    }

    /// Bytes of a value; none if they differ.
    pub fn bytes(self) -> Option<usize> {
        KINDS[self as usize].2
    }
}

/// A value; texts and arrays stay where they are in the file.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Single(f32),
    Double(f64),
    Flag(bool),
    Text(Range<usize>),
    List(Array),
}

/// An array within the file.
#[derive(Clone, Debug)]
pub(super) struct Array {
    pub kind: Kind,
    pub count: usize,
    pub bytes: Range<usize>,
}
