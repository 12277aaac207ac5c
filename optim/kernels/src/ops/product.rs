//! Matrix products on the CPU: through kernels of our own where the processor has AVX2 or AVX-512, through those of `gemm` elsewhere.

#[cfg(target_arch = "x86_64")]
mod few_rows;
mod lines;
mod narrow;
mod operand;
#[cfg(target_arch = "x86_64")]
mod panels;
mod parts;
#[cfg(target_arch = "x86_64")]
mod q8_0;
mod target;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(target_arch = "x86_64")]
mod vectors;
#[cfg(target_arch = "x86_64")]
mod work;

pub(crate) use self::operand::{Operand, widened};
use self::target::{Kernel, Target};
pub(super) use self::target::{Matrix, readable};

/// `out = factor * a b`, or `out += factor * a b` when `add`. With `parallel` all threads work on it.
pub(super) fn product<'b>(
    out: Matrix<&mut [f32]>,
    add: bool,
    factor: f32,
    a: Matrix<&[f32]>,
    b: impl Into<Operand<'b>>,
    parallel: bool,
) {
    let b = b.into();
    assert!(out.rows == a.rows && out.columns == b.columns(), "shapes of a product");
    assert!(out.extent() <= out.data.len(), "memory of a product");
    assert!(out.row_stride >= out.columns || out.column_stride >= out.rows, "values of a product must not overlap");
    // SAFETY: the output lies within its slice, which is borrowed mutably, so it overlaps with no input.
    unsafe { multiply(out.data.as_mut_ptr(), [out.row_stride, out.column_stride], add, factor, a, b, parallel) }
}

/// `factor * a b` row-major, in uninitialised memory.
pub(super) fn multiplied<'b>(factor: f32, a: Matrix<&[f32]>, b: impl Into<Operand<'b>>) -> Vec<f32> {
    let b = b.into();
    let count = a.rows * b.columns();
    let mut out = Vec::with_capacity(count);
    // SAFETY: the output has room for its rows one after another and is not shared; without `add` all of its values are written and
    // none is read, so they are initialised when the length is set.
    unsafe {
        multiply(out.as_mut_ptr(), [b.columns(), 1], false, factor, a, b, true);
        out.set_len(count);
    }
    out
}

/// [`product`] with an output of the rows of `a` and the columns of `b`, in memory with these strides of rows and columns.
///
/// Every thread makes a part of the output by itself: packing its inputs again costs less than synchronising after each step.
///
/// # Safety
///
/// The output must be writable at every index that its size and strides give, overlap with no input, and be initialised when `add`.
unsafe fn multiply(
    out: *mut f32,
    strides: [usize; 2],
    add: bool,
    factor: f32,
    a: Matrix<&[f32]>,
    b: Operand<'_>,
    parallel: bool,
) {
    let b = match b {
        Operand::Wide(b) => b,
        // SAFETY: guaranteed by the caller.
        Operand::Narrow(b) => return unsafe { operand::multiply(out, strides, add, factor, a, b, parallel) },
    };
    assert!(a.columns == b.rows, "shapes of a product");
    assert!(a.extent() <= a.data.len() && b.extent() <= b.data.len(), "memory of a product");
    let target = Target { out, strides, add, factor, a, b, kernel: Kernel::here(strides, [a.rows, b.columns]) };
    // SAFETY: guaranteed by the caller.
    unsafe { target.make_all(parallel) }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "x86_64")]
    use crate::instructions::InstructionSet;
    use crate::ops::check::random;

    #[test]
    fn products_take_any_strides() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 2.0, -1.0, 0.5, 3.0]);
        let mut out = [10.0; 4];
        let (left, right) = (Matrix::row_major(&a[..], 2, 3), Matrix::row_major(&b[..], 2, 3).transposed());
        product(Matrix::row_major(&mut out[..], 2, 2), false, 1.0, left, right, false);
        assert_eq!(out, [7.0, 9.0 - 0.0 - 1.0 + 1.0, 16.0, 16.5]);
        product(Matrix::row_major(&mut out[..], 2, 2).transposed(), true, 2.0, left, right, true);
        assert_eq!(multiplied(2.0, left, right), [14.0, 18.0, 32.0, 33.0]);
        assert_eq!(out, [7.0 + 14.0, 9.0 + 32.0, 16.0 + 18.0, 16.5 + 33.0]);
    }

    /// Inputs of a product as they are stored, some transposed.
    struct Case {
        size: [usize; 3],
        a: Vec<f32>,
        b: Vec<f32>,
        flips: usize,
    }

    impl Case {
        fn new(size: [usize; 3], flips: usize) -> Self {
            let [rows, depth, columns] = size;
            Self { size, a: random(&[rows * depth], 1), b: random(&[depth * columns], 2), flips }
        }

        fn read<T>(&self, values: T, rows: usize, columns: usize, input: usize) -> Matrix<T> {
            match self.flips >> input & 1 {
                1 => Matrix::row_major(values, columns, rows).transposed(),
                _ => Matrix::row_major(values, rows, columns),
            }
        }

        /// The output with this number of threads and this kernel, in row-major order.
        fn run(&self, kernel: Option<Kernel>, add: bool, threads: usize) -> Vec<f32> {
            let [rows, depth, columns] = self.size;
            let (a, b) = (self.read(&self.a[..], rows, depth, 0), self.read(&self.b[..], depth, columns, 1));
            let mut out = random(&[rows * columns], 3);
            let to = self.read(&mut out[..], rows, columns, 2);
            let strides = [to.row_stride, to.column_stride];
            let kernel = kernel.unwrap_or_else(|| Kernel::here(strides, [rows, columns]));
            let target = Target { out: to.data.as_mut_ptr(), strides, add, factor: 0.7, a, b, kernel };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            // SAFETY: sizes and strides are those of the vectors.
            pool.install(|| unsafe { target.make_all(true) });
            (0..rows * columns).map(|i| out[i / columns * strides[0] + i % columns * strides[1]]).collect()
        }
    }

    #[test]
    fn products_are_those_of_the_definition() {
        let sizes = [
            [1, 1, 1],
            [5, 7, 3],
            [1, 16, 1030],
            [1, 515, 2100],
            [2, 33, 1],
            [3, 100, 19],
            [4, 520, 41],
            [13, 513, 33],
            [37, 1100, 257],
            [25, 70, 290],
            [30, 600, 16],
            [19, 3, 129],
            [3, 0, 20],
        ];
        for (size @ [rows, depth, columns], flips) in sizes.into_iter().flat_map(|size| (0..8).map(move |i| (size, i)))
        {
            let case = Case::new(size, flips);
            let (a, b) = (case.read(&case.a[..], rows, depth, 0), case.read(&case.b[..], depth, columns, 1));
            let before = random(&[rows * columns], 3);
            let before = case.read(&before[..], rows, columns, 2);
            for add in [false, true] {
                for (number, ours) in case.run(None, add, 1).into_iter().enumerate() {
                    let (row, column) = (number / columns, number % columns);
                    let at = |m: &Matrix<&[f32]>, row, column| {
                        f64::from(m.data[row * m.row_stride + column * m.column_stride])
                    };
                    let sum: f64 = (0..depth).map(|k| at(&a, row, k) * at(&b, k, column)).sum();
                    let exact = 0.7 * sum + if add { at(&before, row, column) } else { 0.0 };
                    assert!(
                        (f64::from(ours) - exact).abs() < 3e-5,
                        "{size:?}, flips {flips}, add {add}: {ours} {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn parts_give_the_bits_of_the_whole() {
        // Few and many rows, odd sizes, long sums, wide and tall outputs, each as stored, transposed, and with the output transposed.
        for size in [
            [200, 700, 40],
            [193, 1100, 33],
            [384, 96, 512],
            [96, 64, 1537],
            [1, 700, 5000],
            [7, 512, 4099],
            [300, 8000, 2],
        ] {
            for flips in 0..8 {
                let case = Case::new(size, flips);
                for kernel in [None, Some(Kernel::Gemm)] {
                    let one = case.run(kernel, true, 1);
                    for threads in [2, 3] {
                        assert!(one == case.run(kernel, true, threads), "{size:?}, flips {flips}, {threads} threads");
                    }
                }
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn instruction_sets_give_the_same_bits() {
        if InstructionSet::best() < InstructionSet::Avx512 {
            return;
        }
        for size in [[1, 700, 77], [3, 40, 1100], [100, 1100, 70], [30, 64, 16]] {
            for flips in 0..4 {
                let [narrow, wide] = [false, true].map(|wide| Kernel::Tiles { wide, transposed: false });
                let case = Case::new(size, flips);
                assert!(case.run(Some(narrow), true, 1) == case.run(Some(wide), true, 1), "{size:?}, flips {flips}");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        if crate::instructions::instruction_set() == crate::instructions::InstructionSet::Baseline {
            return;
        }
        let [rows, depth, columns] = [29, 600, 70];
        for flips in [0, 2] {
            let all = Case::new([rows, depth, columns], flips);
            let whole = all.run(None, false, 1);
            for count in [1, 2, 5, 12] {
                let mut some = Case::new([rows, depth, columns], flips);
                some.size[0] = count;
                assert!(some.run(None, false, 1) == whole[..count * columns], "{count} rows, flips {flips}");
            }
        }
    }
}
