//! An allocator that reports the memory in use and returns unused memory to the system.
//!
//! A training step repeatedly frees and requests the same large blocks. The system's allocator keeps freed memory at
//! its own discretion, often a third more than was ever in use. This one keeps freed memory for later requests as long
//! as used and kept memory together do not exceed the maximum ever in use: keeping it costs nothing at the peak, and
//! requesting it again causes no page faults. Adjacent free pieces are joined, and a request may use a part of a larger
//! piece, so that memory moves from activations to gradients and back.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Allocator for a program's `#[global_allocator]`. Blocks below 128 KiB are left to the system; on systems other than
/// Linux all are.
#[derive(Debug)]
pub struct BlockAllocator;

/// Bytes of large blocks in use; 0 if this is not the program's allocator.
static LIVE: AtomicUsize = AtomicUsize::new(0);

impl BlockAllocator {
    /// Bytes of all large blocks in use; none in a program with another allocator.
    pub fn live() -> Option<u64> {
        // The threads and tables of a program alone use some large block.
        match LIVE.load(Ordering::Relaxed) {
            0 => None,
            bytes => Some(bytes as u64),
        }
    }

    /// Resets the maximum in use and returns kept memory to the system, after an operation that needed more than the
    /// following ones.
    pub fn begin_anew() {
        #[cfg(target_os = "linux")]
        blocks::begin_anew();
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: returns free memory of the system's allocator, at any time and on any thread.
        unsafe {
            libc::malloc_trim(0)
        };
    }
}

#[cfg(not(target_os = "linux"))]
// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for BlockAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }
}

#[cfg(target_os = "linux")]
mod blocks {
    use std::cmp::Reverse;
    use std::collections::{BTreeMap, BTreeSet};
    use std::ptr::null_mut;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// Size from which a block has pages of its own.
    const LARGE: usize = 128 << 10;
    const PAGE: usize = 4096;
    /// Size from which the system is asked for huge pages, whose first use costs fewer faults.
    const HUGE: usize = 4 << 20;

    /// Mapped unused memory, by address. The nodes of these maps are small blocks, which belong to the system's
    /// allocator.
    struct Free {
        /// Length and age by start.
        pieces: BTreeMap<usize, (usize, u64)>,
        /// Smallest first; among equal lengths the most recently freed one, which may still be in the cache.
        sizes: BTreeSet<(usize, Reverse<u64>, usize)>,
        /// Total bytes.
        kept: usize,
        age: u64,
    }

    impl Free {
        fn insert(&mut self, start: usize, len: usize, age: u64) {
            self.pieces.insert(start, (len, age));
            self.sizes.insert((len, Reverse(age), start));
            self.kept += len;
        }

        fn remove(&mut self, start: usize) -> Option<usize> {
            let (len, age) = self.pieces.remove(&start)?;
            self.sizes.remove(&(len, Reverse(age), start));
            self.kept -= len;
            Some(len)
        }

        /// Keeps memory, joined with adjacent kept pieces.
        fn add(&mut self, mut start: usize, mut len: usize) {
            let before = self.pieces.range(..start).next_back().map(|(start, (len, _))| (*start, *len));
            if let Some((place, size)) = before.filter(|(place, size)| place + size == start) {
                self.remove(place);
                (start, len) = (place, len + size);
            }
            len += self.remove(start + len).unwrap_or(0);
            self.age += 1;
            self.insert(start, len, self.age);
        }

        /// Takes the first bytes of the smallest piece that is large enough.
        fn take(&mut self, len: usize) -> Option<usize> {
            let (size, Reverse(age), start) = *self.sizes.range((len, Reverse(u64::MAX), 0)..).next()?;
            self.remove(start);
            if size > len {
                self.insert(start + len, size - len, age);
            }
            Some(start)
        }

        /// Returns this many bytes to the system, from the smallest, least useful pieces first.
        fn give_back(&mut self, mut bytes: usize) {
            while let (1.., Some((size, Reverse(age), start))) = (bytes, self.sizes.first().copied()) {
                self.remove(start);
                let len = size.min(bytes);
                unmap(start, len);
                if size > len {
                    self.insert(start + len, size - len, age);
                }
                bytes -= len;
            }
        }
    }

    struct Blocks {
        /// Bytes in use.
        live: usize,
        /// Maximum ever in use.
        most: usize,
        free: Free,
    }

    static BLOCKS: Mutex<Blocks> = Mutex::new(Blocks {
        live: 0,
        most: 0,
        free: Free { pieces: BTreeMap::new(), sizes: BTreeSet::new(), kept: 0, age: 0 },
    });

    fn blocks() -> MutexGuard<'static, Blocks> {
        BLOCKS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the pages for a layout; none if the system's allocator serves it.
    fn mapped(size: usize, align: usize) -> Option<usize> {
        (size >= LARGE && align <= PAGE).then(|| size.checked_next_multiple_of(PAGE)).flatten()
    }

    impl Blocks {
        fn count(&mut self, live: usize) {
            self.live = live;
            self.most = self.most.max(live);
            LIVE.store(live, Ordering::Relaxed);
        }

        /// Returns kept memory beyond the maximum in use.
        fn trim(&mut self) {
            self.free.give_back((self.live + self.free.kept).saturating_sub(self.most));
        }

        /// Returns a block of this many bytes, and whether it is fresh from the system and therefore zero.
        fn take(&mut self, len: usize) -> (*mut u8, bool) {
            if let Some(start) = self.free.take(len) {
                self.count(self.live + len);
                return (std::ptr::with_exposed_provenance_mut(start), false);
            }
            self.count(self.live + len);
            self.trim();
            let block = map(len);
            if block.is_null() {
                self.count(self.live - len);
            }
            (block, true)
        }

        fn give(&mut self, block: *mut u8, len: usize) {
            self.count(self.live - len);
            self.free.add(block.expose_provenance(), len);
        }
    }

    pub fn begin_anew() {
        let mut blocks = blocks();
        blocks.most = blocks.live;
        blocks.trim();
    }

    fn map(len: usize) -> *mut u8 {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new private mapping at an address chosen by the system touches no memory in use.
        let start = unsafe { libc::mmap(null_mut(), len, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return null_mut();
        }
        if len >= HUGE {
            // SAFETY: advice on the whole of the mapping that was just made; it changes no content, and may be
            // rejected.
            unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        }
        start.cast()
    }

    fn unmap(start: usize, len: usize) {
        // SAFETY: these are whole pages that were mapped here, kept, and removed from the list of kept pieces, so they
        // are unused.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), len) };
    }

    // SAFETY: small and unusually aligned blocks are the system allocator's, told apart by size and alignment, which are the same when the block
    // is freed. Every other block has whole pages of its own for at least its size, page-aligned, that no other block shares.
    unsafe impl GlobalAlloc for BlockAllocator {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            match mapped(layout.size(), layout.align()) {
                Some(len) => blocks().take(len).0,
                // SAFETY: as the caller promises.
                None => unsafe { System.alloc(layout) },
            }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            let Some(len) = mapped(layout.size(), layout.align()) else {
                // SAFETY: as the caller promises.
                return unsafe { System.alloc_zeroed(layout) };
            };
            let (block, fresh) = blocks().take(len);
            if !fresh {
                // SAFETY: its pages have at least this many bytes, and are not shared.
                unsafe { block.write_bytes(0, layout.size()) };
            }
            block
        }

        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            match mapped(layout.size(), layout.align()) {
                Some(len) => blocks().give(block, len),
                // SAFETY: as the caller promises.
                None => unsafe { System.dealloc(block, layout) },
            }
        }

        unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            let (before, after) = (mapped(layout.size(), layout.align()), mapped(size, layout.align()));
            if let (Some(before), Some(after)) = (before, after) {
                let mut blocks = blocks();
                if before == after {
                    return block;
                }
                // SAFETY: the block has whole pages of `before` bytes, which the system may move.
                let moved = unsafe { libc::mremap(block.cast(), before, after, libc::MREMAP_MAYMOVE) };
                // It rejects pages that were mapped separately, such as joined neighbours.
                if moved != libc::MAP_FAILED {
                    let live = blocks.live - before + after;
                    blocks.count(live);
                    blocks.trim();
                    return moved.cast();
                }
            }
            if before.or(after).is_none() {
                // SAFETY: as the caller promises.
                return unsafe { System.realloc(block, layout, size) };
            }
            // SAFETY: the caller promises a size that is not 0 and does not overflow when rounded up to the alignment.
            let target = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
            if !target.is_null() {
                // SAFETY: both blocks hold at least the smaller of the sizes, and the new one is not shared.
                unsafe { std::ptr::copy_nonoverlapping(block, target, layout.size().min(size)) };
                // SAFETY: as the caller promises; the caller uses the new block from here on.
                unsafe { self.dealloc(block, layout) };
            }
            target
        }
    }

    #[cfg(test)]
    pub fn state() -> [usize; 3] {
        let blocks = blocks();
        [blocks.live, blocks.free.kept, blocks.most]
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The tests have another global allocator, so that only these tests use the blocks; one test at a time.
    #[test]
    fn blocks_keep_their_content_and_stay_within_the_most_in_use() {
        let work = |thread: usize| {
            let mut held: Vec<(*mut u8, Layout, u8)> = Vec::new();
            let mut random = thread as u64 + 1;
            for round in 0..400 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let size = [40, 130 << 10, 131 << 10, 400 << 10, 5 << 20][(random >> 33) as usize % 5];
                let layout = Layout::from_size_align(size, 64).unwrap();
                let mark = (round % 251) as u8;
                // SAFETY: layouts are not empty, every block is freed once with its own layout, and only its bytes are touched.
                unsafe {
                    let block = match round % 3 {
                        0 => {
                            let block = BlockAllocator.alloc_zeroed(layout);
                            assert_eq!([*block, *block.add(size - 1), *block.add(size / 2)], [0; 3]);
                            block
                        }
                        _ => BlockAllocator.alloc(layout),
                    };
                    *block = mark;
                    *block.add(size - 1) = mark;
                    held.push((block, layout, mark));
                    if held.len() > 6 {
                        let (block, layout, mark) = held.remove((random >> 40) as usize % 6);
                        assert_eq!([*block, *block.add(layout.size() - 1)], [mark; 2]);
                        let grown = 20 + 3 * layout.size() / [2, 3, 6][round % 3];
                        let block = BlockAllocator.realloc(block, layout, grown);
                        assert_eq!(*block, mark);
                        if grown > layout.size() {
                            assert_eq!(*block.add(layout.size() - 1), mark);
                        }
                        BlockAllocator.dealloc(block, Layout::from_size_align(grown, 64).unwrap());
                    }
                }
            }
            for (block, layout, mark) in held {
                // SAFETY: as above.
                unsafe {
                    assert_eq!([*block, *block.add(layout.size() - 1)], [mark; 2]);
                    BlockAllocator.dealloc(block, layout);
                }
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|thread| drop(scope.spawn(move || work(thread)))));
        let [live, kept, most] = blocks::state();
        assert_eq!(live, 0, "everything was freed");
        assert!(kept <= most && most > 0);

        // A block of the same size is reused, also in parts, and the parts together; one that does not fit makes room
        // for itself.
        BlockAllocator::begin_anew();
        let layout = |size| Layout::from_size_align(size, 64).unwrap();
        // SAFETY: as above.
        unsafe {
            let first = BlockAllocator.alloc(layout(3 << 20));
            BlockAllocator.dealloc(first, layout(3 << 20));
            let again = BlockAllocator.alloc(layout(3 << 20));
            assert_eq!(first, again);
            assert_eq!(BlockAllocator::live(), Some(3 << 20));
            BlockAllocator.dealloc(again, layout(3 << 20));
            let parts = [0; 3].map(|_| BlockAllocator.alloc_zeroed(layout(1 << 20)));
            assert_eq!(parts, [0, 1 << 20, 2 << 20].map(|offset| first.add(offset)));
            assert!(parts.iter().all(|part| part.read() == 0));
            for number in [0, 2, 1] {
                BlockAllocator.dealloc(parts[number], layout(1 << 20));
            }
            let whole = BlockAllocator.alloc(layout(3 << 20));
            assert_eq!(first, whole);
            BlockAllocator.dealloc(whole, layout(3 << 20));
            assert_eq!(blocks::state(), [0, 3 << 20, 3 << 20]);
            let other = BlockAllocator.alloc(layout(5 << 20));
            assert_eq!(blocks::state(), [5 << 20, 0, 5 << 20]);
            BlockAllocator.dealloc(other, layout(5 << 20));
            let part = BlockAllocator.alloc(layout(3 << 20));
            let rest = BlockAllocator.alloc(layout(4 << 20));
            assert_eq!(blocks::state(), [7 << 20, 0, 7 << 20]);
            BlockAllocator.dealloc(part, layout(3 << 20));
            BlockAllocator.dealloc(rest, layout(4 << 20));
        }
        BlockAllocator::begin_anew();
        assert_eq!(blocks::state(), [0; 3]);
        assert_eq!(BlockAllocator::live(), None);
    }
}
