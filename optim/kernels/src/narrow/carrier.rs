//! Tensors that hold matrices in codes: products, gradients, ids and adapters see a matrix, of which no value is stored in f32.
//!
//! On the CPU backend the tensor is a view of one row, repeated, whose values are NaN; the codes lie behind them in the same memory. The
//! operations of this crate read the codes; anything else reads NaN, so that no value is made up in silence.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};
use burn_flex::{FlexTensor, Layout};

use super::four_bit::{FourBit, NESTED_BLOCK, Scales, restore};
use super::ggml::{BlockType, Blocks};
use super::groups::QuantisedGroups;
use super::matrix::{Codes, PackedMatrix};
use crate::ops::on_flex;

/// First word of the memory, a NaN.
const MARK: u32 = 0x7fc0_4c52;
/// Words after the row of NaN: another mark, kind, both sides, order, block.
const HEADER: usize = 6;
const SECOND_MARK: u32 = 0x4b43_4150;

/// Kinds of codes.
const GROUPS: u32 = 0;
const PLAIN: u32 = 1;
const DOUBLE: u32 = 2;
/// That of the first of [`BlockType::ALL`]; the others follow.
const BLOCKS: u32 = 16;

/// Memory of a matrix: a row of NaN, a header and the codes. A word before the row keeps a single one from being taken for all of the memory.
fn words(matrix: &PackedMatrix) -> Vec<u32> {
    let [d_in, d_out] = matrix.shape;
    let mut words = vec![MARK; 1 + d_out];
    let (kind, block) = match &matrix.codes {
        Codes::Groups(_, group) => (GROUPS, *group),
        Codes::FourBit(FourBit { scales: Scales::Plain(_), block, .. }) => (PLAIN, *block),
        Codes::FourBit(FourBit { block, .. }) => (DOUBLE, *block),
        Codes::Blocks(Blocks { kind, .. }) => (BLOCKS + number_of(*kind), kind.values()),
    };
    words.extend([SECOND_MARK, kind, d_in as u32, d_out as u32, u32::from(matrix.transposed), block as u32]);
    let bytes = |words: &mut Vec<u32>, bytes: &[u8]| {
        words.extend(bytes.chunks(4).map(|part| {
            let mut word = [0; 4];
            word[..part.len()].copy_from_slice(part);
            u32::from_le_bytes(word)
        }));
    };
    let floats = |words: &mut Vec<u32>, floats: &[f32]| words.extend(floats.iter().map(|x| x.to_bits()));
    match &matrix.codes {
        Codes::Groups(groups, _) => {
            floats(&mut words, &groups.scales);
            bytes(&mut words, &groups.zeros.iter().map(|zero| *zero as u8).collect::<Vec<u8>>());
            bytes(&mut words, &groups.codes);
        }
        Codes::FourBit(stored) => {
            floats(&mut words, &stored.map);
            match &stored.scales {
                Scales::Plain(scales) => floats(&mut words, scales),
                Scales::Double { codes, nested, map, offset } => {
                    floats(&mut words, &[*offset]);
                    floats(&mut words, &map[..]);
                    floats(&mut words, nested);
                    bytes(&mut words, codes);
                }
            }
            bytes(&mut words, &stored.packed);
        }
        Codes::Blocks(blocks) => bytes(&mut words, &blocks.bytes),
    }
    words
}

/// Place of a kind in the list of all.
fn number_of(kind: BlockType) -> u32 {
    BlockType::ALL.iter().position(|known| *known == kind).unwrap_or_default() as u32
}

/// A matrix in codes, in the memory of its tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    pub shape: [usize; 2],
    pub transposed: bool,
    block: usize,
    values: Values<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Values<'a> {
    Groups { codes: &'a [u8], scales: Floats<'a>, zeros: &'a [u8] },
    FourBit { packed: &'a [u8], map: Floats<'a>, scales: BlockScales<'a> },
    Blocks { kind: BlockType, bytes: &'a [u8] },
}

#[derive(Clone, Copy, Debug)]
enum BlockScales<'a> {
    Plain(Floats<'a>),
    Double { codes: &'a [u8], nested: Floats<'a>, map: Floats<'a>, offset: f32 },
}

/// Floats in memory that may begin anywhere.
#[derive(Clone, Copy, Debug)]
struct Floats<'a>(&'a [[u8; 4]]);

impl Floats<'_> {
    #[inline(always)]
    fn at(&self, index: usize) -> f32 {
        f32::from_le_bytes(self.0[index])
    }

    fn to_vec(self) -> Vec<f32> {
        self.0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }
}

/// Takes parts off the memory of a matrix.
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (part, rest) = self.0.split_at(count.next_multiple_of(4));
        self.0 = rest;
        &part[..count]
    }

    fn floats(&mut self, count: usize) -> Floats<'a> {
        Floats(self.bytes(4 * count).as_chunks().0)
    }
}

impl<'a> View<'a> {
    /// The matrix in the memory of a tensor of rows of this number of values; none if it holds no codes.
    fn read(memory: &'a [u8], row: usize) -> Option<Self> {
        let word = |at: usize| {
            let bytes = memory.get(4 * at..4 * at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        if word(0)? != MARK || word(1 + row)? != SECOND_MARK {
            return None;
        }
        let [kind, d_in, d_out, order, block] = std::array::from_fn(|at| word(row + 2 + at));
        let shape = [d_in? as usize, d_out? as usize];
        let (count, block) = (shape[0] * shape[1], block? as usize);
        let blocks = count.div_ceil(block);
        let mut parts = Parts(&memory[4 * (1 + row + HEADER)..]);
        let values = match kind? {
            GROUPS => {
                let (scales, zeros) = (parts.floats(blocks), parts.bytes(blocks));
                Values::Groups { codes: parts.bytes(count), scales, zeros }
            }
            kind if kind >= BLOCKS => {
                let kind = *BlockType::ALL.get((kind - BLOCKS) as usize)?;
                Values::Blocks { kind, bytes: parts.bytes(blocks * kind.bytes()) }
            }
            kind => {
                let map = parts.floats(16);
                let scales = match kind {
                    PLAIN => BlockScales::Plain(parts.floats(blocks)),
                    _ => {
                        let (offset, map) = (parts.floats(1).at(0), parts.floats(256));
                        let nested = parts.floats(blocks.div_ceil(NESTED_BLOCK));
                        BlockScales::Double { codes: parts.bytes(blocks), nested, map, offset }
                    }
                };
                Values::FourBit { packed: parts.bytes(count.div_ceil(2)), map, scales }
            }
        };
        Some(Self { shape, transposed: order? != 0, block, values })
    }

    /// Restores the values from index `first` on, in stored order.
    #[inline(always)] // into loops that are compiled for the vectors of the processor
    pub fn restore(&self, first: usize, to: &mut [f32]) {
        match self.values {
            Values::Groups { codes, scales, zeros } => {
                let (mut at, end) = (first, first + to.len());
                while at < end {
                    let group = at / self.block;
                    let until = ((group + 1) * self.block).min(end);
                    let (scale, zero) = (scales.at(group), f32::from(zeros[group]));
                    for (x, code) in to[at - first..until - first].iter_mut().zip(&codes[at..until]) {
                        *x = (f32::from(*code) - zero) * scale;
                    }
                    at = until;
                }
            }
            Values::FourBit { packed, map, scales } => {
                let map: [f32; 16] = std::array::from_fn(|code| map.at(code));
                let scale = |block: usize| match &scales {
                    BlockScales::Plain(scales) => scales.at(block),
                    BlockScales::Double { codes, nested, map, offset } => {
                        let scaled = map.at(usize::from(codes[block])) * nested.at(block / NESTED_BLOCK);
                        scaled + offset
                    }
                };
                restore(packed, &map, self.block, &scale, first, to);
            }
            Values::Blocks { kind, bytes } => kind.restore(bytes, first, to),
        }
    }

    /// The blocks, if they are those of `Q8_0`.
    pub fn q8_0(&self) -> Option<&'a [u8]> {
        match self.values {
            Values::Blocks { kind: BlockType::Q8_0, bytes } => Some(bytes),
            _ => None,
        }
    }

    /// A copy.
    fn to_matrix(self) -> PackedMatrix {
        let Self { shape, transposed, block, values } = self;
        let codes = match values {
            Values::Groups { codes, scales, zeros } => {
                let zeros = zeros.iter().map(|zero| f32::from(*zero)).collect();
                Codes::Groups(QuantisedGroups { codes: codes.to_vec(), scales: scales.to_vec(), zeros }, block)
            }
            Values::FourBit { packed, map, scales } => Codes::FourBit(FourBit {
                packed: packed.to_vec(),
                map: std::array::from_fn(|code| map.at(code)),
                block,
                count: shape[0] * shape[1],
                scales: match scales {
                    BlockScales::Plain(scales) => Scales::Plain(scales.to_vec()),
                    BlockScales::Double { codes, nested, map, offset } => Scales::Double {
                        codes: codes.to_vec(),
                        nested: nested.to_vec(),
                        map: Box::new(std::array::from_fn(|code| map.at(code))),
                        offset,
                    },
                },
            }),
            Values::Blocks { kind, bytes } => Codes::Blocks(Blocks { kind, bytes: bytes.to_vec() }),
        };
        PackedMatrix { shape, transposed, codes }
    }
}

/// A tensor `[d_in, d_out]` that holds the codes of a matrix, on a device of the CPU backend.
pub fn carrier(matrix: &PackedMatrix, device: &Device) -> Tensor<2> {
    let words = words(matrix);
    let shape = Shape::from([words.len()]);
    of_memory(TensorData::from_bytes(Bytes::from_elems(words), shape, DType::F32), matrix.shape, device)
}

/// A tensor of this shape that holds the codes in such memory: that which [`memory`] returns for a tensor of the same shape.
pub fn of_memory(memory: TensorData, [d_in, d_out]: [usize; 2], device: &Device) -> Tensor<2> {
    // A view: the codes stay behind it.
    Tensor::<1>::from_data(memory, device).narrow(0, 1, d_out).reshape([1, d_out]).expand([d_in, d_out])
}

/// The codes that a tensor holds; none if it has values of its own.
pub fn packed(x: &Tensor<2>) -> Option<PackedMatrix> {
    let data = codes(x)?.into_data();
    let row = x.dims();
    let whole = |row| View::read(data.as_bytes(), row).map(View::to_matrix);
    whole(row[1]).or_else(|| whole(row[0]))
}

/// Returns true if a tensor holds codes.
pub fn holds_codes<const D: usize>(x: &Tensor<D>) -> bool {
    codes(x).is_some()
}

/// The stored values or codes of a tensor.
pub fn memory<const D: usize>(x: Tensor<D>) -> TensorData {
    match codes(&x) {
        Some(codes) => codes.into_data(),
        None => x.into_data(),
    }
}

/// Bytes of the stored values or codes of a tensor.
pub fn stored_bytes<const D: usize>(x: &Tensor<D>) -> usize {
    match codes(x) {
        Some(codes) => 4 * codes.dims()[0],
        None => x.shape().num_elements() * x.dtype().size(),
    }
}

/// All memory of a tensor that holds codes.
fn codes<const D: usize>(x: &Tensor<D>) -> Option<Tensor<1>> {
    if D != 2 || !on_flex(&x.device()) || x.dtype() != DType::F32 {
        return None;
    }
    let plain = x.clone().without_autodiff().into_dispatch();
    let memory = Tensor::<1>::from_dispatch(<Dispatch as MemoryOp>::memory(plain));
    (memory.dims() != [0]).then_some(memory)
}

/// The codes in a tensor's memory, and whether it is a transposed view of them.
pub(crate) fn view(x: &FlexTensor) -> Option<(View<'_>, bool)> {
    let layout = x.layout();
    let [rows, columns] = *layout.shape().as_slice() else { return None };
    if x.dtype() != DType::F32 || layout.start_offset() != 1 || !layout.strides().contains(&1) {
        return None;
    }
    let upright = layout.strides()[1] == 1;
    let view = View::read(x.bytes(), if upright { columns } else { rows })?;
    let expected = if upright { [rows, columns] } else { [columns, rows] };
    (view.shape == expected).then_some((view, !upright))
}

/// Access to the whole memory of a tensor.
#[backend_extension(Flex)]
pub trait MemoryOp: Backend {
    /// All of a tensor's memory if it holds codes, else nothing.
    fn memory(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl MemoryOp for Flex {
    fn memory(x: FlexTensor) -> FlexTensor {
        let words = if view(&x).is_some() { x.bytes().len() / 4 } else { 0 };
        FlexTensor::from_arc(x.data_arc(), Layout::contiguous(Shape::from([words])), DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::narrow::groups::{Rounding, quantise_groups};

    fn matrices() -> Vec<PackedMatrix> {
        let mut all = Vec::new();
        for shape @ [d_in, d_out] in [[1, 1], [1, 7], [7, 1], [12, 10], [8, 8], [3, 100]] {
            let values: Vec<f32> = (0..d_in * d_out).map(|i| (i as f32 * 0.7).sin()).collect();
            let four = FourBit::nf4(&values, 32);
            let eight = quantise_groups(&values, 8, 16, Rounding::Nearest);
            let mut codes = vec![Codes::Groups(eight, 16), Codes::FourBit(four.clone()), Codes::FourBit(four.double())];
            if values.len().is_multiple_of(32) {
                codes.push(Codes::Blocks(Blocks::q8_0(&values)));
            }
            for codes in codes {
                for transposed in [false, true] {
                    all.push(PackedMatrix { shape, transposed, codes: codes.clone() });
                }
            }
        }
        all
    }

    #[test]
    fn codes_come_back_from_clones_and_views_and_everything_else_reads_nan() {
        for matrix in matrices() {
            for device in [Device::default(), Device::default().autodiff()] {
                let x = carrier(&matrix, &device);
                assert_eq!(x.dims(), matrix.shape);
                assert_eq!(packed(&x.clone()).as_ref(), Some(&matrix));
                assert_eq!(packed(&x.clone().transpose()).as_ref(), Some(&matrix));
                let copy = of_memory(memory(x.clone()), matrix.shape, &device);
                assert_eq!(packed(&copy).as_ref(), Some(&matrix));
                assert_eq!(packed(&x.clone().detach()).as_ref(), Some(&matrix));
                let read = crate::host::values(x * 1.0);
                assert!(read.iter().all(|x| x.is_nan()));
            }
        }
        assert_eq!(packed(&Tensor::<2>::full([4, 4], f32::NAN, &Device::default())), None);
    }
}
