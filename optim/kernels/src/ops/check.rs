//! Compares a fused operation with its composed form: values and the gradients of all inputs; and these with quotients of differences in f64.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// Values for an input in row-major order.
pub fn random(shape: &[usize], seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let count = shape.iter().product();
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
    .take(count)
    .collect()
}

/// Device of the inputs of a function under test, for what it needs besides them.
pub fn device(inputs: &[Tensor<1>]) -> Device {
    inputs[0].device().without_autodiff()
}

/// Every value within a fraction of the largest of its output.
fn assert_near(ours: &[Vec<f32>], expected: &[Vec<f32>], tolerance: f32, what: &str) {
    assert_eq!(ours.len(), expected.len(), "{what}");
    for (place, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        assert_eq!(ours.len(), expected.len(), "output or gradient {place}, {what}");
        let size = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
        for (ours, expected) in ours.iter().zip(expected) {
            let near = (ours - expected).abs() <= tolerance * size + 1e-30;
            assert!(near, "output or gradient {place}, {what}: {ours} instead of {expected} (largest {size})");
        }
    }
}

/// Inputs, flat; functions under test reshape them.
pub struct Check {
    inputs: Vec<Vec<f32>>,
}

type Function<'a> = &'a dyn Fn(&[Tensor<1>]) -> Tensor<1>;

impl Check {
    pub fn new(inputs: &[Vec<f32>]) -> Self {
        Self { inputs: inputs.to_vec() }
    }

    /// [`Check::equal_on_cpu`]; with the feature `wgpu`, the operation gives the same values and gradients on the default GPU too.
    pub fn equal(&self, fused: impl Fn(&[Tensor<1>]) -> Tensor<1>, composed: impl Fn(&[Tensor<1>]) -> Tensor<1>) {
        self.equal_on_cpu(&fused, composed);
        #[cfg(feature = "wgpu")]
        for frozen in (0..self.inputs.len()).map(Some).chain([None]) {
            let gpu = Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
            let expected = self.run(&fused, frozen, &Device::default());
            let what = format!("on the GPU, frozen {frozen:?}");
            assert_near(&self.run(&fused, frozen, &gpu), &expected, 1e-4, &what);
        }
    }

    /// Both functions give the same values, the same gradients with any one input frozen, and the same bits when run again.
    pub fn equal_on_cpu(
        &self,
        fused: impl Fn(&[Tensor<1>]) -> Tensor<1>,
        composed: impl Fn(&[Tensor<1>]) -> Tensor<1>,
    ) {
        let cpu = Device::default();
        for frozen in (0..self.inputs.len()).map(Some).chain([None]) {
            let ours = self.run(&fused, frozen, &cpu);
            assert!(ours == self.run(&fused, frozen, &cpu), "the same input gives other bits");
            assert_near(&ours, &self.run(&composed, frozen, &cpu), 2e-5, &format!("frozen {frozen:?}"));
        }
    }

    /// The gradients of the composed form are the derivatives of its values: in f64, at some values of every input.
    pub fn gradients(&self, composed: impl Fn(&[Tensor<1>]) -> Tensor<1>) {
        let inputs: Vec<Vec<f64>> =
            self.inputs.iter().map(|values| values.iter().map(|value| f64::from(*value)).collect()).collect();
        let device = Device::default().autodiff();
        let tensors = |inputs: &[Vec<f64>]| -> Vec<Tensor<1>> {
            let tensor = |values: &Vec<f64>| {
                Tensor::from_data(TensorData::new(values.clone(), [values.len()]), (&device, DType::F64)).require_grad()
            };
            inputs.iter().map(tensor).collect()
        };
        let sum = |inputs: &[Tensor<1>]| {
            let output = composed(inputs);
            assert_eq!(output.dtype(), DType::F64, "nothing on the way may take less than f64");
            let weights: Vec<f64> = random(&[output.dims()[0]], 99).into_iter().map(f64::from).collect();
            (output * tensors(&[weights]).swap_remove(0).detach()).sum()
        };
        let at = tensors(&inputs);
        let mut grads = sum(&at).backward();
        for (place, tensor) in at.iter().enumerate() {
            let slopes = tensor.grad_remove(&mut grads).unwrap().into_data().try_into_vec::<f64>().unwrap();
            let size = slopes.iter().fold(1e-3f64, |most, slope| most.max(slope.abs()));
            for number in (0..slopes.len()).step_by((slopes.len() / 5).max(1)) {
                const STEP: f64 = 1e-6;
                let moved = |step: f64| {
                    let mut inputs = inputs.clone();
                    inputs[place][number] += step;
                    sum(&tensors(&inputs)).inner().into_scalar::<f64>()
                };
                let quotient = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                let near = (slopes[number] - quotient).abs() < 1e-6 * size;
                assert!(near, "gradient {place} at {number}: {} where the slope is {quotient}", slopes[number]);
            }
        }
    }

    /// The output, then the gradients of a weighted sum of it.
    fn run(&self, function: Function, frozen: Option<usize>, plain: &Device) -> Vec<Vec<f32>> {
        let tensors: Vec<Tensor<1>> = self
            .inputs
            .iter()
            .enumerate()
            .map(|(place, values)| {
                let data = TensorData::new(values.clone(), [values.len()]);
                match frozen == Some(place) {
                    true => Tensor::from_data(data, plain),
                    false => Tensor::from_data(data, &plain.clone().autodiff()).require_grad(),
                }
            })
            .collect();
        let output = function(&tensors);
        let host = |tensor: Tensor<1>| tensor.into_data().try_into_vec::<f32>().unwrap();
        let tracked = self.inputs.len() > 1 || frozen.is_none();
        if !tracked {
            return vec![host(output)];
        }
        let values = host(output.clone().inner());
        let weights = Tensor::<1>::from_data(TensorData::new(random(&[values.len()], 99), [values.len()]), plain);
        let mut grads = (output * weights).sum().backward();
        let tracked = tensors.iter().enumerate().filter(|(place, _)| frozen != Some(*place));
        let slopes: Vec<Vec<f32>> = tracked.map(|(_, tensor)| host(tensor.grad_remove(&mut grads).unwrap())).collect();
        [vec![values], slopes].concat()
    }
}
