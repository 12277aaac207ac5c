//! Products of dense rows with a sparse matrix, on the CPU.
//!
//! Some rows at a time are transposed into lanes: all their values in one column, next to each other. A value of the sparse matrix then
//! multiplies a whole lane, and the sums of a column stay in registers.

use std::cell::RefCell;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::flex::vectorised;

/// Rows in a lane.
const LANE: usize = 64;
/// Rows whose gradient sums one task computes. Fixed, so that the sums do not depend on the number of threads.
const TASK: usize = 2 * LANE;
/// Side of the squares in which rows are transposed into lanes.
const SIDE: usize = 8;

type Square = [[f32; SIDE]; SIDE];

/// The values of `LANE` rows in one column.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lane([f32; LANE]);

/// A sparse matrix, grouped by its rows or by its columns.
pub(super) struct Sparse {
    /// Start of each group's entries, and the end of the last group.
    starts: Vec<usize>,
    /// Position in the other dimension, and value.
    entries: Vec<(u32, f32)>,
}

impl Sparse {
    /// By outputs, of `values` at the ascending `positions` `output * d_in + input`.
    pub fn by_outputs(positions: &[i32], values: &[f32], [d_in, d_out]: [usize; 2]) -> Self {
        let mut starts = Vec::with_capacity(d_out + 1);
        starts.push(0);
        let mut first = 0;
        let mut entries = Vec::with_capacity(values.len());
        for (position, value) in positions.iter().zip(values) {
            while *position as usize - first >= d_in {
                starts.push(entries.len());
                first += d_in;
            }
            entries.push((*position as u32 - first as u32, *value));
        }
        starts.resize(d_out + 1, entries.len());
        Self { starts, entries }
    }

    fn groups(&self) -> usize {
        self.starts.len() - 1
    }

    fn group(&self, number: usize) -> &[(u32, f32)] {
        &self.entries[self.starts[number]..self.starts[number + 1]]
    }

    /// The matrix grouped by the other dimension, of this size, and the original position of each entry.
    pub fn turned(&self, size: usize) -> (Self, Vec<u32>) {
        let mut starts = vec![0; size + 1];
        self.entries.iter().for_each(|(place, _)| starts[*place as usize + 1] += 1);
        for number in 0..size {
            starts[number + 1] += starts[number];
        }
        let mut next = starts.clone();
        let mut entries = vec![(0, 0.0); self.entries.len()];
        let mut places = vec![0; self.entries.len()];
        for group in 0..self.groups() {
            for place in self.starts[group]..self.starts[group + 1] {
                let (other, value) = self.entries[place];
                let to = &mut next[other as usize];
                entries[*to] = (group as u32, value);
                places[*to] = place as u32;
                *to += 1;
            }
        }
        (Self { starts, entries }, places)
    }
}

/// `y += x S` with `S` by outputs: `x [rows, d_in]`, `y [rows, d_out]`.
pub(super) fn add_product(sparse: &Sparse, x: &[f32], d_in: usize, y: &mut [f32]) {
    let d_out = sparse.groups();
    y.par_chunks_mut(LANE * d_out).zip(x.par_chunks(LANE * d_in)).for_each(|(y, x)| {
        with_lanes([d_in, d_out], |[inputs, sums]| {
            to_lanes(x, inputs);
            vectorised(
                #[inline(always)]
                || {
                    for (number, total) in sums.iter_mut().enumerate() {
                        *total = sum(sparse.group(number), inputs);
                    }
                },
            );
            add_lanes(sums, y);
        });
    });
}

/// Backward pass: `dx += dy S^T`, and the gradients of the values of `S` in its order. `S` by inputs; `dy [rows, d_out]`, `x` and
/// `dx [rows, d_in]`.
pub(super) fn add_slopes(
    sparse: &Sparse,
    dy: &[f32],
    d_out: usize,
    mut dx: Option<&mut [f32]>,
    x: Option<&[f32]>,
) -> Option<Vec<f32>> {
    let (d_in, count) = (sparse.groups(), sparse.entries.len());
    let tasks = dy.len().div_ceil(TASK * d_out);
    let mut parts = vec![0.0; if x.is_some() { tasks * count } else { 0 }];
    let mut works: Vec<Work> = dy.chunks(TASK * d_out).map(|dy| Work { dy, dx: None, values: None }).collect();
    if let Some(dx) = &mut dx {
        works.iter_mut().zip(dx.chunks_mut(TASK * d_in)).for_each(|(work, dx)| work.dx = Some(dx));
    }
    if let Some(x) = x {
        let each = x.chunks(TASK * d_in).zip(parts.chunks_mut(count.max(1)));
        works.iter_mut().zip(each).for_each(|(work, pair)| work.values = Some(pair));
    }
    works.into_par_iter().for_each(|work| work.run(sparse, d_out));
    x.map(|_| {
        // In the order of the rows, for any number of threads.
        let mut sums = vec![0.0; count];
        for part in parts.chunks(count.max(1)) {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        sums
    })
}

/// Work of one task of [`add_slopes`].
struct Work<'a> {
    dy: &'a [f32],
    dx: Option<&'a mut [f32]>,
    /// `x`, and the output for the gradients of the values, initially zero.
    values: Option<(&'a [f32], &'a mut [f32])>,
}

impl Work<'_> {
    fn run(mut self, sparse: &Sparse, d_out: usize) {
        let d_in = sparse.groups();
        with_lanes([d_in, d_out, d_in], |[inputs, outputs, sums]| {
            for (number, dy) in self.dy.chunks(LANE * d_out).enumerate() {
                let first = number * LANE * d_in;
                let rows = first..first + dy.len() / d_out * d_in;
                to_lanes(dy, outputs);
                let gradients = self.values.as_mut().map(|(x, gradients)| {
                    to_lanes(&x[rows.clone()], inputs);
                    &mut **gradients
                });
                let wanted = self.dx.is_some().then_some(&mut *sums);
                Arch::new().dispatch(Back { sparse, inputs, outputs, sums: wanted, gradients });
                if let Some(dx) = &mut self.dx {
                    add_lanes(sums, &mut dx[rows]);
                }
            }
        });
    }
}

/// The rows of one lane in [`add_slopes`].
struct Back<'a> {
    sparse: &'a Sparse,
    inputs: &'a [Lane],
    outputs: &'a [Lane],
    sums: Option<&'a mut [Lane]>,
    gradients: Option<&'a mut [f32]>,
}

impl WithSimd for Back<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for (number, input) in self.inputs.iter().enumerate() {
            let group = self.sparse.group(number);
            if let Some(sums) = &mut self.sums {
                sums[number] = sum(group, self.outputs);
            }
            if let Some(gradients) = &mut self.gradients {
                let gradients = &mut gradients[self.sparse.starts[number]..][..group.len()];
                for ((output, _), gradient) in group.iter().zip(gradients) {
                    *gradient += dot(simd, input, &self.outputs[*output as usize]);
                }
            }
        }
    }
}

/// Sum of the lanes that the entries name, each times its value.
#[inline(always)]
fn sum(entries: &[(u32, f32)], lanes: &[Lane]) -> Lane {
    let mut sum = [0.0; LANE];
    for (place, value) in entries {
        let lane = &lanes[*place as usize].0;
        for row in 0..LANE {
            sum[row] = lane[row].mul_add(*value, sum[row]);
        }
    }
    Lane(sum)
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &Lane, b: &Lane) -> f32 {
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (a, b) = (S::as_simd_f32s(&a.0).0, S::as_simd_f32s(&b.0).0);
    for (number, (a, b)) in a.iter().zip(b).enumerate() {
        sums[number % 4] = simd.mul_add_f32s(*a, *b, sums[number % 4]);
    }
    let [first, second, third, fourth] = sums;
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(first, second), simd.add_f32s(third, fourth)))
}

/// Runs with this thread's memory for lanes, whose contents are arbitrary. The closure must not start parallel work: this
/// thread could take a task that asks for the same memory.
fn with_lanes<const N: usize, R>(counts: [usize; N], run: impl FnOnce([&mut [Lane]; N]) -> R) -> R {
    thread_local!(static LANES: RefCell<Vec<Lane>> = const { RefCell::new(Vec::new()) });
    LANES.with_borrow_mut(|lanes| {
        let count = counts.iter().sum();
        if lanes.len() < count {
            lanes.resize(count, Lane([0.0; LANE]));
        }
        let mut rest = &mut lanes[..];
        run(counts.map(|count| {
            let (lanes, others) = std::mem::take(&mut rest).split_at_mut(count);
            rest = others;
            lanes
        }))
    })
}

/// Transposes up to `LANE` rows into lanes; missing rows are zero.
fn to_lanes(rows: &[f32], lanes: &mut [Lane]) {
    let width = lanes.len();
    each_square(
        width,
        #[inline(always)]
        |row, column, turn| {
            let mut square = Square::default();
            for (values, row) in square.iter_mut().zip(rows.chunks_exact(width).skip(row)) {
                match row[column..].first_chunk() {
                    Some(row) => *values = *row,
                    None => values.iter_mut().zip(&row[column..]).for_each(|(value, x)| *value = *x),
                }
            }
            for (lane, values) in lanes[column..].iter_mut().zip(turn.turned(square)) {
                lane.0[row..row + SIDE].copy_from_slice(&values);
            }
        },
    );
}

/// Adds lanes to the rows they came from.
fn add_lanes(lanes: &[Lane], rows: &mut [f32]) {
    let width = lanes.len();
    each_square(
        width,
        #[inline(always)]
        |row, column, turn| {
            let mut square = Square::default();
            for (values, lane) in square.iter_mut().zip(&lanes[column..]) {
                values.copy_from_slice(&lane.0[row..row + SIDE]);
            }
            for (values, row) in turn.turned(square).iter().zip(rows.chunks_exact_mut(width).skip(row)) {
                match row[column..].first_chunk_mut::<SIDE>() {
                    Some(row) => row.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                    None => row[column..].iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                }
            }
        },
    );
}

/// Visits the squares of `LANE` rows of this width, with their first row and column. Two squares below each other fill a cache line of a lane.
#[inline(always)]
fn each_square(width: usize, mut visit: impl FnMut(usize, usize, Turn)) {
    let turn = Turn::new();
    vectorised(
        #[inline(always)]
        || {
            for row in (0..LANE).step_by(2 * SIDE) {
                for column in (0..width).step_by(SIDE) {
                    visit(row, column, turn);
                    visit(row + SIDE, column, turn);
                }
            }
        },
    );
}

/// Transposes squares. The compiler emits scalar moves for the plain loop, so vector instructions are used explicitly.
#[derive(Clone, Copy)]
struct Turn {
    #[cfg(target_arch = "x86_64")]
    vectors: Option<pulp::x86::V3>,
}

impl Turn {
    fn new() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            vectors: pulp::x86::V3::try_new(),
        }
    }

    #[inline(always)]
    fn turned(self, rows: Square) -> Square {
        #[cfg(target_arch = "x86_64")]
        if let Some(pulp::x86::V3 { avx, .. }) = self.vectors {
            use std::arch::x86_64::__m256;
            let low = |a, b| avx._mm256_unpacklo_ps(a, b);
            let high = |a, b| avx._mm256_unpackhi_ps(a, b);
            let first = |a, b| avx._mm256_shuffle_ps::<0b01_00_01_00>(a, b);
            let second = |a, b| avx._mm256_shuffle_ps::<0b11_10_11_10>(a, b);
            let front = |a, b| avx._mm256_permute2f128_ps::<0x20>(a, b);
            let back = |a, b| avx._mm256_permute2f128_ps::<0x31>(a, b);
            let [a, b, c, d, e, f, g, h]: [__m256; SIDE] = rows.map(pulp::cast);
            // Pairs of rows, then fours, then all eight.
            let [a, b, c, d] = [low(a, b), high(a, b), low(c, d), high(c, d)];
            let [e, f, g, h] = [low(e, f), high(e, f), low(g, h), high(g, h)];
            let [a, b, c, d] = [first(a, c), second(a, c), first(b, d), second(b, d)];
            let [e, f, g, h] = [first(e, g), second(e, g), first(f, h), second(f, h)];
            let fronts = [front(a, e), front(b, f), front(c, g), front(d, h)];
            let backs = [back(a, e), back(b, f), back(c, g), back(d, h)];
            let mut columns = Square::default();
            columns.iter_mut().zip(fronts.into_iter().chain(backs)).for_each(|(to, column)| *to = pulp::cast(column));
            return columns;
        }
        let mut columns = Square::default();
        for (number, row) in rows.iter().enumerate() {
            columns.iter_mut().zip(row).for_each(|(column, value)| column[number] = *value);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_from_lanes() {
        for (count, width) in [(1, 1), (7, 8), (8, 7), (64, 33), (63, 16)] {
            let rows: Vec<f32> = (0..count * width).map(|value| value as f32).collect();
            let mut lanes = vec![Lane([f32::NAN; LANE]); width];
            to_lanes(&rows, &mut lanes);
            for (column, lane) in lanes.iter().enumerate() {
                for (row, value) in lane.0.iter().enumerate() {
                    let expected = if row < count { (row * width + column) as f32 } else { 0.0 };
                    assert_eq!(*value, expected, "row {row} of {count}, column {column} of {width}");
                }
            }
            let mut doubled = rows.clone();
            add_lanes(&lanes, &mut doubled);
            assert!(doubled.iter().zip(&rows).all(|(twice, once)| *twice == 2.0 * once), "{count} x {width}");
        }
    }

    #[test]
    fn slopes_do_not_depend_on_the_number_of_threads() {
        let (rows, d_in, d_out) = (300, 24, 40);
        let positions: Vec<i32> = (0..960).step_by(7).collect();
        let wave = |count: usize| (0..count).map(|place| (place as f32 * 0.7).sin()).collect::<Vec<_>>();
        let values = wave(positions.len());
        let (sparse, _) = Sparse::by_outputs(&positions, &values, [d_in, d_out]).turned(d_in);
        let (x, dy) = (wave(rows * d_in), wave(rows * d_out));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut dx = vec![0.0; x.len()];
                let gradients = add_slopes(&sparse, &dy, d_out, Some(&mut dx), Some(&x));
                (dx, gradients)
            })
        };
        assert_eq!(run(1), run(3));
    }
}
