//! Random numbers that depend only on their purpose: only the count of draws has to be stored.

use burn::tensor::{Device, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::seq::index;
use rand::{RngExt, SeedableRng};

/// A generator of its own for (seed, key, count).
pub fn generator(seed: u64, key: u64, count: u64) -> StdRng {
    let mut state = [0u8; 32];
    for (part, value) in state.chunks_exact_mut(8).zip([seed, key, count, 0x6c6f_7772_616e_6b21]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    StdRng::from_seed(state)
}

/// Independent draws from the standard normal distribution (Box and Muller).
pub fn normal(rng: &mut StdRng, count: usize) -> Vec<f32> {
    let mut pair = || {
        // Never 0, whose logarithm is infinite.
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let angle = std::f64::consts::TAU * rng.random::<f64>();
        [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
    };
    (0..count.div_ceil(2)).flat_map(|_| pair()).take(count).collect()
}

/// Draws of a normal distribution, `[n, r]`: the start of an iteration.
pub fn normal_matrix(seed: u64, key: u64, shape: [usize; 2], device: &Device) -> Tensor<2> {
    let draws = normal(&mut generator(seed, key, 0), shape[0] * shape[1]);
    Tensor::from_data(TensorData::new(draws, shape), device)
}

/// `count` different numbers below `length`, ascending.
pub fn sample(rng: &mut StdRng, length: usize, count: usize) -> Vec<i32> {
    let mut chosen: Vec<i32> = index::sample(rng, length, count).iter().map(|index| index as i32).collect();
    chosen.sort_unstable();
    chosen
}

/// Uniform draws between plus and minus `bound`.
pub fn uniform_values(random: &mut StdRng, count: usize, bound: f64) -> Vec<f32> {
    std::iter::repeat_with(|| ((2.0 * random.random::<f64>() - 1.0) * bound) as f32).take(count).collect()
}

/// Normal draws with mean 0 and deviation `std`.
pub fn normal_values(random: &mut StdRng, count: usize, std: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt() * std;
        let (sin, cos) = (std::f64::consts::TAU * random.random::<f64>()).sin_cos();
        values.push((radius * cos) as f32);
        values.push((radius * sin) as f32);
    }
    values.truncate(count);
    values
}

/// A number for a name (FNV-1a, 64 bits): small, stable across versions and platforms.
pub fn key_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_all_three_and_on_nothing_else() {
        let draw = |seed, key, count| normal(&mut generator(seed, key, count), 8);
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
        for other in [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)] {
            assert_ne!(draw(1, 2, 3), other);
        }
        assert_ne!(key_of("a.weight"), key_of("b.weight"));
    }

    #[test]
    fn normal_draws_have_mean_0_and_variance_1() {
        let values = normal(&mut generator(0, 0, 0), 100_000);
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / 1e5;
        let square = values.iter().map(|x| f64::from(x * x)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 3.0 / 1e5f64.sqrt() && (square - 1.0).abs() < 3.0 * (2.0 / 1e5f64).sqrt());
    }

    #[test]
    fn samples_are_ascending_and_without_repetition() {
        let chosen = sample(&mut generator(0, 1, 2), 50, 20);
        assert!(chosen.len() == 20 && chosen.is_sorted() && chosen.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
