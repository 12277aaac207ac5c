//! Types of the numbers in weight files.

use std::collections::BTreeMap;
use std::str::FromStr;

use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Type of the numbers of a tensor in a file. All computation is in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FileType {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits of IEEE 754.
    F16,
    /// The upper 16 bits of an f32.
    BF16,
}

impl FileType {
    /// All types.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// Its short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Its name under `dtype` in `config.json`.
    pub(super) fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// Its name in safetensors files.
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl FromStr for FileType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| name == kind.name() || name == kind.torch_name())
            .ok_or_else(|| format!("\"{name}\" is not a type of weight files; f32, f16 and bf16 are"))
    }
}

/// Types of the tensors of a model folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileTypes {
    own: BTreeMap<String, FileType>,
    usual: FileType,
    held: bool,
}

impl FileTypes {
    /// One type for all tensors.
    pub fn all(kind: FileType) -> Self {
        Self { own: BTreeMap::new(), usual: kind, held: false }
    }

    /// Each tensor in the type that the model holds it in.
    pub fn held() -> Self {
        Self { held: true, ..Self::default() }
    }

    /// Returns true for types that are those of the model.
    pub(super) fn are_held(&self) -> bool {
        self.held
    }

    /// The types of these tensors; other ones get the type with the most bytes among them.
    pub(super) fn of<'a>(tensors: impl Iterator<Item = (&'a str, FileType, u64)>) -> Self {
        let mut own = BTreeMap::new();
        let mut bytes = [0; FileType::ALL.len()];
        for (name, kind, size) in tensors {
            own.insert(name.to_string(), kind);
            bytes[kind as usize] += size;
        }
        // Of equal ones the first, which is the widest.
        let most = bytes.iter().max().copied().unwrap_or_default();
        let usual = FileType::ALL.into_iter().zip(bytes).find(|(_, bytes)| *bytes == most);
        Self { own, usual: usual.map_or(FileType::F32, |(kind, _)| kind), held: false }
    }

    /// Type of a tensor.
    pub fn get(&self, name: &str) -> FileType {
        self.own.get(name).copied().unwrap_or(self.usual)
    }

    /// Returns true if no value is rounded.
    pub fn are_exact(&self) -> bool {
        self.usual == FileType::F32 && self.own.values().all(|kind| *kind == FileType::F32)
    }

    /// Type of most of the weights.
    pub fn usual(&self) -> FileType {
        self.usual
    }
}
