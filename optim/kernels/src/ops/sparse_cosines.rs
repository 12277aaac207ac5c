//! The product with a matrix that has few non-zero cosine coefficients.

use crate::dct::{Dct, DctBasis};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// Positions up to here are learned; the last row and column of large matrices are out of reach.
const LAST: f64 = 0.999;

/// Row and column in the spectrum `[d_out, d_in]` of every position `[2, n]` between 0 and 1, row by row.
pub fn pixels(positions: &[f32], shape: [usize; 2]) -> Vec<[usize; 2]> {
    let (rows, columns) = positions.split_at(positions.len() / 2);
    let pixel = |position: &f32, side: usize| {
        (f64::from(*position).clamp(0.0, LAST) * (side - 1) as f64).round_ties_even() as usize
    };
    rows.iter().zip(columns).map(|(row, column)| [pixel(row, shape[0]), pixel(column, shape[1])]).collect()
}

/// Reports whether positions have a gradient on this device.
#[cfg_attr(not(feature = "flex"), allow(unused_variables))]
pub fn moves_positions(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    return super::flex::on_flex(device);
    #[cfg(not(feature = "flex"))]
    return false;
}

/// `x U` with `U^T = scale C_out^T S C_in [d_out, d_in]`: `C` are cosine transforms, and `S` has the `coefficients [n]` at the pixels of the
/// `positions [2, n]`; where two meet they add up. `x [rows, d_in]`.
///
/// On the CPU backend rows run through fast transforms, only the inputs are kept, and positions have the surrogate gradient: half the
/// difference that the two neighbours in the spectrum would make, between -1 and 1, times the side minus one; 0 outside the learnable
/// range. Elsewhere positions have no gradient, because Burn stores gradients only in the backend's own type.
pub fn sparse_cosines(
    x: Tensor<2>,
    coefficients: Tensor<1>,
    positions: Tensor<2>,
    d_out: usize,
    scale: f64,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && super::flex::fits(&coefficients) && super::flex::fits(&positions) {
        return fused::sparse_cosines(x, coefficients, positions, d_out, scale);
    }
    composed(x, coefficients, positions, d_out, scale)
}

fn composed(x: Tensor<2>, coefficients: Tensor<1>, positions: Tensor<2>, d_out: usize, scale: f64) -> Tensor<2> {
    let (d_in, device) = (x.dims()[1], x.device().inner());
    let values = crate::host::values(positions.clone().without_autodiff());
    let mut pixels = pixels(&values, [d_out, d_in]);
    #[cfg(feature = "flex")]
    let coefficients = match positions.device().is_autodiff() && moves_positions(&positions.device()) {
        true => {
            let (wider, around) = with_neighbours(coefficients, positions, &values, &pixels, [d_out, d_in]);
            pixels.extend(around);
            wider
        }
        false => coefficients,
    };
    let cosines = |place: usize, side: usize| {
        let numbers: Vec<i32> = pixels.iter().map(|pixel| pixel[place] as i32).collect();
        let numbers = TensorData::new(numbers, [pixels.len()]);
        let numbers = Tensor::<1, Int>::from_data(numbers, (&device, DType::I32));
        Dct::of(side).tensor(DctBasis::Dct3, &device).select(0, numbers)
    };
    let spectrum = x.matmul(cosines(1, d_in).transpose()) * coefficients.mul_scalar(scale).unsqueeze();
    spectrum.matmul(cosines(0, d_out))
}

/// The coefficients and, for the neighbours of every component, zeros whose gradients make those of the positions; and the pixels of
/// the neighbours.
#[cfg(feature = "flex")]
fn with_neighbours(
    coefficients: Tensor<1>,
    positions: Tensor<2>,
    values: &[f32],
    pixels: &[[usize; 2]],
    shape: [usize; 2],
) -> (Tensor<1>, Vec<[usize; 2]>) {
    let (n, device) = (pixels.len(), positions.device().inner());
    let coefficients = if coefficients.device().is_autodiff() { coefficients } else { coefficients.autodiff() };
    let free = |(place, position): (usize, &f32)| {
        let inside = *position > 0.0 && f64::from(*position) < LAST;
        if inside { (shape[place / n] - 1) as f32 } else { 0.0 }
    };
    let sides = values.iter().enumerate().map(free).collect::<Vec<f32>>();
    let sides = Tensor::<2>::from_data(TensorData::new(sides, [2, n]), (&device, DType::F32));
    let moved = fused::bounded(positions * sides);
    let half = coefficients.clone().detach().mul_scalar(0.5).unsqueeze::<2>();
    let pull = (moved.clone() - moved.detach()) * half;
    let mut all = vec![coefficients];
    let mut around = Vec::new();
    for side in 0..2 {
        let pull = pull.clone().narrow(0, side, 1).reshape([n]);
        for (sign, forward) in [(1.0, true), (-1.0, false)] {
            all.push(pull.clone().mul_scalar(sign));
            around.extend(pixels.iter().map(|pixel| {
                let mut next = *pixel;
                next[side] =
                    if forward { (pixel[side] + 1).min(shape[side] - 1) } else { pixel[side].saturating_sub(1) };
                next
            }));
        }
    }
    (Tensor::cat(all, 0), around)
}

#[cfg(feature = "flex")]
mod fused {
    use crate::dct::{Dct, DctBasis};
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::Tensor;
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::{LAST, pixels};
    use crate::ops::flex::{ROWS, contiguous, tensor, values};

    pub fn sparse_cosines(
        x: Tensor<2>,
        coefficients: Tensor<1>,
        positions: Tensor<2>,
        d_out: usize,
        scale: f64,
    ) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as SparseCosinesOp>::fused_sparse_cosines(
            x.into_dispatch(),
            coefficients.into_dispatch(),
            positions.into_dispatch(),
            d_out,
            scale,
        ))
    }

    /// The same values, with gradients clamped between -1 and 1.
    pub fn bounded(x: Tensor<2>) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as BoundedOp>::bounded(x.into_dispatch()))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait BoundedOp: Backend {
        fn bounded(x: FloatTensor<Self>) -> FloatTensor<Self>;
    }

    impl BoundedOp for Flex {
        fn bounded(x: FlexTensor) -> FlexTensor {
            x
        }
    }

    impl<C: CheckpointStrategy> BoundedOp for Autodiff<Flex, C> {
        fn bounded(x: FloatTensor<Self>) -> FloatTensor<Self> {
            let prepared = BoundedBackward.prepare::<C>([x.node()]).compute_bound().stateful();
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((), x.into_primitive()),
                OpsKind::UnTracked(prepared) => prepared.finish(x.into_primitive()),
            }
        }
    }

    #[derive(Debug)]
    struct BoundedBackward;

    impl Backward<Flex, 1> for BoundedBackward {
        type State = ();

        fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (rows, columns) = (dy.shape()[0], dy.shape()[1]);
            if let [Some(node)] = ops.parents {
                let held = values(&dy).iter().map(|gradient| gradient.clamp(-1.0, 1.0)).collect();
                grads.register::<Flex>(node.id, tensor(held, [rows, columns]));
            }
        }
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait SparseCosinesOp: Backend {
        fn fused_sparse_cosines(
            x: FloatTensor<Self>,
            coefficients: FloatTensor<Self>,
            positions: FloatTensor<Self>,
            d_out: usize,
            scale: f64,
        ) -> FloatTensor<Self>;
    }

    impl SparseCosinesOp for Flex {
        fn fused_sparse_cosines(
            x: FlexTensor,
            coefficients: FlexTensor,
            positions: FlexTensor,
            d_out: usize,
            scale: f64,
        ) -> FlexTensor {
            forward(&Inputs::of([x, coefficients, positions], d_out, scale))
        }
    }

    impl<C: CheckpointStrategy> SparseCosinesOp for Autodiff<Flex, C> {
        fn fused_sparse_cosines(
            x: FloatTensor<Self>,
            coefficients: FloatTensor<Self>,
            positions: FloatTensor<Self>,
            d_out: usize,
            scale: f64,
        ) -> FloatTensor<Self> {
            let nodes = [x.node(), coefficients.node(), positions.node()];
            let prepared = SparseCosinesBackward.prepare::<C>(nodes).compute_bound().stateful();
            let inputs = [x, coefficients, positions].map(|input| input.into_primitive());
            let inputs = Inputs::of(inputs, d_out, scale);
            let y = forward(&inputs);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish(inputs, y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Clone, Debug)]
    struct Inputs {
        x: FlexTensor,
        coefficients: FlexTensor,
        positions: FlexTensor,
        rows: usize,
        d_in: usize,
        d_out: usize,
        scale: f32,
    }

    #[derive(Debug)]
    struct SparseCosinesBackward;

    impl Backward<Flex, 3> for SparseCosinesBackward {
        type State = Inputs;

        fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let wanted = [0, 1, 2].map(|place| ops.parents[place].is_some());
            let gradients = backward(&ops.state, &dy, wanted);
            for (node, gradient) in ops.parents.into_iter().zip(gradients) {
                if let (Some(node), Some(gradient)) = (node, gradient) {
                    grads.register::<Flex>(node.id, gradient);
                }
            }
        }
    }

    impl Inputs {
        fn of(inputs: [FlexTensor; 3], d_out: usize, scale: f64) -> Self {
            let [x, coefficients, positions] = inputs.map(contiguous);
            let (rows, d_in) = (x.shape()[0], x.shape()[1]);
            Self { x, coefficients, positions, rows, d_in, d_out, scale: scale as f32 }
        }

        /// Pixel and scaled coefficient of every component.
        fn components(&self) -> Vec<([usize; 2], f32)> {
            let pixels = pixels(values(&self.positions), [self.d_out, self.d_in]);
            let coefficients = values(&self.coefficients).iter().map(|value| value * self.scale);
            pixels.into_iter().zip(coefficients).collect()
        }

        /// The spectra of the rows of `x`.
        fn spectra(&self) -> Vec<f32> {
            let mut spectra = values(&self.x).to_vec();
            Dct::of(self.d_in).transform_rows(&mut spectra, DctBasis::Dct2);
            spectra
        }
    }

    fn forward(inputs: &Inputs) -> FlexTensor {
        let Inputs { rows, d_in, d_out, .. } = *inputs;
        let (components, spectra) = (inputs.components(), inputs.spectra());
        let mut y = vec![0.0; rows * d_out];
        y.par_chunks_mut(ROWS * d_out).zip(spectra.par_chunks(ROWS * d_in)).for_each(|(y, spectra)| {
            for (y, spectrum) in y.chunks_exact_mut(d_out).zip(spectra.chunks_exact(d_in)) {
                for ([row, column], value) in &components {
                    y[*row] += value * spectrum[*column];
                }
            }
        });
        Dct::of(d_out).transform_rows(&mut y, DctBasis::Dct3);
        tensor(y, [rows, d_out])
    }

    /// Entries of the spectrum of the update's gradient that a component needs: its own, and those next to it.
    fn places([row, column]: [usize; 2], [rows, columns]: [usize; 2]) -> [[usize; 2]; 5] {
        [
            [row, column],
            [(row + 1).min(rows - 1), column],
            [row.saturating_sub(1), column],
            [row, (column + 1).min(columns - 1)],
            [row, column.saturating_sub(1)],
        ]
    }

    fn backward(
        inputs: &Inputs,
        dy: &FlexTensor,
        [wants_x, wants_coefficients, wants_positions]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let Inputs { rows, d_in, d_out, scale, .. } = *inputs;
        let components = inputs.components();
        let mut gradients = values(dy).to_vec();
        Dct::of(d_out).transform_rows(&mut gradients, DctBasis::Dct2);
        let dx = wants_x.then(|| {
            let mut dx = vec![0.0; rows * d_in];
            dx.par_chunks_mut(ROWS * d_in).zip(gradients.par_chunks(ROWS * d_out)).for_each(|(dx, gradients)| {
                for (dx, gradient) in dx.chunks_exact_mut(d_in).zip(gradients.chunks_exact(d_out)) {
                    for ([row, column], value) in &components {
                        dx[*column] += value * gradient[*row];
                    }
                }
            });
            Dct::of(d_in).transform_rows(&mut dx, DctBasis::Dct3);
            tensor(dx, [rows, d_in])
        });
        if !wants_coefficients && !wants_positions {
            return [dx, None, None];
        }
        let (spectra, n) = (inputs.spectra(), components.len());
        let asked = if wants_positions { 5 } else { 1 };
        let places: Vec<[usize; 2]> =
            components.iter().flat_map(|(pixel, _)| places(*pixel, [d_out, d_in]).into_iter().take(asked)).collect();
        let parts: Vec<Vec<f32>> = spectra
            .par_chunks(ROWS * d_in)
            .zip(gradients.par_chunks(ROWS * d_out))
            .map(|(spectra, gradients)| {
                let mut sums = vec![0.0; places.len()];
                for (spectrum, gradient) in spectra.chunks_exact(d_in).zip(gradients.chunks_exact(d_out)) {
                    for (sum, [row, column]) in sums.iter_mut().zip(&places) {
                        *sum += gradient[*row] * spectrum[*column];
                    }
                }
                sums
            })
            .collect();
        let mut sums = vec![0f32; places.len()];
        for part in &parts {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        sums.iter_mut().for_each(|sum| *sum *= scale);
        let dpositions = wants_positions.then(|| {
            let (positions, coefficients) = (values(&inputs.positions), values(&inputs.coefficients));
            let gradient = |place: usize| {
                let (side, number) = (place / n, place % n);
                let around = &sums[5 * number + 1 + 2 * side..][..2];
                let pull = (0.5 * coefficients[number] * (around[0] - around[1])).clamp(-1.0, 1.0);
                let free = positions[place] > 0.0 && f64::from(positions[place]) < LAST;
                if free { pull * ([d_out, d_in][side] - 1) as f32 } else { 0.0 }
            };
            tensor((0..2 * n).map(gradient).collect(), [2, n])
        });
        let own = || sums.iter().step_by(asked).copied().collect();
        [dx, wants_coefficients.then(|| tensor(own(), [n])), dpositions]
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, device, random};

    type Form = fn(Tensor<2>, Tensor<1>, Tensor<2>, usize, f64) -> Tensor<2>;

    #[test]
    fn the_fast_form_equals_the_matrices() {
        for [rows, d_in, d_out, n] in [[5, 12, 16, 10], [70, 33, 7, 40], [1, 1, 5, 3]] {
            // Coefficients of which some exceed the gradient bounds.
            let inputs = [random(&[rows, d_in], 1), random(&[n], 2), random(&[2 * n], 3)];
            let run = |form: Form| {
                move |inputs: &[Tensor<1>]| {
                    let x = inputs[0].clone().reshape([rows, d_in]);
                    // Beyond both ends of the learnable range.
                    let positions = inputs[2].clone().reshape([2, n]).mul_scalar(0.6).add_scalar(0.5);
                    form(x, inputs[1].clone(), positions, d_out, 0.7).reshape([rows * d_out])
                }
            };
            // On a GPU positions have no gradient.
            Check::new(&inputs).equal_on_cpu(run(sparse_cosines), run(composed));
            let [x, coefficients, positions] = inputs;
            let still = |form: Form| {
                let (run, positions) = (run(form), positions.clone());
                move |inputs: &[Tensor<1>]| {
                    let data = TensorData::new(positions.clone(), [positions.len()]);
                    run(&[inputs[0].clone(), inputs[1].clone(), Tensor::from_data(data, &device(inputs))])
                }
            };
            Check::new(&[x, coefficients]).equal(still(sparse_cosines), still(composed));
        }
    }
}
