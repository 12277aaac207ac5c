//! A few cosines at learned positions ("LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning",
//! arXiv 2502.06820).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, StepOf, Structure};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::{moves_positions, pixels, sparse_cosines};

/// `y = x W + b + x U`, where the cosine transform of `U` has n non-zero coefficients; their values and positions are
/// trained alternately.
///
/// Rows run through fast transforms; the update is never formed. Positions are integers, so they are trained with a
/// surrogate gradient.
#[derive(Module, Debug)]
pub struct Loca {
    /// Coefficients `[n]`, zero at the start.
    pub coef: Param<Tensor<1>>,
    /// Positions in the spectrum `[2, n]`, rows (output) above columns (input), as fractions of the sides.
    pub loc: Param<Tensor<2>>,
    /// Shape `[d_in, d_out]`.
    #[module(skip)]
    shape: [usize; 2],
    #[module(skip)]
    phases: Phases,
    #[module(skip)]
    loc_lr_scale: f64,
    #[module(skip)]
    scale: f64,
}

/// Schedule of the steps that train coefficients and those that train positions.
#[derive(Clone, Copy, Debug)]
struct Phases {
    coef_steps: u64,
    loc_steps: u64,
    learn_location_iters: f64,
}

impl Phases {
    /// Returns true if a step trains positions, so that coefficients are frozen.
    fn moves_places(&self, StepOf { step, total }: StepOf) -> bool {
        let last = match (self.learn_location_iters, total) {
            (share, Some(total)) if share < 1.0 => share * total as f64,
            // The length of the run is unknown, so a fraction of it is undefined.
            (share, None) if share > 0.0 && share < 1.0 => f64::INFINITY,
            (steps, _) => steps,
        };
        (step as f64) < last && step % (self.coef_steps + self.loc_steps) >= self.coef_steps
    }
}

/// Options of [`Loca`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LocaOptions {
    /// Number of cosines, at most d_in d_out.
    #[schemars(range(min = 1))]
    pub n_components: usize,
    /// Scale of the update, not 0.
    pub scale: f64,
    /// Steps of a cycle that train the coefficients.
    #[schemars(range(min = 1))]
    pub coef_steps: u64,
    /// Steps of a cycle that train the positions, after those of the coefficients.
    pub loc_steps: u64,
    /// Steps after which positions are fixed: a whole number, or a share of the run below 1 (the whole run when its end is not known).
    pub learn_location_iters: f64,
    /// Learning rate of the positions as a multiple of that of the coefficients.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub loc_lr_scale: f64,
}

impl Default for LocaOptions {
    fn default() -> Self {
        Self {
            n_components: 1000,
            scale: 1.0,
            coef_steps: 10,
            loc_steps: 20,
            learn_location_iters: 0.1,
            loc_lr_scale: 0.02,
        }
    }
}

impl Loca {
    /// Row and column of every cosine in the spectrum `[d_out, d_in]`.
    pub fn pixels(&self) -> Vec<[usize; 2]> {
        let [d_in, d_out] = self.shape;
        pixels(&host(self.loc.val().without_autodiff()), [d_out, d_in])
    }

    fn branch(&self, x: Tensor<2>) -> Tensor<2> {
        sparse_cosines(x, self.coef.val(), self.loc.val(), self.shape[1], self.scale)
    }
}

impl Structure for Loca {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus(input, |x| self.branch(x))
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.branch(Tensor::eye(self.shape[0], &self.coef.device().inner())))
    }

    fn frozen_at(&self, tensor: &str, step: StepOf) -> bool {
        (tensor == "coef") == self.phases.moves_places(step)
    }

    fn lr_scale(&self, tensor: &str) -> f64 {
        if tensor == "loc" { self.loc_lr_scale } else { 1.0 }
    }
}

impl Method for Loca {
    type Options = LocaOptions;

    const LR: f64 = 5e-3;

    const SPEC: Spec = Spec {
        name: "loca",
        title: "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning",
        arxiv: "2502.06820",
        summary: "a few cosines at learned positions of the spectrum",
        trains: "3 n_components",
        stores: "",
        dense_forward: false,
        rank: Rank::None,
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "coef", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "loc", role: TensorRole::Position, transposed: false },
        ],
    };

    fn check(options: &LocaOptions, place: &Place) -> Result<(), String> {
        let most = place.shape[0] * place.shape[1];
        let last = options.learn_location_iters;
        if options.n_components > most {
            return Err(format!("n_components = {}: it goes from 1 to {most} here", options.n_components));
        }
        if options.scale == 0.0 || !options.scale.is_finite() {
            return Err(format!("scale = {}: it must be a number other than 0", options.scale));
        }
        if !(last >= 0.0 && last.is_finite()) || last >= 1.0 && last.fract() != 0.0 {
            return Err(format!("learn_location_iters = {last}: it is a whole number of steps, or a share below 1"));
        }
        Ok(())
    }

    fn build(options: &LocaOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let (n, shape) = (options.n_components, site.place.shape);
        if options.learn_location_iters > 0.0 && !moves_positions(&site.plain_device()) {
            return Err(AdapterError::Refused(
                "on this device places cannot be learned: set learn_location_iters = 0, or run on the CPU".into(),
            ));
        }
        let draw = |site: &mut Site<'_>| {
            let mut random = site.random("loc");
            Ok((0..2 * n).map(|_| random.random::<f32>()).collect())
        };
        Ok(Self {
            coef: site.trained("coef", [n], |_| Ok(vec![0.0; n]))?,
            loc: site.trained("loc", [2, n], draw)?,
            shape,
            phases: Phases {
                coef_steps: options.coef_steps,
                loc_steps: options.loc_steps,
                learn_location_iters: options.learn_location_iters,
            },
            loc_lr_scale: options.loc_lr_scale,
            scale: options.scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, norm, random};
    use burn::tensor::{Device, TensorData};
    use lowrank_optim::{Dct, DctBasis};

    fn config(n: usize) -> AdapterConfig {
        AdapterConfig::new("loca").with_option("n_components", n)
    }

    /// Coefficients at positions (row, column) of a layer.
    fn at(config: &AdapterConfig, shape: [usize; 2], components: &[(f32, [usize; 2])]) -> Bench {
        let n = components.len();
        let share = |side: usize| {
            let most = [shape[1], shape[0]][side] - 1;
            components.iter().map(move |(_, pixel)| if most == 0 { 0.0 } else { pixel[side] as f32 / most as f32 })
        };
        let tensors = BTreeMap::from([
            ("coef".into(), TensorData::new(components.iter().map(|(value, _)| *value).collect::<Vec<_>>(), [n])),
            ("loc".into(), TensorData::new(share(0).chain(share(1)).collect::<Vec<_>>(), [2, n])),
        ]);
        Bench::holding(config, shape, tensors).unwrap()
    }

    #[test]
    fn any_update_has_a_spectrum_of_its_size() {
        let ([d_in, d_out], device) = ([6, 9], Device::default());
        let update = random::<2>([d_in, d_out], 1);
        let [inputs, outputs] = [d_in, d_out].map(|side| Dct::of(side).tensor(DctBasis::Dct3, &device));
        let spectrum = host(outputs.matmul(update.clone().transpose()).matmul(inputs.transpose()));
        let components: Vec<_> =
            spectrum.iter().enumerate().map(|(i, value)| (value / 2.0, [i / d_in, i % d_in])).collect();
        let bench = at(&config(54).with_option("scale", 2.0), [d_in, d_out], &components);
        near(bench.update(), update.clone(), 1e-5);
        let sum: f64 = components.iter().map(|(value, _)| f64::from(*value).powi(2)).sum();
        assert!((norm(update) / (2.0 * sum.sqrt()) - 1.0).abs() < 1e-5);
        let x = random([5, d_in], 2);
        near(bench.branch(x.clone()), x.matmul(bench.update()), 1e-4);
    }

    #[test]
    fn the_first_component_is_constant_and_those_of_one_pixel_add_up() {
        let one = at(&config(1), [6, 9], &[(3.0, [0, 0])]).update();
        near(one, Tensor::full([6, 9], 3.0 / 54f64.sqrt(), &Device::default()), 1e-6);
        let two = at(&config(2), [6, 9], &[(3.0, [8, 2]), (-1.0, [8, 2])]).update();
        near(two, at(&config(1), [6, 9], &[(2.0, [8, 2])]).update(), 1e-6);
    }

    #[test]
    fn coefficients_of_zero_leave_the_base_and_their_places() {
        let bench = Bench::fresh(&config(30), [6, 9]).unwrap();
        let x = random([4, 6], 3);
        near(bench.branch(x.clone()), bench.base(x) * 0.0, 0.0);
        assert_eq!(bench.learning(), BTreeMap::from([("coef".into(), true), ("loc".into(), false)]));
    }

    #[test]
    fn phases_take_turns_until_places_stay() {
        let phases = |learn_location_iters| Phases { coef_steps: 2, loc_steps: 3, learn_location_iters };
        let moves = |phases: Phases, total| -> Vec<u64> {
            (0..20).filter(|step| phases.moves_places(StepOf { step: *step, total })).collect()
        };
        assert_eq!(moves(phases(8.0), Some(20)), [2, 3, 4, 7]);
        assert_eq!(moves(phases(0.4), Some(20)), [2, 3, 4, 7]);
        assert!(moves(phases(0.0), Some(20)).is_empty() && moves(phases(0.0), None).is_empty());
        assert_eq!(moves(phases(0.1), None), [2, 3, 4, 7, 8, 9, 12, 13, 14, 17, 18, 19]);
    }
}
