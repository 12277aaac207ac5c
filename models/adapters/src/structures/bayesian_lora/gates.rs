//! Stochastic gates of Bayesian Bits ("Bayesian Bits: Unifying Quantization and Pruning", arXiv
//! 2005.07093).

use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::running_products;

/// Hard-concrete gate: a logistic random variable of logit `phi`, stretched and cut to `[0, 1]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HardConcrete {
    /// Temperature.
    pub beta: f64,
    /// Upper end before the cut.
    pub zeta: f64,
    /// Lower end before the cut.
    pub gamma: f64,
    /// A gate is on outside of training if its probability of being 0 is below this.
    pub threshold: f64,
    /// Logit up to which a gate is 0 in training too; none to draw every gate.
    pub dead_logit: Option<f64>,
}

impl Default for HardConcrete {
    fn default() -> Self {
        Self { beta: 2.0 / 3.0, zeta: 1.1, gamma: -0.1, threshold: 0.34, dead_logit: Some(-2.0) }
    }
}

impl HardConcrete {
    /// Gates of logits `phi [n]` for uniform draws `u [n]`.
    pub fn sampled(&self, phi: Tensor<1>, u: &[f32]) -> Tensor<1> {
        with_slopes(phi, |place, phi| {
            let u = f64::from(u[place]).clamp(1e-6, 1.0 - 1e-6);
            let noise = u.ln() - (-u).ln_1p();
            let (q, slope) = sigmoid((phi + noise) / self.beta);
            let (z, stretch) = (q * (self.zeta - self.gamma) + self.gamma, (self.zeta - self.gamma) / self.beta);
            match self.dead_logit.is_some_and(|dead| phi <= dead) {
                true => [0.0, 0.0],
                false if !(0.0..=1.0).contains(&z) => [z.clamp(0.0, 1.0), 0.0],
                false => [z, slope * stretch],
            }
        })
    }

    /// Gates outside of training: 0 or 1, without gradient.
    pub fn decided(&self, phi: Tensor<1>) -> Tensor<1> {
        let least = self.offset() - (self.threshold / (1.0 - self.threshold)).ln();
        let phi = phi.without_autodiff();
        phi.clone().zeros_like().mask_fill(phi.greater_elem(least), 1.0)
    }

    /// Probability that gates are not 0.
    pub fn probability(&self, phi: Tensor<1>) -> Tensor<1> {
        with_slopes(phi, |_, phi| sigmoid(phi - self.offset()).into())
    }

    fn offset(&self) -> f64 {
        self.beta * (-self.gamma / self.zeta).ln()
    }
}

/// `1 / (1 + exp(-x))` and its slope, which is exact in both tails.
fn sigmoid(x: f64) -> (f64, f64) {
    let value = 1.0 / (1.0 + (-x).exp());
    (value, value / (1.0 + x.exp()))
}

/// Applies a function that gives value and slope for every place of `x [n]`: a handful of numbers for each layer, for which one node of the
/// backward pass costs more than the arithmetic.
fn with_slopes(x: Tensor<1>, of: impl Fn(usize, f64) -> [f64; 2]) -> Tensor<1> {
    let (count, device) = (x.dims()[0], x.device().inner());
    let found: Vec<[f64; 2]> =
        host(x.clone().without_autodiff()).iter().enumerate().map(|(place, x)| of(place, f64::from(*x))).collect();
    let part = |part: usize| -> Tensor<1> {
        let values: Vec<f32> = found.iter().map(|found| found[part] as f32).collect();
        Tensor::from_data(TensorData::new(values, [count]), &device)
    };
    // Exactly the value: the difference of x from itself is 0.
    let still = x.clone().detach();
    (x - still) * part(1) + part(0)
}

/// Penalty of the levels of quantisers: `1 + w_1 p_1 + w_2 p_1 p_2 + ...` of each, with the probabilities `p
/// [quantisers, levels]` and a weight for each of them.
pub fn level_penalty(probabilities: Tensor<2>, weights: &[f64]) -> Tensor<1> {
    let [quantisers, levels] = probabilities.dims();
    let weights: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
    let weights = TensorData::new(weights, [quantisers, levels]);
    let weights = Tensor::<2>::from_data(weights, &probabilities.device().inner());
    (running_products(probabilities) * weights).sum().add_scalar(quantisers as f64)
}

/// Products of the first 1, 2, ... gates `[n]`: a gate that is 0 switches off all later ones.
pub fn nested(gates: Tensor<1>) -> Tensor<1> {
    let count = gates.dims()[0];
    running_products(gates.reshape([1, count])).reshape([count])
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use lowrank_kernels::ops::bit_quantised;
    use lowrank_kernels::random::generator;
    use rand::RngExt;

    fn vector(values: &[f32]) -> Tensor<1> {
        Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &Device::default())
    }

    #[test]
    fn gates_are_on_as_often_as_their_probability_says() {
        let gate = HardConcrete::default();
        let mut random = generator(1, 2, 3);
        let u: Vec<f32> = (0..100_000).map(|_| random.random()).collect();
        let mut means = Vec::new();
        for phi in [-1.5f32, -0.5, 0.4, 1.3] {
            let z = host(gate.sampled(vector(&[phi]).expand([u.len()]), &u));
            let on = z.iter().filter(|z| **z > 0.0).count() as f64 / u.len() as f64;
            let expected = f64::from(host(gate.probability(vector(&[phi])))[0]);
            assert!((on - expected).abs() < 0.01, "{phi}: {on} instead of {expected}");
            means.push(z.iter().map(|z| f64::from(*z)).sum::<f64>());
        }
        assert!(means.is_sorted(), "{means:?}");
        assert_eq!(host(gate.decided(vector(&[-0.94, -0.93, 6.0]))), [0.0, 1.0, 1.0]);
        assert_eq!(host(gate.sampled(vector(&[-2.0, -1.9]), &[0.999, 0.999])), [0.0, 1.0]);
        assert_eq!(host(HardConcrete { dead_logit: None, ..gate }.sampled(vector(&[-2.0]), &[0.9999])), [1.0]);
    }

    #[test]
    fn quantised_values_are_within_half_a_step_and_stay_when_quantised_again() {
        let x: Vec<f32> = (0..200).map(|i| (i as f32 * 0.7).sin() * 1.2).collect();
        let most = 0.9f32;
        for (levels, bits) in [(0, 2), (1, 4), (2, 8), (3, 16)] {
            let gates =
                || vector(&vec![1.0; levels + 1]).narrow(0, 0, levels.max(1)).mul_scalar((levels > 0) as u8 as f32);
            let once = bit_quantised(vector(&x), vector(&[most]), gates());
            let again = host(bit_quantised(once.clone(), vector(&[most]), gates()));
            let step = 2.0 * f64::from(most) / (2f64.powi(bits) - 1.0);
            for ((x, q), again) in x.iter().zip(host(once)).zip(again) {
                let clipped = f64::from(x.clamp(-most, most));
                assert!((clipped - f64::from(q)).abs() <= step / 2.0 + 2e-6 * f64::from(most), "{bits}: {x} {q}");
                assert!((q - again).abs() <= 2e-7, "{bits}: {q} {again}");
                let level = f64::from(q) / (2.0 * f64::from(most) / 3.0);
                assert!(bits > 2 || [-1.0, 0.0, 1.0].iter().any(|known| (level - known).abs() < 1e-6), "{level}");
            }
        }
    }

    #[test]
    fn penalties_go_from_one_to_the_number_of_levels() {
        let gate = HardConcrete::default();
        let penalty = |phi: [f32; 3]| host(level_penalty(gate.probability(vector(&phi)).reshape([1, 3]), &[1.0; 3]))[0];
        assert!((penalty([30.0; 3]) - 4.0).abs() < 1e-5);
        assert!((penalty([-30.0, 30.0, 30.0]) - 1.0).abs() < 1e-5);
        assert_eq!(host(nested(vector(&[1.0, 0.5, 0.0, 1.0]))), [1.0, 0.5, 0.0, 0.0]);
    }
}
