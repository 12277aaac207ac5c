//! The container of the format GGUF: a header with metadata, a list of tensors, and their data.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::dequantise::dequantise;
use super::types::TensorType;
use super::value::{Array, Kind, Value};
use crate::error::ModelError;
use crate::hub::open::open;

/// The first bytes of every file.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Key of the alignment of tensors.
pub(super) const ALIGNMENT: &str = "general.alignment";
/// Alignment where the file states none.
pub(super) const USUAL_ALIGNMENT: usize = 32;
/// Maximum number of bytes of a tensor's name, the limit of other programs.
pub(super) const NAME_BYTES: usize = 63;
/// Maximum number of dimensions of a tensor.
const DIMENSIONS: u32 = 4;

/// A mapped file whose header has been read and checked against its size.
#[derive(Clone)]
pub struct GgufFile {
    path: PathBuf,
    map: Arc<Mmap>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

/// Shape, type and place of a tensor.
#[derive(Clone, Debug)]
struct Tensor {
    /// As PyTorch lists it: the last dimension is the one whose values are next to each other.
    shape: Vec<usize>,
    kind: TensorType,
    bytes: Range<usize>,
}

impl fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GgufFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

/// Returns true for a file that begins as files of this format do.
pub fn is_gguf(path: &Path) -> bool {
    let begins = |path: &Path| -> std::io::Result<bool> {
        let mut begin = [0; 4];
        std::io::Read::read_exact(&mut File::open(path)?, &mut begin)?;
        Ok(&begin == MAGIC)
    };
    path.is_file() && begins(path).unwrap_or(false)
}

impl GgufFile {
    /// Opens a file and checks its header; the tensors wait for [`GgufFile::values`].
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = open(path)?;
        // SAFETY: the map is only read. A file that another process truncates meanwhile ends this process by SIGBUS, as
        // it does for every program that maps model files.
        let map = unsafe { Mmap::map(&file) }.map_err(ModelError::io(path))?;
        let bad = |reason| ModelError::File { path: path.to_path_buf(), reason };
        let mut header = Header { bytes: &map, at: 0 };
        let (metadata, count) = header.metadata().map_err(bad)?;
        let tensors = header.tensors(&metadata, count).map_err(|problem| match problem {
            Problem::Header(reason) => bad(reason),
            Problem::Tensor(tensor, reason) => ModelError::Tensor { path: path.to_path_buf(), tensor, reason },
        })?;
        Ok(Self { path: path.to_path_buf(), map: Arc::new(map), metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keys of the metadata, in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Keys of the metadata with their values in words, in alphabetical order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, String)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), self.shown(value)))
    }

    /// Names, shapes and types of the tensors, in alphabetical order. Shapes are listed as PyTorch lists them.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], TensorType)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice(), tensor.kind))
    }

    /// Shape of a tensor; none if the file has no such tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// Type and bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Result<(TensorType, &[u8]), ModelError> {
        match self.tensors.get(name) {
            Some(tensor) => Ok((tensor.kind, &self.map[tensor.bytes.clone()])),
            None => Err(self.tensor_error(name, "is missing".into())),
        }
    }

    /// Values of a tensor, row after row, dequantised.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let (kind, bytes) = self.bytes(name)?;
        Ok(dequantise(kind, bytes))
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => Ok(Some(self.string(range))),
            Some(other) => Err(self.key_error(key, format!("is {}; it must be a text", self.shown(other)))),
        }
    }

    /// A whole number of the metadata.
    pub fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let number = match value {
            Value::Unsigned(number) => usize::try_from(*number).ok(),
            Value::Signed(number) => usize::try_from(*number).ok(),
            _ => None,
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(self.key_error(key, format!("is {}; it must be a whole number", self.shown(value)))),
        }
    }

    /// A number of the metadata, in the shortest digits that its type has.
    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Single(number)) => Ok(Some(digits(*number))),
            Some(Value::Double(number)) => Ok(Some(*number)),
            Some(Value::Unsigned(number)) => Ok(Some(*number as f64)),
            Some(Value::Signed(number)) => Ok(Some(*number as f64)),
            Some(other) => Err(self.key_error(key, format!("is {}; it must be a number", self.shown(other)))),
        }
    }

    /// A flag of the metadata.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.key_error(key, format!("is {}; it must be true or false", self.shown(other)))),
        }
    }

    /// The texts of an array of the metadata.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, ModelError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let Value::List(Array { kind: Kind::Text, count, bytes }) = value else {
            return Err(self.key_error(key, format!("is {}; it must be an array of texts", self.shown(value))));
        };
        let mut inside = Header { bytes: &self.map[bytes.clone()], at: 0 };
        let mut texts = Vec::with_capacity(*count);
        for _ in 0..*count {
            let range = inside.string("a text").map_err(|reason| self.key_error(key, reason))?;
            texts.push(self.string(&(bytes.start + range.start..bytes.start + range.end)));
        }
        Ok(Some(texts))
    }

    /// The numbers of an array of the metadata.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, ModelError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let wrong = || self.key_error(key, format!("is {}; it must be an array of numbers", self.shown(value)));
        let Value::List(Array { kind, count, bytes }) = value else { return Err(wrong()) };
        let mut inside = Header { bytes: &self.map[bytes.clone()], at: 0 };
        let mut numbers = Vec::with_capacity(*count);
        for _ in 0..*count {
            numbers.push(match inside.value(*kind).map_err(|reason| self.key_error(key, reason))? {
                Value::Unsigned(number) => number as f64,
                Value::Signed(number) => number as f64,
                Value::Single(number) => digits(number),
                Value::Double(number) => number,
                _ => return Err(wrong()),
            });
        }
        Ok(Some(numbers))
    }

    /// A value in the words of a message.
    pub(super) fn shown(&self, value: &Value) -> String {
        const LONGEST: usize = 60;
        match value {
            Value::Unsigned(number) => number.to_string(),
            Value::Signed(number) => number.to_string(),
            Value::Single(number) => number.to_string(),
            Value::Double(number) => number.to_string(),
            Value::Flag(flag) => flag.to_string(),
            Value::Text(range) => match self.string(range) {
                text if text.chars().count() > LONGEST => {
                    format!("\"{}..\"", text.chars().take(LONGEST).collect::<String>())
                }
                text => format!("\"{text}\""),
            },
            Value::List(Array { kind, count, .. }) => format!("an array of {count} of type {}", kind.name()),
        }
    }

    fn string(&self, range: &Range<usize>) -> &str {
        match std::str::from_utf8(&self.map[range.clone()]) {
            Ok(text) => text,
            Err(_) => unreachable!("the text was checked when the file was opened"),
        }
    }

    pub(super) fn key_error(&self, key: &str, reason: String) -> ModelError {
        ModelError::File { path: self.path.clone(), reason: format!("key {key}: {reason}") }
    }

    pub(super) fn tensor_error(&self, name: &str, reason: String) -> ModelError {
        ModelError::Tensor { path: self.path.clone(), tensor: name.to_string(), reason }
    }
}

/// The number that the digits of an f32 say: 1e-5 and not the f32 next to it.
fn digits(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

enum Problem {
    Header(String),
    Tensor(String, String),
}

impl From<String> for Problem {
    fn from(reason: String) -> Self {
        Self::Header(reason)
    }
}

/// A reader of the header: nothing beyond the end of the file is read, or reserved.
struct Header<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Header<'_> {
    fn take(&mut self, count: usize, what: &str) -> Result<&[u8], String> {
        match self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end)) {
            Some(bytes) => {
                self.at += count;
                Ok(bytes)
            }
            None => Err(format!(
                "ends at byte {}, within {what} of {count} bytes at {}: it is cut short or damaged, fetch it again",
                self.bytes.len(),
                self.at
            )),
        }
    }

    fn number<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.number(what)?))
    }

    fn size(&mut self, what: &str) -> Result<usize, String> {
        let size = u64::from_le_bytes(self.number(what)?);
        usize::try_from(size).map_err(|_| format!("{what} is {size}, more than this machine can address"))
    }

    /// Place of a text whose UTF-8 has been checked.
    fn string(&mut self, what: &str) -> Result<Range<usize>, String> {
        let length = self.size(what)?;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|error| format!("{what} is not UTF-8 text ({error})"))?;
        Ok(self.at - length..self.at)
    }

    fn name(&mut self, what: &str) -> Result<String, String> {
        let range = self.string(what)?;
        Ok(String::from_utf8_lossy(&self.bytes[range]).into_owned())
    }

    fn metadata(&mut self) -> Result<(BTreeMap<String, Value>, usize), String> {
        let magic = self.bytes.get(..4).unwrap_or_default();
        if magic != MAGIC {
            return Err("is no GGUF file: it does not begin with GGUF".into());
        }
        self.at = 4;
        let version = self.u32("the version")?;
        match version {
            2 | 3 => {}
            other if (2..=3).contains(&other.swap_bytes()) => {
                return Err("is in big-endian order; only little-endian files can be read: convert it again".into());
            }
            other => return Err(format!("has version {other}; 2 and 3 can be read: convert it again")),
        }
        let (tensors, pairs) = (self.size("the number of tensors")?, self.size("the number of keys")?);
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let key = self.name("a key")?;
            let kind = self.u32("the type of a key").and_then(Kind::of_id);
            let value = kind.and_then(|kind| self.value(kind)).map_err(|reason| format!("key {key}: {reason}"))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("key {key} is in the file twice"));
            }
        }
        Ok((metadata, tensors))
    }

    fn value(&mut self, kind: Kind) -> Result<Value, String> {
        const WHAT: &str = "a value";
        Ok(match kind {
            Kind::U8 => Value::Unsigned(u8::from_le_bytes(self.number(WHAT)?).into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(self.number(WHAT)?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(self.number(WHAT)?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(self.number(WHAT)?).into()),
            Kind::U32 => Value::Unsigned(self.u32(WHAT)?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(self.number(WHAT)?).into()),
            Kind::F32 => Value::Single(f32::from_le_bytes(self.number(WHAT)?)),
            Kind::U64 => Value::Unsigned(u64::from_le_bytes(self.number(WHAT)?)),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.number(WHAT)?)),
            Kind::F64 => Value::Double(f64::from_le_bytes(self.number(WHAT)?)),
            Kind::Flag => match u8::from_le_bytes(self.number(WHAT)?) {
                0 => Value::Flag(false),
                1 => Value::Flag(true),
                other => return Err(format!("is {other}; true is 1 and false is 0")),
            },
            Kind::Text => Value::Text(self.string("a text")?),
            Kind::List => {
                let kind = Kind::of_id(self.u32("the type of an array")?)?;
                let count = self.size("the length of an array")?;
                let begin = self.at;
                match kind.bytes() {
                    Some(bytes) => {
                        let bytes = count.checked_mul(bytes).ok_or_else(|| format!("claims {count} elements"))?;
                        self.take(bytes, "an array")?;
                    }
                    None if kind == Kind::List => return Err("has an array of arrays, which no model has".into()),
                    None => {
                        for _ in 0..count {
                            self.string("a text of an array")?;
                        }
                    }
                }
                Value::List(Array { kind, count, bytes: begin..self.at })
            }
        })
    }

    /// The list of tensors, each within the file.
    fn tensors(
        &mut self,
        metadata: &BTreeMap<String, Value>,
        count: usize,
    ) -> Result<BTreeMap<String, Tensor>, Problem> {
        let alignment = match metadata.get(ALIGNMENT) {
            None => USUAL_ALIGNMENT,
            Some(Value::Unsigned(number)) if number.is_power_of_two() && *number <= 1 << 20 => *number as usize,
            Some(_) => return Err(format!("key {ALIGNMENT}: it must be a power of two, at most 2^20").into()),
        };
        let mut tensors = BTreeMap::new();
        for _ in 0..count {
            let name = self.name("the name of a tensor")?;
            let tensor = self.tensor(alignment).map_err(|reason| Problem::Tensor(name.clone(), reason))?;
            if name.len() > NAME_BYTES {
                return Err(Problem::Tensor(name, format!("has a name of more than {NAME_BYTES} bytes")));
            }
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(Problem::Tensor(name, "is in the file twice".into()));
            }
        }
        let data = self.at.next_multiple_of(alignment);
        let mut places = Vec::with_capacity(tensors.len());
        for (name, tensor) in &mut tensors {
            let Range { start, end } = tensor.bytes;
            tensor.bytes = data.saturating_add(start)..data.saturating_add(end);
            if tensor.bytes.end > self.bytes.len() {
                let reason = format!(
                    "ends at byte {} of the file, which has {}: it is cut short, fetch it again",
                    tensor.bytes.end,
                    self.bytes.len()
                );
                return Err(Problem::Tensor(name.clone(), reason));
            }
            places.push((tensor.bytes.clone(), name.clone()));
        }
        places.sort_by_key(|(bytes, _)| (bytes.start, bytes.end));
        for pair in places.windows(2) {
            if pair[1].0.start < pair[0].0.end {
                return Err(Problem::Tensor(pair[1].1.clone(), format!("overlaps with {}", pair[0].1)));
            }
        }
        Ok(tensors)
    }

    /// One entry; its bytes count from the beginning of the data.
    fn tensor(&mut self, alignment: usize) -> Result<Tensor, String> {
        let dimensions = self.u32("the number of dimensions")?;
        if !(1..=DIMENSIONS).contains(&dimensions) {
            return Err(format!("has {dimensions} dimensions; from 1 to {DIMENSIONS} are possible"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.size("a size of a tensor")?);
        }
        shape.reverse();
        let kind = TensorType::of_id(self.u32("the type of a tensor")?)?;
        let start = self.size("the offset of a tensor")?;
        if !start.is_multiple_of(alignment) {
            return Err(format!("begins at {start} of the data, which is no multiple of the alignment {alignment}"));
        }
        let row = shape.last().copied().unwrap_or_default();
        if !row.is_multiple_of(kind.block_values()) {
            let (name, block) = (kind.name(), kind.block_values());
            return Err(format!("has rows of {row} values; blocks of {name} have {block}"));
        }
        let values = shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
        let bytes = values.map(|values| values / kind.block_values()).and_then(|n| n.checked_mul(kind.block_bytes()));
        let end = bytes.and_then(|bytes| start.checked_add(bytes));
        let end = end.ok_or_else(|| format!("has the shape {shape:?}, more than this machine can address"))?;
        Ok(Tensor { shape, kind, bytes: start..end })
    }
}
