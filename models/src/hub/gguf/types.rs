//! Types of tensors: how many values a block has, in how many bytes.

pub use lowrank_kernels::narrow::ggml::BlockType;

/// Type of a tensor: plain numbers, or blocks of quantised ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the format
pub enum TensorType {
    F32,
    F16,
    BF16,
    Blocks(BlockType),
}

/// Description of a type.
struct Facts {
    kind: TensorType,
    name: &'static str,
    /// Number in the list of tensors.
    id: u32,
    /// `general.file_type` of a file whose matrices have this type.
    file_type: u32,
    /// Values in a block.
    values: usize,
    /// Bytes of a block.
    bytes: usize,
}

const fn facts(kind: TensorType, name: &'static str, [id, file_type]: [u32; 2], [values, bytes]: [usize; 2]) -> Facts {
    Facts { kind, name, id, file_type, values, bytes }
}

const fn blocks(kind: BlockType, name: &'static str, ids: [u32; 2]) -> Facts {
    facts(TensorType::Blocks(kind), name, ids, [kind.values(), kind.bytes()])
}

const TYPES: [Facts; 15] = [
    facts(TensorType::F32, "F32", [0, 0], [1, 4]),
    facts(TensorType::F16, "F16", [1, 1], [1, 2]),
    facts(TensorType::BF16, "BF16", [30, 32], [1, 2]),
    blocks(BlockType::Q4_0, "Q4_0", [2, 2]),
    blocks(BlockType::Q4_1, "Q4_1", [3, 3]),
    blocks(BlockType::Q5_0, "Q5_0", [6, 8]),
    blocks(BlockType::Q5_1, "Q5_1", [7, 9]),
    blocks(BlockType::Q8_0, "Q8_0", [8, 7]),
    blocks(BlockType::Q2K, "Q2_K", [10, 10]),
    blocks(BlockType::Q3K, "Q3_K", [11, 12]),
    blocks(BlockType::Q4K, "Q4_K", [12, 15]),
    blocks(BlockType::Q5K, "Q5_K", [13, 17]),
    blocks(BlockType::Q6K, "Q6_K", [14, 18]),
    blocks(BlockType::Iq4Nl, "IQ4_NL", [20, 25]),
    blocks(BlockType::Iq4Xs, "IQ4_XS", [23, 30]),
];

/// Types that exist and cannot be read.
const OTHERS: [(u32, &str); 16] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl TensorType {
    /// The type of a number in the list of tensors; the reason if it cannot be read.
    pub(super) fn of_id(id: u32) -> Result<Self, String> {
        if let Some(found) = TYPES.iter().find(|facts| facts.id == id) {
            return Ok(found.kind);
        }
        let name = OTHERS.iter().find(|(known, _)| *known == id).map_or("unknown", |(_, name)| name);
        let known: Vec<&str> = TYPES.iter().map(|facts| facts.name).collect();
        Err(format!("has type {id} ({name}); {} can be read: convert the file to one of them", known.join(", ")))
    }

    fn facts(self) -> &'static Facts {
        match TYPES.iter().find(|facts| facts.kind == self) {
            Some(facts) => facts,
            None => unreachable!("every type is in the list"),
        }
    }

    /// Name in the format.
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    pub(super) fn id(self) -> u32 {
        self.facts().id
    }

    pub(super) fn file_type(self) -> u32 {
        self.facts().file_type
    }

    /// Number of values in a block; the rows of a tensor have a multiple of it.
    pub fn block_values(self) -> usize {
        self.facts().values
    }

    /// Number of bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.facts().bytes
    }
}
