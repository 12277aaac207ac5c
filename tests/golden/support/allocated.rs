//! Several layers with one adapter, in training under an allocation.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{
    Adapter, AdapterConfig, Allocation, AllocationHook, AllocationRun, Attach, GivenTensors, PassInfo, PlainRule,
    Rates, Rule, adapters_of, each_adapter,
};
use lowrank_optim::registry::{Options, optimizer as find};
use lowrank_optim::{GlobalNormClip, Hook, StateMeter, StepInfo};

use super::case::{Array, Case, host};
use super::rules::text;

/// Several layers.
#[derive(Module, Debug)]
pub struct Layers {
    layers: Vec<Dense>,
}

/// Layers of a case in training.
pub struct Training {
    pub model: Layers,
    pub optimizer: ModuleOptimizer,
    pub hook: AllocationHook,
    total: u64,
}

/// Losses and unclipped gradients of a step.
pub struct Step {
    pub task_loss: f32,
    pub total_loss: f32,
    pub micro_losses: Vec<f32>,
    pub outputs: Vec<Tensor<2>>,
    pub grads: GradientsParams,
    pub grad_norm: f64,
}

impl Training {
    /// Layers `m{i}.W [d_out, d_in]` with an adapter of the given tensors.
    pub fn new(
        case: &Case,
        adapter: AdapterConfig,
        tensors: &dyn Fn(&str) -> Result<GivenTensors, String>,
        allocation: &dyn Allocation,
        run: &AllocationRun,
        weight_decay: f64,
    ) -> Result<Self, String> {
        let adapter = allocation.prepared(adapter).map_err(text)?;
        let (mut layers, mut given) = (Vec::new(), BTreeMap::new());
        while case.has(&format!("m{}.W", layers.len())) {
            let number = layers.len();
            let weight = case.array(&format!("m{number}.W"))?.tensor::<2>().transpose();
            layers.push(Dense::from_parts(weight.autodiff(), None));
            given.insert(format!("layers.{number}"), tensors(&format!("m{number}"))?);
        }
        let attach = Attach::new(adapter.clone()).with_tensors(given).factored();
        let (model, report) = attach.to(Layers { layers }).map_err(text)?;
        let places: Vec<_> = report.layers.iter().map(|layer| layer.place.clone()).collect();
        allocation.check(run, &places).map_err(text)?;
        let rule: &dyn Rule = &PlainRule {};
        let options = options(case, weight_decay)?;
        let (optimizer, _) =
            find("adamw").map_err(text)?.init(&options, &rule.parameters(&model), &StateMeter::new()).map_err(text)?;
        let hook = AllocationHook::new(allocation, run);
        Ok(Self { model, optimizer, hook, total: run.total_steps.ok_or("a case has a number of steps")? })
    }

    /// The adapter of a layer.
    pub fn layer(&self, number: usize) -> Adapter {
        let mut found = Vec::new();
        each_adapter(&self.model, |_, stack| found.extend(stack.stack.last().cloned()));
        found.swap_remove(number)
    }

    /// Number of layers.
    pub fn count(&self) -> usize {
        self.model.layers.len()
    }

    /// The merged weight of a layer, `[d_out, d_in]`.
    pub fn merged(&self, number: usize) -> Vec<f32> {
        host(self.model.layers[number].weight.val().inner().transpose())
    }

    /// Takes step `t`, counted from 0, at a learning rate: the loss is the mean over micro-batches of the sum of
    /// `0.5 mean((y - target)^2)` over the layers, and the term of the allocation.
    pub fn step(&mut self, case: &Case, t: u64, lr: f64, micro: usize, clip: Option<f64>) -> Result<Step, String> {
        let info = StepInfo { step: t + 1, total: Some(self.total), lr, peak_lr: lr };
        Hook::<Layers>::begin_step(&mut self.hook, &info, &self.model).map_err(text)?;
        let mut accumulator = GradientsAccumulator::new();
        let mut step = Step {
            task_loss: 0.0,
            total_loss: 0.0,
            micro_losses: Vec::new(),
            outputs: Vec::new(),
            grads: GradientsParams::new(),
            grad_norm: 0.0,
        };
        for part in 0..micro {
            let pass =
                PassInfo { micro_batch: part as u64, micro_batches: micro as u64, ..PassInfo::training(t, None) };
            adapters_of(&self.model).into_iter().for_each(|control| control.set_pass(pass.clone()));
            let mut loss: Option<Tensor<1>> = None;
            for number in 0..self.count() {
                let rows = |name: &str| -> Result<Tensor<2>, String> {
                    let array = case.array(&format!("m{number}.{name}.{t}"))?;
                    let rows = array.shape[0] / micro;
                    Ok(array.tensor::<2>().narrow(0, part * rows, rows).autodiff())
                };
                let y = self.model.layers[number].forward(rows("x")?);
                step.outputs.push(y.clone().inner());
                let of_layer = (y - rows("target")?).square().mean().mul_scalar(0.5);
                loss = Some(match loss.take() {
                    Some(loss) => loss + of_layer,
                    None => of_layer,
                });
            }
            let loss = loss.ok_or("a case has layers")?;
            let value = host(loss.clone().inner())[0];
            step.micro_losses.push(value);
            step.task_loss += value / micro as f32;
            let mut loss = loss.div_scalar(micro as f64);
            step.total_loss += host(loss.clone().inner())[0];
            if let (0, Some(term)) = (part, Hook::<Layers>::loss_term(&self.hook, &info, &self.model).map_err(text)?) {
                step.total_loss += host(term.clone().inner())[0];
                loss = loss + term;
            }
            accumulator.accumulate(&self.model, GradientsParams::from_grads(loss.backward(), &self.model));
        }
        let grads = accumulator.grads();
        step.grads = copied(&self.model, &grads);
        let clipped = GlobalNormClip::new(clip).apply(&self.model, grads).map_err(text)?;
        step.grad_norm = clipped.norm;
        let grads = Hook::<Layers>::after_clipping(&mut self.hook, &info, &self.model, clipped.grads).map_err(text)?;
        let model = self.hook.before_update(&info, self.model.clone());
        let mut model = self.optimizer.step(lr, model, grads);
        self.hook.after_update(&info, &mut model).map_err(text)?;
        self.model = self.hook.end_step(&info, model, &mut self.optimizer);
        Ok(step)
    }
}

impl Training {
    /// Replaces values of parameters, which are given flat.
    pub fn assign(&mut self, values: BTreeMap<ParamId, Tensor<1>>) {
        struct Assign(BTreeMap<ParamId, Tensor<1>>);
        impl ModuleMapper for Assign {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let Some(values) = self.0.remove(&param.id) else { return param };
                param.map(|tensor| {
                    let (trained, value) =
                        (tensor.is_require_grad(), Tensor::from_inner(values.reshape(tensor.dims())));
                    if trained { value.require_grad() } else { value }
                })
            }
        }
        self.model = self.model.clone().map(&mut Assign(values));
    }
}

/// Options of AdamW in a case.
fn options(case: &Case, weight_decay: f64) -> Result<Options, String> {
    let betas = case.config["betas"].as_array().ok_or("configuration: betas")?;
    let beta = |place: usize| betas.get(place).and_then(serde_json::Value::as_f64).ok_or("configuration: betas");
    let number = |value: f64| serde_json::Value::from(value);
    Ok(Options::from_iter([
        ("beta_1".to_string(), number(beta(0)?)),
        ("beta_2".into(), number(beta(1)?)),
        ("epsilon".into(), number(case.number("eps")?)),
        ("weight_decay".into(), number(weight_decay)),
    ]))
}

fn copied(model: &Layers, grads: &GradientsParams) -> GradientsParams {
    struct Copy<'a>(&'a GradientsParams, GradientsParams);
    impl ModuleVisitor for Copy<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(grad) = self.0.get::<D>(param.id) {
                self.1.register(param.id, grad);
            }
        }
    }
    let mut copy = Copy(grads, GradientsParams::new());
    model.visit(&mut copy);
    copy.1
}

/// A run of a constant learning rate.
pub fn constant(steps: u64, lr: f64) -> AllocationRun {
    AllocationRun { rates: Rates::new(move |_, _| lr), ..AllocationRun::constant("default", Some(steps), lr) }
}

/// A tensor of a case in its own shape.
pub fn data(case: &Case, name: &str) -> Result<TensorData, String> {
    let array = case.array(name)?;
    Ok(TensorData::new(array.f32(), array.shape.clone()))
}

/// Values of a case as a vector.
pub fn vector(case: &Case, name: &str) -> Result<TensorData, String> {
    let Array { values, .. } = case.array(name)?;
    let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
    Ok(TensorData::new(values.clone(), [values.len()]))
}
