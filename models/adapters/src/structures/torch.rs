//! The random permutation of PyTorch, for adapters whose positions follow from a seed of its generator.

use std::collections::BTreeMap;

/// Length from which PyTorch draws permutations in another way.
pub(super) const LONGEST: usize = u32::MAX as usize / 20;

/// Numbers that were swapped; all others hold their own place.
enum Swapped {
    Few(BTreeMap<usize, usize>),
    Many(Vec<u32>),
}

impl Swapped {
    fn at(&self, place: usize) -> usize {
        match self {
            Self::Few(moved) => moved.get(&place).copied().unwrap_or(place),
            Self::Many(all) => all[place] as usize,
        }
    }

    fn put(&mut self, place: usize, number: usize) {
        match self {
            Self::Few(moved) => drop(moved.insert(place, number)),
            Self::Many(all) => all[place] = number as u32,
        }
    }
}

/// The first `count` numbers of `torch.randperm(length)` with a generator of this seed; `length` is below [`LONGEST`].
pub(super) fn permutation(seed: u64, length: usize, count: usize) -> Vec<usize> {
    let mut generator = MersenneTwister::new(seed as u32);
    // Entries of a map take more memory than numbers in a row.
    let mut swapped = match 8 * count < length {
        true => Swapped::Few(BTreeMap::new()),
        false => Swapped::Many((0..length as u32).collect()),
    };
    let mut drawn = Vec::with_capacity(count);
    for place in 0..count.min(length) {
        // The last number is not drawn.
        let step = if place + 1 < length { generator.next() as usize % (length - place) } else { 0 };
        let other = place + step;
        drawn.push(swapped.at(other));
        swapped.put(other, swapped.at(place));
    }
    drawn
}

/// The generator MT19937 ("Mersenne Twister: A 623-dimensionally equidistributed uniform pseudo-random number
/// generator", 1998).
struct MersenneTwister {
    state: Vec<u32>,
    used: usize,
}

const SIZE: usize = 624;
const SHIFT: usize = 397;

impl MersenneTwister {
    fn new(seed: u32) -> Self {
        let mut state = vec![seed];
        for place in 1..SIZE as u32 {
            let last = state[state.len() - 1];
            state.push(1_812_433_253u32.wrapping_mul(last ^ last >> 30).wrapping_add(place));
        }
        Self { state, used: SIZE }
    }

    fn next(&mut self) -> u32 {
        if self.used == SIZE {
            self.used = 0;
            for place in 0..SIZE {
                let bits = self.state[place] & 0x8000_0000 | self.state[(place + 1) % SIZE] & 0x7fff_ffff;
                let odd = if bits & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[place] = self.state[(place + SHIFT) % SIZE] ^ bits >> 1 ^ odd;
            }
        }
        let mut value = self.state[self.used];
        self.used += 1;
        value ^= value >> 11;
        value ^= value << 7 & 0x9d2c_5680;
        value ^= value << 15 & 0xefc6_0000;
        value ^ value >> 18
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_are_those_of_pytorch() {
        assert_eq!(permutation(777, 448, 12), [103, 405, 263, 386, 423, 253, 177, 233, 431, 113, 249, 213]);
        assert_eq!(permutation(0, 10, 10), [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]);
        assert_eq!(permutation(5489, 1, 1), [0]);
        assert_eq!(permutation(1099511627781, 3000000, 6), [2453411, 2996893, 1769261, 529458, 2853190, 2240675]);
        assert_eq!(permutation(11, 720, 8), [441, 672, 676, 713, 49, 222, 575, 407]);
    }
}
