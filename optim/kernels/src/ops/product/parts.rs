//! Cutting the output of a product into parts for threads.

/// Rows up to which every element of the other input is used so few times that it is read once, in order, and not packed.
pub(super) const FEW: usize = 4;

/// Products that are summed before the sum is added to the output: parts of this depth give the bits of the whole.
pub(super) const DEPTH: usize = 512;

/// Rows of an output of `gemm` that a thread processes at least: for many rows or columns the order of its additions does not depend on how
/// many there are; for a few it would.
const GEMM_ROWS: usize = 96;
/// Columns of an output of `gemm` that a thread processes at least.
const GEMM_COLUMNS: usize = 512;
/// Rows and columns of the largest tile: parts are made of whole ones as far as possible.
const TILE: [usize; 2] = [12, 32];
/// Products that are computed in the time in which one element of an input is packed.
const PACKING: usize = 24;

/// A grid of parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    /// Rows and columns of the output.
    size: [usize; 2],
    /// Parts along rows and columns.
    count: [usize; 2],
    /// Rows and columns that stay together.
    unit: [usize; 2],
}

/// A part of an output: first row and column, and those after the last.
pub(super) struct Part {
    pub rows: [usize; 2],
    pub columns: [usize; 2],
}

impl Parts {
    /// The fastest grid for kernels whose bits do not depend on the partition, each thread packing its own inputs.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub fn of_tiles(rows: usize, columns: usize, threads: usize) -> Self {
        let tiles = [rows.div_ceil(TILE[0]), columns.div_ceil(TILE[1])];
        let by_rows = (1..=threads.min(tiles[0])).rev();
        let grids = by_rows.map(|by_rows| [by_rows, (threads / by_rows).min(tiles[1])]);
        let time = |count: &[usize; 2]| {
            let [rows, columns] = [0, 1].map(|side| tiles[side].div_ceil(count[side]) * TILE[side]);
            rows * columns + PACKING * (rows + columns)
        };
        Self { size: [rows, columns], count: grids.min_by_key(time).unwrap_or([1, 1]), unit: TILE }
    }

    /// The grid for the kernels of `gemm`.
    pub fn of_gemm(rows: usize, columns: usize, threads: usize) -> Self {
        // Outputs of few elements add up in another order than others.
        let by_rows = if columns >= 8 { threads.min(rows / GEMM_ROWS) } else { 1 };
        let by_columns = threads.min(columns / GEMM_COLUMNS);
        let count = match by_columns > 1 && (by_rows < 2 || columns > 8 * rows) {
            true => [1, by_columns],
            false => [by_rows.max(1), 1],
        };
        Self { size: [rows, columns], count, unit: [1, 1] }
    }

    /// The same parts of the transposed output.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub fn transposed(self) -> Self {
        let turn = |[a, b]: [usize; 2]| [b, a];
        Self { size: turn(self.size), count: turn(self.count), unit: turn(self.unit) }
    }

    pub fn count(&self) -> usize {
        self.count[0] * self.count[1]
    }

    pub fn part(&self, number: usize) -> Part {
        let cut = |side: usize, number: usize| {
            let units = self.size[side].div_ceil(self.unit[side]);
            [number, number + 1]
                .map(|number| (units * number / self.count[side] * self.unit[side]).min(self.size[side]))
        };
        Part { rows: cut(0, number / self.count[1]), columns: cut(1, number % self.count[1]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_up_the_output_once() {
        for [rows, columns] in [[1, 1], [1, 5000], [5000, 1], [13, 33], [1024, 512], [96, 1537]] {
            for threads in 1..9 {
                let tiles = Parts::of_tiles(rows, columns, threads);
                for parts in [
                    tiles,
                    Parts::of_tiles(columns, rows, threads).transposed(),
                    Parts::of_gemm(rows, columns, threads),
                ] {
                    assert!(parts.count() <= threads);
                    let mut made = vec![0; rows * columns];
                    for number in 0..parts.count() {
                        let part = parts.part(number);
                        for row in part.rows[0]..part.rows[1] {
                            made[row * columns..][part.columns[0]..part.columns[1]].iter_mut().for_each(|n| *n += 1);
                        }
                    }
                    assert!(made.iter().all(|n| *n == 1), "{rows} x {columns}, {threads} threads");
                }
            }
        }
    }
}
