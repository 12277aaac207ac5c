//! Steps on the manifold of rank-r matrices: "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization" (Mo, Huang and
//! Pan, ICLR 2025).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::config::Config;
use burn::optim::Optimizer;
use burn::tensor::{DType, Device, Tensor, TensorData};
use lowrank_kernels::host::values;
use nalgebra::DMatrix;
use schemars::JsonSchema;

use crate::adam::{AdamOptions, adam_builders};
use crate::change::WeightChange;
use crate::check;
use crate::error::OptimError;
use crate::matrix_id::MatrixId;
use crate::method::MethodConfig;
use crate::methods::adamw::{AdamW, AdamWConfig, AdamWState};
use crate::parameters::ParameterRoles;
use crate::registry::method::Built;
use crate::registry::options;
use crate::state::meter::StateMeter;

/// Configuration of [`LoroAdamW`].
#[derive(Config, Debug, JsonSchema)]
pub struct LoroConfig {
    /// Factor `c` of lazy steps; the paper uses rank / width of the model.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub lr_scale: f64,
    /// Options of Adam.
    #[config(default = "AdamOptions::new().with_epsilon(1e-6)")]
    pub adam: AdamOptions,
}

/// AdamW for one factor of a pair: lazy steps on its own; in an exact step it stores the direction, and the model updates both factors together.
///
/// With `step = lr sqrt(1 - beta_2^t) / (1 - beta_1^t)` a lazy step takes `step c m / (sqrt(v) + eps)` away, then `step wd` of the factor.
#[derive(Clone, Debug)]
pub struct LoroAdamW {
    config: LoroConfig,
    key: u64,
    steps: LoroSteps,
}

/// Handle of the factors' optimizers: sets the kind of the next step and holds the directions of an exact one.
#[derive(Clone, Debug, Default)]
pub struct LoroSteps(Arc<Mutex<Next>>);

#[derive(Debug, Default)]
struct Next {
    exact: bool,
    directions: BTreeMap<u64, (Tensor<2>, f64)>,
}

impl LoroSteps {
    /// Sets whether the next steps are exact.
    pub fn begin_step(&self, exact: bool) {
        self.next().exact = exact;
    }

    /// Takes out the direction of the factor with this key, shaped as the factor is stored, and the size of the step.
    pub fn take(&self, key: u64) -> Option<(Tensor<2>, f64)> {
        self.next().directions.remove(&key)
    }

    fn next(&self) -> MutexGuard<'_, Next> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

adam_builders!(LoroConfig);

impl LoroConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        Ok(options::validate(self)?)
    }

    /// The optimizer of a module whose hidden matrices are the factors, and the optimizer assigned to each parameter.
    pub fn init(&self, hidden: &ParameterRoles, meter: &StateMeter, steps: &LoroSteps) -> Result<Built, OptimError> {
        let factor = |factor: LoroAdamW, _| LoroAdamW { steps: steps.clone(), ..factor };
        let optimizer = hidden.assemble(self, meter, |others, _| others, factor)?;
        Ok((optimizer, hidden.report(self, "loro")))
    }
}

impl MethodConfig for LoroConfig {
    type Optimizer = LoroAdamW;

    fn optimizer(&self) -> Result<LoroAdamW, OptimError> {
        self.validate()?;
        Ok(LoroAdamW { config: self.clone(), key: 0, steps: LoroSteps::default() })
    }

    fn at(optimizer: LoroAdamW, place: MatrixId) -> LoroAdamW {
        LoroAdamW { key: place.key, ..optimizer }
    }

    fn takes(&self, _shape: [usize; 2]) -> bool {
        true
    }

    fn others(&self) -> AdamWConfig {
        AdamWConfig::new().with_adam(self.adam).with_legacy_epsilon(true).with_decay_after(true)
    }

    fn state_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        8 * rows * columns
    }
}

impl WeightChange for LoroAdamW {}

impl Optimizer for LoroAdamW {
    type State<const D: usize> = AdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<AdamWState<D>>,
    ) -> (Tensor<D>, Option<AdamWState<D>>) {
        let LoroConfig { lr_scale, adam: AdamOptions { beta_1, beta_2, epsilon, weight_decay } } = self.config;
        let time = state.as_ref().map_or(0, |state| state.time) + 1;
        let correction = |beta: f64| 1.0 - beta.powf(time as f64);
        let ratio = correction(beta_2).sqrt() / correction(beta_1);
        let exact = self.steps.next().exact;
        let Some(shape) = <[usize; 2]>::try_from(&tensor.dims()[..]).ok().filter(|_| exact) else {
            // The decay uses the corrected step without the factor c.
            let decay = weight_decay * ratio / lr_scale;
            let lazy = self.config.others().with_lr_scale(lr_scale).with_weight_decay(decay).build();
            return lazy.step(lr, tensor, grad, state);
        };
        let grad = grad.cast(DType::F32);
        let state = state.unwrap_or_else(|| AdamWState::zeros_like(&grad));
        let moment_1 = state.moment_1.mul_scalar(beta_1) + grad.clone().mul_scalar(1.0 - beta_1);
        let moment_2 = state.moment_2.mul_scalar(beta_2) + grad.square().mul_scalar(1.0 - beta_2);
        let direction = moment_1.clone() / moment_2.clone().sqrt().add_scalar(epsilon);
        self.steps.next().directions.insert(self.key, (direction.reshape(shape), lr * ratio));
        (tensor, Some(AdamWState { time, moment_1, moment_2 }))
    }

    fn to_device<const D: usize>(state: AdamWState<D>, device: &Device) -> AdamWState<D> {
        AdamW::to_device(state, device)
    }
}

/// Factors of a weight `W = M N^T`.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `[rows, rank]`.
    pub m: Tensor<2>,
    /// `[columns, rank]`.
    pub n: Tensor<2>,
}

/// The cheap step between exact ones: each factor along its own direction, `step` times `scale`.
pub fn lazy_step(factors: Factors, directions: Factors, step: f64, scale: f64) -> Factors {
    Factors {
        m: factors.m - directions.m.mul_scalar(step * scale),
        n: factors.n - directions.n.mul_scalar(step * scale),
    }
}

/// The step along the manifold: the best approximation of rank r to `M N^T - step T`, where the tangent `T` is made of the directions of the
/// factors, with balanced factors. Works on matrices of twice the rank; the dense weight is never formed.
///
/// Factors whose columns depend on one another have no tangent and are rejected, as are elements that are not finite.
pub fn exact_step(factors: &Factors, directions: &Factors, step: f64) -> Result<Factors, OptimError> {
    let device = factors.m.device();
    let [m, n, dm, dn] = [&factors.m, &factors.n, &directions.m, &directions.n].map(host);
    let rank = m.ncols();
    let (qr_m, qr_n) = (m.qr(), n.qr());
    let (u, rm, v, rn) = (qr_m.q(), qr_m.r(), qr_n.q(), qr_n.r());
    let singular = |r: &DMatrix<f64>| (0..rank).any(|i| r[(i, i)].abs() <= 1e-10 * r.amax());
    let inverse = |r: &DMatrix<f64>| r.clone().try_inverse().filter(|_| !singular(r));
    let refuse = |reason: &str| check::refused("rank", rank, reason);
    let (Some(rm_inverse), Some(rn_inverse)) = (inverse(&rm), inverse(&rn)) else {
        return refuse("the columns of a factor depend on one another; re-initialise it or lower the rank");
    };
    // These represent G V and U^T G.
    let p = dm * rn_inverse;
    let q = rm_inverse.transpose() * dn.transpose();
    let k0 = &q * &v;
    let side = (&q - &k0 * v.transpose()).transpose().qr();
    let below = (&p - &u * (u.transpose() * &p)).qr();
    let (q1, k1, q2, k2) = (side.q(), side.r(), below.q(), below.r());
    let mut core = DMatrix::zeros(2 * rank, 2 * rank);
    core.view_mut((0, 0), (rank, rank)).copy_from(&(&rm * rn.transpose() - k0 * step));
    core.view_mut((0, rank), (rank, k1.nrows())).copy_from(&(k1.transpose() * -step));
    core.view_mut((rank, 0), (k2.nrows(), rank)).copy_from(&(k2 * -step));
    if !core.iter().all(|value| value.is_finite()) {
        return refuse("factors or directions are infinite or not a number; lower the learning rate");
    }
    let svd = core.svd(true, true);
    let (Some(x), Some(y)) = (svd.u, svd.v_t) else {
        unreachable!("both sides of the decomposition were asked for");
    };
    let mut order: Vec<usize> = (0..2 * rank).collect();
    order.sort_by(|a, b| svd.singular_values[*b].total_cmp(&svd.singular_values[*a]).then(a.cmp(b)));
    let basis_m = join(&u, &q2);
    let basis_n = join(&v, &q1);
    let take = |basis: &DMatrix<f64>, core: &dyn Fn(usize, usize) -> f64| {
        let picked = DMatrix::from_fn(basis.ncols(), rank, |row, column| {
            core(row, order[column]) * svd.singular_values[order[column]].sqrt()
        });
        basis * picked
    };
    let (new_m, new_n) =
        (take(&basis_m, &|row, column| x[(row, column)]), take(&basis_n, &|row, column| y[(column, row)]));
    Ok(Factors { m: tensor(&new_m, &device), n: tensor(&new_n, &device) })
}

fn host(x: &Tensor<2>) -> DMatrix<f64> {
    let [rows, columns] = x.dims();
    DMatrix::from_row_slice(rows, columns, &values(x.clone())).map(f64::from)
}

fn tensor(x: &DMatrix<f64>, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = x.transpose().iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(values, [x.nrows(), x.ncols()]), device)
}

/// `[left right]`, filled up with zeros to twice the columns of the left.
fn join(left: &DMatrix<f64>, right: &DMatrix<f64>) -> DMatrix<f64> {
    let mut joined = DMatrix::zeros(left.nrows(), 2 * left.ncols());
    joined.view_mut((0, 0), left.shape()).copy_from(left);
    joined.view_mut((0, left.ncols()), right.shape()).copy_from(right);
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_kernels::random::normal_matrix;

    fn draw(rows: usize, rank: usize, key: u64) -> Tensor<2> {
        normal_matrix(3, key, [rows, rank], &Device::default())
    }

    #[test]
    fn the_result_is_balanced_and_does_not_depend_on_the_factors() {
        let (m, n, g) = (draw(9, 3, 0), draw(7, 3, 1), draw(9, 7, 2));
        let turn = draw(3, 3, 4) + Tensor::<2>::eye(3, &Device::default()) * 4.0;
        let stepped = |m: Tensor<2>, n: Tensor<2>| {
            let directions = Factors { m: g.clone().matmul(n.clone()), n: g.clone().transpose().matmul(m.clone()) };
            exact_step(&Factors { m, n }, &directions, 0.05).unwrap()
        };
        let one = stepped(m.clone(), n.clone());
        // W = M N^T = (M T) (N T^-T)^T
        let inverse = tensor(&host(&turn).try_inverse().unwrap().transpose(), &Device::default());
        let other = stepped(m.matmul(turn), n.matmul(inverse));
        let dense = |f: &Factors| f.m.clone().matmul(f.n.clone().transpose());
        assert!((dense(&one) - dense(&other)).abs().max().into_scalar::<f32>() < 1e-4);
        let gram = |x: &Tensor<2>| x.clone().transpose().matmul(x.clone());
        assert!((gram(&one.m) - gram(&one.n)).abs().max().into_scalar::<f32>() < 1e-4);
    }

    /// Compares the optimizer's steps with the formula of the paper.
    #[test]
    fn lazy_steps_follow_the_corrected_directions_and_then_decay() {
        let config = LoroConfig::new(0.25).with_weight_decay(0.3);
        let optimizer = config.optimizer().unwrap();
        let (mut m, mut state) = (draw(6, 3, 0), None);
        let (mut ours, mut first, mut second) = (m.clone(), m.zeros_like(), m.zeros_like());
        for t in 1..=3 {
            let g = draw(6, 3, 10 + t);
            (m, state) = optimizer.step(0.02, m, g.clone(), state);
            first = first * 0.9 + g.clone() * 0.1;
            second = second * 0.999 + g.square() * 0.001;
            let step = 0.02 * (1.0 - 0.999f64.powf(t as f64)).sqrt() / (1.0 - 0.9f64.powf(t as f64));
            let direction = first.clone() / (second.clone().sqrt() + 1e-6);
            let factors = Factors { m: ours.clone(), n: ours.clone() };
            ours =
                lazy_step(factors, Factors { m: direction.clone(), n: direction }, step, 0.25).m * (1.0 - step * 0.3);
            assert!((m.clone() - ours.clone()).abs().max().into_scalar::<f32>() < 2e-6, "step {t}");
        }
    }

    #[test]
    fn an_exact_step_leaves_the_factor_and_hands_its_direction_over() {
        let steps = LoroSteps::default();
        let optimizer = LoroAdamW { steps: steps.clone(), key: 5, ..LoroConfig::new(0.25).optimizer().unwrap() };
        let (m, g) = (draw(6, 3, 0), draw(6, 3, 1));
        steps.begin_step(true);
        let (kept, state) = optimizer.step(0.02, m.clone(), g.clone(), None);
        let far = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
        assert_eq!(far(kept, m.clone()), 0.0);
        let (direction, step) = steps.take(5).unwrap();
        assert!(steps.take(5).is_none() && steps.take(0).is_none());
        // One step of Adam goes along the signs of the gradient, but for its epsilon.
        assert!((step / 0.02 - 0.001f64.sqrt() / 0.1).abs() < 1e-6, "{step}");
        assert!(far(direction.clone() * step, direction.sign() * 0.02) < 1e-3);
        // The state continues as after a lazy step.
        steps.begin_step(false);
        let lazy = optimizer.step(0.02, m, g, None).1.unwrap();
        let exact = state.unwrap();
        assert_eq!(exact.time, lazy.time);
        assert!(far(exact.moment_1, lazy.moment_1) < 1e-7 && far(exact.moment_2, lazy.moment_2) < 1e-7);
    }

    #[test]
    fn dependent_columns_are_refused() {
        let same = draw(9, 1, 0).repeat_dim(1, 3);
        let factors = Factors { m: same, n: draw(7, 3, 1) };
        let directions = Factors { m: draw(9, 3, 2), n: draw(7, 3, 3) };
        assert!(exact_step(&factors, &directions, 0.1).unwrap_err().to_string().contains("depend on one another"));
        let factors = Factors { m: draw(9, 3, 0), n: draw(7, 3, 1) };
        for bad in [f32::NAN, f32::INFINITY] {
            let directions = Factors { m: draw(9, 3, 2) * bad, n: draw(7, 3, 3) };
            assert!(exact_step(&factors, &directions, 0.1).unwrap_err().to_string().contains("not a number"));
        }
    }
}
