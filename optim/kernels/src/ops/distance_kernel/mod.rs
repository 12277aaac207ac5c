//! A matrix of kernel values between the rows of two factors, made sparse: it exists a block of rows at a time.

#[cfg(feature = "flex")]
mod fused;
mod kernel;
mod select;

use burn::tensor::{Bool, Tensor, TensorData};

pub use kernel::{DistanceKernel, KeptValue, Sparsify};
pub use select::quantile_of_magnitudes;

impl DistanceKernel {
    /// The sparse matrix `[n, m]` of points `p [heads, n, k]` and `q [heads, m, k]`; `mixture [3]` is read if the kernel is mixed.
    pub fn matrix(&self, p: Tensor<3>, q: Tensor<3>, mixture: Tensor<1>) -> Tensor<2> {
        #[cfg(feature = "flex")]
        if super::flex::fits(&p) && super::flex::fits(&q) && super::flex::fits(&mixture) {
            return fused::matrix(p, q, mixture, self.clone());
        }
        self.composed(p, q, mixture)
    }

    /// `x S [rows, m]` for `x [rows, n]`, where `S` is that matrix.
    ///
    /// On the CPU backend it exists a block of rows at a time, forward and backward; its threshold is found by counting.
    pub fn linear(&self, x: Tensor<2>, p: Tensor<3>, q: Tensor<3>, mixture: Tensor<1>) -> Tensor<2> {
        #[cfg(feature = "flex")]
        if super::flex::fits(&x) && super::flex::fits(&p) && super::flex::fits(&q) && super::flex::fits(&mixture) {
            return fused::linear(x, p, q, mixture, self.clone());
        }
        x.matmul(self.composed(p, q, mixture))
    }

    fn composed(&self, p: Tensor<3>, q: Tensor<3>, mixture: Tensor<1>) -> Tensor<2> {
        let ([heads, n, _], [_, m, _]) = (p.dims(), q.dims());
        let squares = (p.unsqueeze_dim::<4>(2) - q.unsqueeze_dim::<4>(1)).square().sum_dim(3).reshape([heads, n, m]);
        let zero = squares.clone().equal_elem(0.0);
        let distances = squares.mask_fill(zero.clone(), 1.0).sqrt().mask_fill(zero, 0.0);
        let coefficients = TensorData::new(self.coefficients.clone(), [heads, 1, 1]);
        let coefficients = Tensor::<3>::from_data(coefficients, (&distances.device(), distances.dtype()));
        let kernel: Tensor<2> = (distances * coefficients).sum_dim(0).reshape([n, m]);
        let matrix = match self.mixed {
            false => kernel,
            true => {
                let [a, t, b] = [0, 1, 2].map(|place| mixture.clone().narrow(0, place, 1).reshape([1, 1]));
                let logits = kernel.clone() / t;
                let shifted = logits.clone() - logits.max_dim(1).detach();
                let powers = shifted.exp();
                kernel + powers.clone() / powers.sum_dim(1) * a + b
            }
        };
        match self.sparsify {
            None => matrix,
            Some(sparsify) => sparsify.composed(matrix),
        }
    }
}

impl Sparsify {
    fn composed(self, matrix: Tensor<2>) -> Tensor<2> {
        let magnitudes = matrix.clone().without_autodiff().abs();
        let data = magnitudes.clone().into_data().convert::<f64>();
        let values: Vec<f64> = match data.try_into_vec() {
            Ok(values) => values,
            Err(error) => unreachable!("data converted to f64 is f64: {error:?}"),
        };
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let (place, fraction) = select::position(sorted.len(), self.sparsity);
        let (low, high) = (sorted[place], sorted[(place + 1).min(sorted.len() - 1)]);
        let threshold = if fraction == 0.0 { low } else { low + (high - low) * fraction };
        let dropped: Vec<bool> = values.iter().map(|value| !value.gt(&threshold)).collect();
        let device = magnitudes.device();
        let dropped = Tensor::<2, Bool>::from_data(TensorData::new(dropped, magnitudes.dims()), &device);
        let factors = match self.kept {
            KeptValue::Weighted => magnitudes,
            KeptValue::AboveThreshold => magnitudes.sub_scalar(threshold),
            KeptValue::Plain => magnitudes.ones_like(),
        };
        matrix * factors.mask_fill(dropped, 0.0)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    /// A kernel on flat inputs: x, p, q, the mixture.
    type Run = fn(&DistanceKernel, Tensor<2>, Tensor<3>, Tensor<3>, Tensor<1>) -> Tensor<2>;

    fn check(kernel: &DistanceKernel, [rows, n, m, k]: [usize; 4]) {
        let heads = kernel.coefficients.len();
        let sizes = [vec![rows, n], vec![heads, n, k], vec![heads, m, k]];
        let mut inputs: Vec<Vec<f32>> =
            sizes.iter().enumerate().map(|(seed, shape)| random(shape, 3 + seed as u64)).collect();
        inputs.push(vec![0.8, 1.3, -0.1]);
        let on = |run: Run| {
            let kernel = kernel.clone();
            move |inputs: &[Tensor<1>]| {
                let x = inputs[0].clone().reshape([rows, n]);
                let p = inputs[1].clone().reshape([heads, n, k]);
                let q = inputs[2].clone().reshape([heads, m, k]);
                // Frozen inputs of the mixture's place must not lose their gradient.
                let mixture = if kernel.mixed { inputs[3].clone() } else { inputs[3].clone() * 0.0 };
                let rest = if kernel.mixed { None } else { Some(inputs[3].clone().sum().mul_scalar(0.0)) };
                let y = run(&kernel, x, p, q, mixture);
                let count = y.dims().iter().product::<usize>();
                let y: Tensor<1> = y.reshape([count]);
                match rest {
                    None => y,
                    Some(rest) => y + rest,
                }
            }
        };
        let composed: Run = |kernel, x, p, q, mixture| x.matmul(kernel.composed(p, q, mixture));
        let dense: Run = |kernel, x, p, q, mixture| x.matmul(kernel.matrix(p, q, mixture));
        let check = Check::new(&inputs);
        check.equal(on(|kernel, x, p, q, mixture| kernel.linear(x, p, q, mixture)), on(composed));
        check.equal(on(dense), on(composed));
        if kernel.sparsify.is_none() {
            // With a sparsification the factor is constant, so that gradients are no slopes.
            check.gradients(on(composed));
        }
    }

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for mixed in [false, true] {
            for kept in [None, Some(KeptValue::Weighted), Some(KeptValue::AboveThreshold), Some(KeptValue::Plain)] {
                let sparsify = kept.map(|kept| Sparsify { sparsity: 0.6, kept });
                let kernel = DistanceKernel { coefficients: vec![0.5, -0.5], mixed, sparsify };
                check(&kernel, [5, 9, 7, 3]);
            }
        }
        // More than one block of rows, and more than one chunk of columns.
        let sparsify = Some(Sparsify { sparsity: 0.3, kept: KeptValue::Weighted });
        check(&DistanceKernel { coefficients: vec![0.1, -0.1], mixed: true, sparsify }, [3, 300, 70, 2]);
    }

    #[test]
    fn points_of_distance_zero_have_no_gradient() {
        let device = burn::tensor::Device::default().autodiff();
        let point = || Tensor::<3>::ones([1, 1, 2], &device).require_grad();
        let (p, q) = (point(), point());
        let kernel = DistanceKernel { coefficients: vec![1.0], mixed: false, sparsify: None };
        let mut grads = kernel.matrix(p.clone(), q.clone(), Tensor::zeros([3], &device)).sum().backward();
        for point in [p, q] {
            let grad = point.grad_remove(&mut grads).expect("a gradient").into_data();
            assert_eq!(grad.try_into_vec::<f32>().expect("f32"), [0.0, 0.0]);
        }
    }
}
