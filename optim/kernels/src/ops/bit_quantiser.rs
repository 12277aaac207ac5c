//! The quantiser of Bayesian Bits ("Bayesian Bits: Unifying Quantization and Pruning", arXiv 2005.07093).

use burn::tensor::Tensor;

use crate::host::values as host;

/// Fraction of the range within which values are cut.
const CLIP: f64 = 1.0 - 1e-7;
/// Factor of the range that is the step of 2 bits.
const COARSEST: f64 = 2.0 / 3.0;
/// Quotients of the steps of 4, 8, 16 and 32 bits to the one before.
const DIVISORS: [f64; 4] = [5.0, 17.0, 257.0, 65537.0];

/// Quantises values within `x_max [1]` to 2 bits and adds the residuals of 4, 8, 16 and 32 bits as long as their gates
/// `gates [levels]` are on. Rounding, half to even, has derivative 1.
///
/// On the CPU backend one pass forward and one backward, and nothing is kept but the inputs.
pub fn bit_quantised<const D: usize>(x: Tensor<D>, x_max: Tensor<1>, gates: Tensor<1>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && super::flex::fits(&x_max) && super::flex::fits(&gates) {
        return fused::bit_quantised(x, x_max, gates);
    }
    composed(x, x_max, gates)
}

fn composed<const D: usize>(x: Tensor<D>, x_max: Tensor<1>, gates: Tensor<1>) -> Tensor<D> {
    let most = x_max.clone().mul_scalar(CLIP).reshape([1; D]).expand(x.shape());
    let (above, below) = (x.clone().greater(most.clone()), x.clone().lower(most.clone().neg()));
    let x = x.mask_where(above, most.clone()).mask_where(below, most.neg());
    let mut step = x_max.mul_scalar(COARSEST).reshape([1; D]);
    // The clipped range may round up to the tie at 1.5, which would round to a level that does not exist.
    let first = step.clone() * rounded(x.clone() / step.clone(), Some(1.0));
    let mut residual = x - first.clone();
    let mut sum = first;
    let mut product: Option<Tensor<1>> = None;
    for (level, divisor) in DIVISORS.into_iter().enumerate().take(gates.dims()[0]) {
        let own = gates.clone().narrow(0, level, 1);
        let all = match product {
            Some(product) => product * own,
            None => own,
        };
        if host(all.clone().without_autodiff())[0] == 0.0 {
            break;
        }
        step = step.div_scalar(divisor);
        let part = step.clone() * rounded(residual.clone() / step.clone(), None);
        residual = residual - part.clone();
        sum = sum + part * all.clone().reshape([1; D]);
        product = Some(all);
    }
    sum
}

/// Rounds half to even, with derivative 1.
fn rounded<const D: usize>(x: Tensor<D>, most: Option<f64>) -> Tensor<D> {
    let fixed = x.clone().detach();
    let level = match most {
        Some(most) => fixed.clone().round().clamp(-most, most),
        None => fixed.clone().round(),
    };
    // Exactly the level: the difference of x from itself is 0.
    level + (x - fixed)
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

    use super::{CLIP, COARSEST, DIVISORS};
    use crate::ops::flex::{Cleared, contiguous, tensor, values, vectorised};

    /// Elements that one task processes.
    const CHUNK: usize = 1 << 14;
    /// Sums that run beside each other.
    const LANES: usize = 16;
    /// Levels, with that of 2 bits.
    const LEVELS: usize = DIVISORS.len() + 1;

    pub fn bit_quantised<const D: usize>(x: Tensor<D>, x_max: Tensor<1>, gates: Tensor<1>) -> Tensor<D> {
        Tensor::from_dispatch(<Dispatch as BitQuantiserOp>::fused_bit_quantised(
            x.into_dispatch(),
            x_max.into_dispatch(),
            gates.into_dispatch(),
        ))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait BitQuantiserOp: Backend {
        fn fused_bit_quantised(
            x: FloatTensor<Self>,
            x_max: FloatTensor<Self>,
            gates: FloatTensor<Self>,
        ) -> FloatTensor<Self>;
    }

    impl BitQuantiserOp for Flex {
        fn fused_bit_quantised(x: FlexTensor, x_max: FlexTensor, gates: FlexTensor) -> FlexTensor {
            forward(&[x, x_max, gates].map(contiguous))
        }
    }

    impl<C: CheckpointStrategy> BitQuantiserOp for Autodiff<Flex, C> {
        fn fused_bit_quantised(
            x: FloatTensor<Self>,
            x_max: FloatTensor<Self>,
            gates: FloatTensor<Self>,
        ) -> FloatTensor<Self> {
            let nodes = [x.node(), x_max.node(), gates.node()];
            let prepared = BitQuantiserBackward.prepare::<C>(nodes).compute_bound().stateful();
            let inputs = [x, x_max, gates].map(|input| contiguous(input.into_primitive()));
            let y = forward(&inputs);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish(inputs, y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct BitQuantiserBackward;

    impl Backward<Flex, 3> for BitQuantiserBackward {
        type State = [FlexTensor; 3];

        fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            for (node, gradient) in ops.parents.into_iter().zip(backward(&ops.state, &dy)) {
                if let Some(node) = node {
                    grads.register::<Flex>(node.id, gradient);
                }
            }
        }
    }

    /// Steps and gates of all values of a tensor.
    struct Grid {
        range: f32,
        most: f32,
        steps: [f32; LEVELS],
        /// Product of the gates up to each level, 1 for that of 2 bits.
        products: [f32; LEVELS],
        /// Levels up to the first that is off.
        used: usize,
    }

    impl Grid {
        fn new(x_max: &FlexTensor, gates: &FlexTensor) -> Self {
            let range = values(x_max)[0];
            let mut grid = Self {
                range,
                most: range * CLIP as f32,
                steps: [range * COARSEST as f32; LEVELS],
                products: [1.0; LEVELS],
                used: 1,
            };
            for (gate, divisor) in values(gates).iter().zip(DIVISORS) {
                let level = grid.used;
                let product = if level == 1 { *gate } else { grid.products[level - 1] * gate };
                if product == 0.0 {
                    break;
                }
                grid.steps[level] = grid.steps[level - 1] / divisor as f32;
                grid.products[level] = product;
                grid.used += 1;
            }
            grid
        }

        #[inline(always)]
        fn clipped(&self, x: f32) -> f32 {
            let x = if x > self.most { self.most } else { x };
            if x < -self.most { -self.most } else { x }
        }

        /// Calls with every level, its part of the value, and the distance of the part from what it rounds, in steps.
        #[inline(always)]
        fn parts<const USED: usize>(&self, clipped: f32, mut act: impl FnMut(usize, f32, f32)) {
            let mut residual = clipped;
            for level in 0..USED {
                let exact = residual / self.steps[level];
                let mut nearest = exact.round_ties_even();
                if level == 0 {
                    nearest = if nearest > 1.0 { 1.0 } else { nearest };
                    nearest = if nearest < -1.0 { -1.0 } else { nearest };
                }
                let part = self.steps[level] * nearest;
                residual -= part;
                act(level, part, nearest - exact);
            }
        }
    }

    /// Calls a function whose parameter is the number of levels in use.
    macro_rules! with_levels {
        ($used:expr, $function:ident($($argument:expr),*)) => {
            match $used {
                1 => $function::<1>($($argument),*),
                2 => $function::<2>($($argument),*),
                3 => $function::<3>($($argument),*),
                4 => $function::<4>($($argument),*),
                _ => $function::<LEVELS>($($argument),*),
            }
        };
    }

    fn forward([x, x_max, gates]: &[FlexTensor; 3]) -> FlexTensor {
        let grid = Grid::new(x_max, gates);
        let mut y = Cleared::new(values(x).len());
        y.parts(CHUNK)
            .zip(values(x).par_chunks(CHUNK))
            .for_each(|(y, x)| with_levels!(grid.used, quantise(&grid, x, y)));
        tensor(y.into_values(), x.shape())
    }

    fn quantise<const USED: usize>(grid: &Grid, x: &[f32], y: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.iter_mut().zip(x) {
                    grid.parts::<USED>(grid.clipped(*x), |level, part, _| *y += part * grid.products[level]);
                }
            },
        );
    }

    /// Sums over the values of a tensor.
    #[derive(Clone, Copy, Default)]
    struct Sums {
        /// Gradient of the range.
        range: f64,
        /// Gradient of the product of gates of every level.
        products: [f64; LEVELS],
    }

    /// Gradients of the values, the range and the gates.
    fn backward([x, x_max, gates]: &[FlexTensor; 3], dy: &FlexTensor) -> [FlexTensor; 3] {
        let grid = Grid::new(x_max, gates);
        let mut dx = Cleared::new(values(x).len());
        let inputs = values(x).par_chunks(CHUNK).zip(values(dy).par_chunks(CHUNK));
        let sums: Vec<Sums> = dx
            .parts(CHUNK)
            .zip(inputs)
            .map(|(dx, (x, dy))| with_levels!(grid.used, gradients(&grid, x, dy, dx)))
            .collect();
        let range: f64 = sums.iter().map(|sums| sums.range).sum();
        let of_product = |level: usize| -> f64 { sums.iter().map(|sums| sums.products[level]).sum() };
        // The product of a level has the gates of all levels up to it.
        let gate = |own: usize| -> f32 {
            let rest = |level: usize| -> f64 {
                let others = (1..=level).filter(|other| *other != own);
                others.map(|other| f64::from(values(gates)[other - 1])).product()
            };
            (own..grid.used).map(|level| of_product(level) * rest(level)).sum::<f64>() as f32
        };
        let of_gates: Vec<f32> = (1..=values(gates).len()).map(gate).collect();
        [
            tensor(dx.into_values(), x.shape()),
            tensor(vec![range as f32], x_max.shape()),
            tensor(of_gates, gates.shape()),
        ]
    }

    /// Writes the gradients of values. Rounding passes gradients on, so that a part is `step * nearest` with a slope of
    /// `nearest - exact` in the step, and the residual it leaves has the negative of it.
    fn gradients<const USED: usize>(grid: &Grid, x: &[f32], dy: &[f32], dx: &mut [f32]) -> Sums {
        let mut ranges = [0f32; LANES];
        let mut products = [[0f32; LANES]; USED];
        vectorised(
            #[inline(always)]
            || {
                let lanes = dx.chunks_mut(LANES).zip(x.chunks(LANES)).zip(dy.chunks(LANES));
                for ((dx, x), dy) in lanes {
                    for (lane, ((dx, x), dy)) in dx.iter_mut().zip(x).zip(dy).enumerate() {
                        let clipped = grid.clipped(*x);
                        let inside = *x <= grid.most && *x >= -grid.most;
                        *dx = if inside { *dy } else { 0.0 };
                        let edge = if clipped > 0.0 { CLIP as f32 } else { -(CLIP as f32) };
                        let mut slope = if inside { 0.0 } else { edge };
                        let mut before = 0.0;
                        grid.parts::<USED>(clipped, |level, part, off| {
                            let own = off * grid.steps[level] / grid.range;
                            slope += grid.products[level] * (own - before);
                            before = own;
                            products[level][lane] += dy * part;
                        });
                        ranges[lane] += dy * slope;
                    }
                }
            },
        );
        let total = |lanes: &[f32; LANES]| lanes.iter().map(|value| f64::from(*value)).sum();
        let mut sums = Sums { range: total(&ranges), ..Sums::default() };
        for (sum, lanes) in sums.products.iter_mut().zip(&products) {
            *sum = total(lanes);
        }
        sums
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for (count, most) in [(1, 0.7f32), (37, 0.9), (40_000, 0.5), (300, 2.0)] {
            for gates in [vec![0.7], vec![1.0, 0.4, 0.0], vec![0.0, 1.0], vec![1.0, 1.0, 0.6], vec![0.9, 0.8, 0.7, 1.0]]
            {
                // A tie at the clipped range, and the range itself.
                let mut x = random(&[count], 3);
                x[0] = most;
                let check = Check::new(&[x, vec![most], gates.clone()]);
                type Quantiser = fn(Tensor<1>, Tensor<1>, Tensor<1>) -> Tensor<1>;
                let run = |quantiser: Quantiser| {
                    move |inputs: &[Tensor<1>]| {
                        let [x, x_max, gates] = [0, 1, 2].map(|place| inputs[place].clone());
                        // Gates behind one that is off have no gradient in the composed form.
                        let rest = gates.clone().sum().mul_scalar(0.0);
                        quantiser(x, x_max, gates) + rest
                    }
                };
                // What is left behind 32 bits is noise in f32.
                if gates.len() < 4 {
                    check.equal(run(bit_quantised), run(composed));
                }
                let values = |quantiser: Quantiser| {
                    let device = burn::tensor::Device::default();
                    let tensor = |values: Vec<f32>| {
                        let count = values.len();
                        Tensor::<1>::from_data(burn::tensor::TensorData::new(values, [count]), &device)
                    };
                    host(quantiser(tensor(random(&[count], 5)), tensor(vec![most]), tensor(gates.clone())))
                };
                assert_eq!(values(bit_quantised), values(composed));
            }
        }
    }

    #[test]
    fn values_beyond_the_range_are_cut_and_those_without_a_number_stay_so() {
        let device = burn::tensor::Device::default();
        let of = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
        let y = host(bit_quantised(of(&[f32::NAN, f32::INFINITY, -9.0]), of(&[1.0]), of(&[1.0])));
        assert!(y[0].is_nan());
        // Within half a step of 4 bits.
        assert!((y[1] - 1.0).abs() < 0.0667 && y[1] == -y[2], "{y:?}");
        assert!(host(bit_quantised(of(&[0.5]), of(&[f32::NAN]), of(&[1.0])))[0].is_nan());
    }
}
