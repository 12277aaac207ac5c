//! Packing: inputs in the order in which tiles read them.

use std::cell::Cell;
use std::ops::Range;

use super::vectors::{Avx2, Vectors, transposed};

/// Panels that are packed together if their lines are adjacent, so that memory is read in longer pieces.
pub(super) const GROUP: usize = 4;

/// Elements from one panel to the next: with room for what is written beyond the end of a panel.
#[inline(always)]
pub(super) fn panel_size(height: usize, depth: usize) -> usize {
    height * depth + 16
}

/// Packs `lines` vectors of `depth` elements into panels of `height` lines, in which the elements of a depth are contiguous. Element
/// `(line, k)` is read at `line * strides[0] + k * strides[1]`. Missing lines of the last panel have arbitrary contents.
///
/// # Safety
///
/// As for [`Vectors`], of AVX2 at least. All elements must be readable, and `to` writable for all panels of [`panel_size`].
#[inline(always)]
pub(super) unsafe fn pack<V: Vectors>(
    from: *const f32,
    strides: [usize; 2],
    lines: usize,
    depth: usize,
    to: *mut f32,
    height: usize,
) {
    let mut first = 0;
    while first < lines {
        let count = if strides[0] == 1 { GROUP * height } else { height }.min(lines - first);
        // SAFETY: the lines are among those that the caller guarantees.
        unsafe {
            let (from, to) = (from.add(first * strides[0]), to.add(first / height * panel_size(height, depth)));
            match strides {
                [1, step] => copy::<V>(from, step, count, depth, to, height),
                [step, 1] => turn(from, step, count, depth, to, height),
                strides => gather(from, strides, count, 0..depth, to, height),
            }
        }
        first += count;
    }
}

/// [`pack`] for adjacent lines.
#[inline(always)]
unsafe fn copy<V: Vectors>(from: *const f32, step: usize, lines: usize, depth: usize, to: *mut f32, height: usize) {
    for k in 0..depth {
        for panel in 0..lines.div_ceil(height) {
            let left = lines - panel * height;
            // SAFETY: reads end with the lines; writes end within a vector behind the panel, which is written or skipped later.
            unsafe {
                let from = from.add(k * step + panel * height);
                let to = to.add(panel * panel_size(height, depth) + k * height);
                let mut at = 0;
                while at < height.min(left) {
                    let vector = match at + V::WIDTH <= left {
                        true => V::load(from.add(at)),
                        false => V::load_part(from.add(at), left - at),
                    };
                    V::store(to.add(at), vector);
                    at += V::WIDTH;
                }
            }
        }
    }
}

/// [`pack`] for a panel of lines with contiguous elements.
#[inline(always)]
unsafe fn turn(from: *const f32, step: usize, lines: usize, depth: usize, to: *mut f32, height: usize) {
    let whole = depth / 8 * 8;
    // The last lines first: their squares reach into the first lines of the next depth.
    let mut line = lines.next_multiple_of(8);
    while line > 0 {
        line -= 8;
        for k in (0..whole).step_by(8) {
            // SAFETY: eight elements follow `k`; writes end at most seven elements behind the panel.
            unsafe {
                let columns = transposed(from.add(line * step + k), step, lines - line);
                for (i, column) in columns.iter().enumerate() {
                    Avx2::store(to.add((k + i) * height + line), *column);
                }
            }
        }
    }
    // SAFETY: guaranteed by the caller.
    unsafe { gather(from, [step, 1], lines, whole..depth, to, height) };
}

/// [`pack`] for a panel, element by element.
#[inline(always)]
unsafe fn gather(
    from: *const f32,
    strides: [usize; 2],
    lines: usize,
    depths: Range<usize>,
    to: *mut f32,
    height: usize,
) {
    for k in depths {
        for line in 0..lines {
            // SAFETY: guaranteed by the caller.
            unsafe { *to.add(k * height + line) = *from.add(line * strides[0] + k * strides[1]) };
        }
    }
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "read through pointers")] [f32; 16]);

thread_local! {
    static KEPT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Memory of this thread for packed inputs, kept for its next product.
pub(super) struct Scratch(Vec<Line>);

impl Scratch {
    /// Memory for two inputs with these numbers of elements.
    pub fn of(first: usize, second: usize) -> (Self, *mut f32, *mut f32) {
        let (first, second) = (first.div_ceil(16), second.div_ceil(16));
        let mut memory = KEPT.take();
        if memory.len() < first + second {
            memory = vec![Line([0.0; 16]); first + second];
        }
        let start = memory.as_mut_ptr();
        (Self(memory), start.cast(), start.wrapping_add(first).cast())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        KEPT.set(std::mem::take(&mut self.0));
    }
}
