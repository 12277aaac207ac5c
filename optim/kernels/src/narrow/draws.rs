//! Random bits that are a function of seed, stream, step, parameter and element alone: neither threads nor the order of steps change them.
//!
//! The generator is Philox4x32-10 of "Parallel random numbers: as easy as 1, 2, 3" (Salmon, Moraes, Dror and Shaw, SC 2011).

/// Rounds of the generator.
const ROUNDS: usize = 10;

/// Four words of Philox4x32-10 for a counter and a key.
#[inline(always)]
pub fn philox([mut c0, mut c1, mut c2, mut c3]: [u32; 4], [mut k0, mut k1]: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            k0 = k0.wrapping_add(0x9e37_79b9);
            k1 = k1.wrapping_add(0xbb67_ae85);
        }
        let first = 0xd251_1f53u64 * u64::from(c0);
        let second = 0xcd9e_8d57u64 * u64::from(c2);
        [c0, c1, c2, c3] =
            [(second >> 32) as u32 ^ c1 ^ k0, second as u32, (first >> 32) as u32 ^ c3 ^ k1, first as u32];
    }
    [c0, c1, c2, c3]
}

/// Purpose of draws: each has a stream of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// 16 bits an element, for weights in bf16.
    Sixteen,
    /// 24 bits an element, for weights of 8 bits.
    TwentyFour,
}

/// The draws of one parameter at one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    key: [u32; 2],
    step: u32,
    parameter: [u32; 2],
}

impl Draws {
    /// Draws of a seed and a stream, for the parameter of this key at this step, which counts from 1.
    pub fn new(seed: u64, stream: Stream, step: u32, parameter: u64) -> Self {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        let stream = stream as u64;
        let seed = seed.wrapping_add(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self { key: halves(seed), step, parameter: halves(parameter) }
    }

    #[inline(always)]
    fn block(&self, block: u32) -> [u32; 4] {
        let [low, high] = self.parameter;
        philox([block, self.step, low, high], self.key)
    }

    /// 16 bits for each of the elements from `first` on.
    #[inline(always)]
    pub fn sixteen(&self, first: usize, to: &mut [u16]) {
        self.each::<8, u16>(first, to, |words, index| (words[index / 2] >> (16 * (index % 2))) as u16);
    }

    /// 24 bits for each of the elements from `first` on.
    #[inline(always)]
    pub fn twenty_four(&self, first: usize, to: &mut [u32]) {
        self.each::<4, u32>(first, to, |words, index| words[index] >> 8);
    }

    /// Draws of blocks of `N` elements, which the first one may begin within.
    #[inline(always)]
    fn each<const N: usize, T>(&self, first: usize, to: &mut [T], draw: impl Fn(&[u32; 4], usize) -> T) {
        let (head, body) = to.split_at_mut((first.next_multiple_of(N) - first).min(to.len()));
        let words = self.block((first / N) as u32);
        for (index, to) in head.iter_mut().enumerate() {
            *to = draw(&words, first % N + index);
        }
        let next = (first + head.len()) / N;
        for (number, part) in body.chunks_mut(N).enumerate() {
            let words = self.block((next + number) as u32);
            for (index, to) in part.iter_mut().enumerate() {
                *to = draw(&words, index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_its_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn draws_depend_on_each_part_of_their_purpose_and_not_on_the_split() {
        let sixteen = |draws: Draws| {
            let mut all = vec![0; 50];
            draws.sixteen(0, &mut all);
            let (mut first, mut second) = ([0; 16], [0; 34]);
            draws.sixteen(0, &mut first);
            draws.sixteen(16, &mut second);
            assert_eq!(all, [&first[..], &second[..]].concat());
            all
        };
        let base = Draws::new(7, Stream::Sixteen, 3, 11);
        let others = [
            Draws::new(8, Stream::Sixteen, 3, 11),
            Draws::new(7, Stream::TwentyFour, 3, 11),
            Draws::new(7, Stream::Sixteen, 4, 11),
            Draws::new(7, Stream::Sixteen, 3, 12),
            Draws::new(7, Stream::Sixteen, 3, 11 | 1 << 40),
        ];
        assert!(others.into_iter().all(|other| sixteen(other) != sixteen(base)));
        let (mut all, mut second) = (vec![0; 23], [0; 15]);
        base.twenty_four(0, &mut all);
        for first in [8, 7, 1] {
            base.twenty_four(first, &mut second);
            assert_eq!(all[first..first + 15], second);
        }
    }
}
