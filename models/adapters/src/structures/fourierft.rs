//! A few coefficients of the weight's Fourier transform ("Parameter-Efficient Fine-Tuning with Discrete Fourier
//! Transform", arXiv 2405.03003), at positions that follow from a seed.

use std::f64::consts::TAU;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use lowrank_kernels::ops::linear;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::torch::{LONGEST, permutation};
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::init::all_random::ALL_RANDOM;

/// `y = x (W + U) + b`, where `U^T` is the real part of the inverse transform of a spectrum `[d_out, d_in]` with n
/// coefficients.
///
/// Each coefficient is a cosine over rows and columns, so that the update is a product of `2 n` cosines and sines a side;
/// it is formed where that costs less than the product with the inputs.
#[derive(Module, Debug)]
pub struct FourierFt {
    /// Coefficients `[n]`, zero at the start.
    pub spectrum: Param<Tensor<1>>,
    /// Position of each coefficient in the spectrum: row and column.
    #[module(skip)]
    positions: Vec<[u32; 2]>,
    #[module(skip)]
    shape: [usize; 2],
    #[module(skip)]
    scaling: f64,
}

/// Options of [`FourierFt`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct FourierFtOptions {
    /// Scale of the update, not 0.
    pub scaling: f64,
    /// Seed of the positions, as PyTorch draws them: layers of one shape share them.
    pub random_loc_seed: u64,
}

impl Default for FourierFtOptions {
    fn default() -> Self {
        Self { scaling: 150.0, random_loc_seed: 777 }
    }
}

impl FourierFt {
    /// Row and column of each coefficient in the spectrum `[d_out, d_in]`.
    pub fn positions(&self) -> &[[u32; 2]] {
        &self.positions
    }

    /// Cosines and sines `[side, 2 n]` of the coefficients along one side of the spectrum.
    fn waves(&self, which: usize, device: &Device) -> Tensor<2> {
        let side = [self.shape[1], self.shape[0]][which];
        let n = self.positions.len();
        let table: Vec<[f32; 2]> = (0..side)
            .map(|step| {
                let (sine, cosine) = (TAU * step as f64 / side as f64).sin_cos();
                [cosine as f32, sine as f32]
            })
            .collect();
        let mut waves = Vec::with_capacity(side * 2 * n);
        for place in 0..side {
            for part in [0, 1] {
                let at = |position: &[u32; 2]| table[position[which] as usize * place % side][part];
                waves.extend(self.positions.iter().map(at));
            }
        }
        Tensor::from_data(TensorData::new(waves, [side, 2 * n]), (device, DType::F32))
    }

    /// The two sides of the update, `[d_in, 2 n]` with the coefficients and `[2 n, d_out]`: a cosine of a sum is the
    /// product of the cosines minus that of the sines.
    fn sides(&self) -> [Tensor<2>; 2] {
        let spectrum = self.spectrum.val();
        let device = spectrum.device().inner();
        let scale = self.scaling / (self.shape[0] * self.shape[1]) as f64;
        let signed = Tensor::cat(vec![spectrum.clone(), spectrum.neg()], 0).mul_scalar(scale);
        [self.waves(1, &device) * signed.unsqueeze::<2>(), self.waves(0, &device).transpose()]
    }
}

impl Structure for FourierFt {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let ([inputs, outputs], [rows, d_in]) = (self.sides(), input.x.dims());
        let d_out = self.shape[1];
        match rows * (d_in + d_out) < d_in * d_out {
            true => base.plus(input, |x| linear(linear(x, inputs), outputs)),
            false => base.plus_update(input.x, inputs.matmul(outputs)),
        }
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        let [inputs, outputs] = self.sides();
        Some(inputs.matmul(outputs))
    }

    fn cached_values(&self) -> usize {
        2 * self.positions.len()
    }
}

impl Method for FourierFt {
    type Options = FourierFtOptions;

    const LR: f64 = 3e-3;

    const SPEC: Spec = Spec {
        name: "fourierft",
        title: "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
        arxiv: "2405.03003",
        summary: "trains a few coefficients of the weight's Fourier transform; the rank is their number",
        trains: "r",
        stores: "2 r",
        dense_forward: true,
        rank: Rank::Fixed(1000),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[&ALL_RANDOM],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[TensorSpec { name: "spectrum", role: TensorRole::Block, transposed: false }],
    };

    fn check(options: &FourierFtOptions, place: &Place) -> Result<(), String> {
        let most = place.shape[0] * place.shape[1];
        if place.rank > most {
            return Err(format!("rank {}: the spectrum has {most} coefficients", place.rank));
        }
        if options.scaling == 0.0 || !options.scaling.is_finite() {
            return Err(format!("scaling = {}: it must be a number other than 0", options.scaling));
        }
        match most >= LONGEST {
            true => Err(format!("PyTorch draws the positions of weights from {LONGEST} elements in another way")),
            false => Ok(()),
        }
    }

    fn build(options: &FourierFtOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let (shape @ [d_in, d_out], n) = (site.place.shape, site.place.rank);
        let random = site.place.init == ALL_RANDOM.name;
        Ok(Self {
            spectrum: site.trained("spectrum", [n], |site| {
                Ok(if random { site.normal("spectrum", n, 1.0) } else { vec![0.0; n] })
            })?,
            positions: permutation(options.random_loc_seed, d_in * d_out, n)
                .into_iter()
                .map(|at| [(at / d_in) as u32, (at % d_in) as u32])
                .collect(),
            shape,
            scaling: options.scaling,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, random};
    use lowrank_kernels::host::values as host;

    #[test]
    fn the_update_is_the_real_part_of_the_inverse_transform() {
        let config = AdapterConfig::new("fourierft").with_rank(9).with_option("scaling", 7.0);
        let bench = Bench::filled(&config, [6, 10], &[("spectrum", vec![9])]);
        let adapter = bench.adapter();
        let Some(fourier) = adapter.structure.downcast_ref::<FourierFt>() else { unreachable!() };
        let values = bench.values("spectrum");
        let expected: Vec<f32> = (0..60)
            .map(|place| {
                let (input, output) = ((place / 10) as f64, (place % 10) as f64);
                let waves = values.iter().zip(fourier.positions()).map(|(value, [row, column])| {
                    let angle = f64::from(*row) * output / 10.0 + f64::from(*column) * input / 6.0;
                    f64::from(*value) * (TAU * angle).cos()
                });
                (7.0 / 60.0 * waves.sum::<f64>()) as f32
            })
            .collect();
        near(bench.update(), Tensor::from_data(TensorData::new(expected, [6, 10]), &Device::default()), 1e-5);
        // With few rows the update is not formed.
        for rows in [1, 30] {
            let x = random([rows, 6], 2);
            near(bench.branch(x.clone()), x.matmul(bench.update()), 1e-4);
        }
        assert!(host(bench.update()).iter().any(|value| *value != 0.0));
    }
}
