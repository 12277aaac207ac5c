//! Mixtures of random tensors that are drawn again whenever they are needed.
//!
//! Draws are a function of (seed, number of the tensor, position): the counter-based generator Philox4x32-10 of "Parallel Random Numbers: As Easy
//! as 1, 2, 3" (Salmon, Moraes, Dror, Shaw, 2011). The key is the seed, and word w for the counter (64 g + lane, 0, number, 0) is at
//! position `256 g + 64 w + lane`, uniform between -1 and 1.

use burn::tensor::{DType, Tensor, TensorData};

/// Draws of one turn of the generator.
const TURN: usize = 4 * LANES;
const LANES: usize = 64;

/// Sum of `bases [k, count]`, each times its coefficient `[k]`: `[count]`.
pub fn mixed(coefficients: Tensor<1>, bases: Tensor<2>) -> Tensor<1> {
    let count = bases.dims()[1];
    coefficients.unsqueeze::<2>().matmul(bases).reshape([count])
}

/// Variant of `mixed` for bases that are drawn from a seed.
///
/// On the CPU backend they exist a few values at a time and are drawn again for the backward pass; elsewhere they are kept.
pub fn mixed_draws(coefficients: Tensor<1>, seed: u64, count: usize) -> Tensor<1> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&coefficients) {
        return fused::mixed_draws(coefficients, seed, count);
    }
    composed(coefficients, seed, count)
}

fn composed(coefficients: Tensor<1>, seed: u64, count: usize) -> Tensor<1> {
    let k = coefficients.dims()[0];
    let values = (0..k).flat_map(|number| draws(seed, number, count)).collect();
    let plain = coefficients.device().inner();
    let bases = Tensor::<2>::from_data(TensorData::new::<f32, _>(values, [k, count]), (&plain, DType::F32));
    let bases = bases.cast(coefficients.dtype());
    mixed(coefficients, bases)
}

/// The first values of one of the tensors.
pub fn draws(seed: u64, number: usize, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    draw(seed, number, 0, &mut values);
    values
}

/// The values from turn `turn` on.
#[inline(always)]
fn draw(seed: u64, number: usize, turn: usize, out: &mut [f32]) {
    let (turns, rest) = out.as_chunks_mut::<TURN>();
    let last = turn + turns.len();
    for (turn, out) in (turn..).zip(turns) {
        fill(seed, number as u32, (turn * LANES) as u32, out);
    }
    if !rest.is_empty() {
        let mut whole = [0.0; TURN];
        fill(seed, number as u32, (last * LANES) as u32, &mut whole);
        rest.copy_from_slice(&whole[..rest.len()]);
    }
}

/// One turn: lanes side by side, so that they become one vector.
#[inline(always)]
fn fill(seed: u64, number: u32, first: u32, out: &mut [f32; TURN]) {
    for lane in 0..LANES {
        let words = philox([first.wrapping_add(lane as u32), 0, number, 0], seed);
        for (word, bits) in words.into_iter().enumerate() {
            out[word * LANES + lane] = bits as i32 as f32 * 2f32.powi(-31);
        }
    }
}

/// Ten rounds.
#[inline(always)]
fn philox([mut a, mut b, mut c, mut d]: [u32; 4], seed: u64) -> [u32; 4] {
    let (mut low, mut high) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        let (p, q) = (u64::from(a) * 0xD251_1F53, u64::from(c) * 0xCD9E_8D57);
        (a, b, c, d) = ((q >> 32) as u32 ^ b ^ low, q as u32, (p >> 32) as u32 ^ d ^ high, p as u32);
        (low, high) = (low.wrapping_add(0x9E37_79B9), high.wrapping_add(0xBB67_AE85));
    }
    [a, b, c, d]
}

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::Tensor;
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::{TURN, draw};
    use crate::ops::flex::{contiguous, tensor, values, vectorised};

    /// Values of one tensor in memory at once.
    const CHUNK: usize = 4 * TURN;

    pub fn mixed_draws(coefficients: Tensor<1>, seed: u64, count: usize) -> Tensor<1> {
        let coefficients = coefficients.into_dispatch();
        Tensor::from_dispatch(<Dispatch as MixedDrawsOp>::fused_mixed_draws(coefficients, seed, count))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait MixedDrawsOp: Backend {
        fn fused_mixed_draws(coefficients: FloatTensor<Self>, seed: u64, count: usize) -> FloatTensor<Self>;
    }

    impl MixedDrawsOp for Flex {
        fn fused_mixed_draws(coefficients: FlexTensor, seed: u64, count: usize) -> FlexTensor {
            forward(&contiguous(coefficients), seed, count)
        }
    }

    impl<C: CheckpointStrategy> MixedDrawsOp for Autodiff<Flex, C> {
        fn fused_mixed_draws(coefficients: FloatTensor<Self>, seed: u64, count: usize) -> FloatTensor<Self> {
            let prepared = MixedDrawsBackward.prepare::<C>([coefficients.node()]).compute_bound().stateful();
            let coefficients = contiguous(coefficients.into_primitive());
            let y = forward(&coefficients, seed, count);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((seed, coefficients.shape()[0]), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct MixedDrawsBackward;

    impl Backward<Flex, 1> for MixedDrawsBackward {
        /// Seed, and number of tensors.
        type State = (u64, usize);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (seed, tensors) = ops.state;
            if let [Some(node)] = ops.parents {
                grads.register::<Flex>(node.id, backward(&dy, seed, tensors));
            }
        }
    }

    fn forward(coefficients: &FlexTensor, seed: u64, count: usize) -> FlexTensor {
        let coefficients = values(coefficients);
        let mut y = vec![0.0; count];
        y.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, y)| {
            let mut memory = [0f32; CHUNK];
            let basis = &mut memory[..y.len()];
            vectorised(
                #[inline(always)]
                || {
                    for (number, coefficient) in coefficients.iter().enumerate() {
                        draw(seed, number, chunk * (CHUNK / TURN), basis);
                        y.iter_mut().zip(&*basis).for_each(|(y, value)| *y += coefficient * value);
                    }
                },
            );
        });
        tensor(y, [count])
    }

    fn backward(dy: &FlexTensor, seed: u64, tensors: usize) -> FlexTensor {
        let dy = values(dy);
        let gradient = |number: usize| {
            let mut memory = [0f32; CHUNK];
            let mut sum = 0f64;
            vectorised(
                #[inline(always)]
                || {
                    for (chunk, dy) in dy.chunks(CHUNK).enumerate() {
                        let basis = &mut memory[..dy.len()];
                        draw(seed, number, chunk * (CHUNK / TURN), basis);
                        let mut lanes = [0f32; 16];
                        for (dy, basis) in dy.chunks(16).zip(basis.chunks(16)) {
                            for ((lane, dy), value) in lanes.iter_mut().zip(dy).zip(basis) {
                                *lane += dy * value;
                            }
                        }
                        sum += f64::from(lanes.iter().sum::<f32>());
                    }
                },
            );
            sum as f32
        };
        tensor((0..tensors).into_par_iter().map(gradient).collect(), [tensors])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_philox() {
        // A known answer of the authors' code.
        assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }

    #[test]
    fn draws_depend_on_seed_number_and_position_alone() {
        let all = draws(7, 3, 600);
        assert_eq!(draws(7, 3, 70), all[..70]);
        let mut later = vec![0.0; 88];
        draw(7, 3, 2, &mut later);
        assert_eq!(later, all[512..]);
        assert!(draws(8, 3, 600) != all && draws(7 | 1 << 32, 3, 600) != all && draws(7, 4, 600) != all);
    }

    #[test]
    fn draws_are_uniform_between_minus_one_and_one() {
        let count = 100_000;
        let values = draws(1, 2, count);
        let moment = |power: i32| values.iter().map(|x| f64::from(*x).powi(power)).sum::<f64>() / count as f64;
        for (power, expected) in [(1, 0.0), (2, 1.0 / 3.0), (3, 0.0), (4, 0.2)] {
            // Five deviations of the mean.
            let spread = (1.0 / f64::from(2 * power + 1) - expected * expected).sqrt();
            assert!((moment(power) - expected).abs() < 5.0 * spread / (count as f64).sqrt(), "{power}");
        }
        assert!(values.iter().all(|x| x.abs() <= 1.0));
        let neighbours: f64 = values.windows(2).map(|x| f64::from(x[0] * x[1])).sum::<f64>() / count as f64;
        assert!(neighbours.abs() < 5.0 / 3.0 / (count as f64).sqrt());
    }

    #[cfg(feature = "flex")]
    #[test]
    fn mixing_in_pieces_equals_mixing_kept_bases() {
        use crate::ops::check::{Check, random};
        for (k, count) in [(1, 1), (7, 100), (40, 3000), (3, 1024)] {
            let run = |form: fn(Tensor<1>, u64, usize) -> Tensor<1>| {
                move |inputs: &[Tensor<1>]| form(inputs[0].clone(), 5 << 40 | 11, count)
            };
            let check = Check::new(&[random(&[k], 1)]);
            check.equal(run(mixed_draws), run(composed));
            check.gradients(run(composed));
        }
    }
}
