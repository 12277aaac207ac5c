//! LoRA-Pro on a model of your own: Burn's adapters, Burn's `Learner`, and hooks around the optimizer's step.
//!
//! ```text
//! cargo run --release --example lora_pro
//! ```

use std::sync::{Arc, Mutex};

use burn::module::{Lora, Module};
use burn::nn::loss::{MseLoss, Reduction};
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Distribution, Tensor};
use burn::train::{InferenceStep, Learner, RegressionOutput, TrainOutput, TrainStep};
use lowrank_optim::rules::LoraProConfig;
use lowrank_optim::{Hooks, OptimError, StepInfo};

#[derive(Module, Debug)]
struct Model {
    first: Linear,
    second: Linear,
    /// Hooks around the optimizer's steps, shared by the learner's copies of the model.
    #[module(skip)]
    hooks: Arc<Mutex<Hooks<Model>>>,
}

impl Model {
    fn new(device: &Device) -> Self {
        let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).init(device);
        Self { first: layer(24, 32), second: layer(32, 16), hooks: Arc::default() }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.second.forward(Relu::new().forward(self.first.forward(x)))
    }

    fn compare(&self, [x, y]: [Tensor<2>; 2]) -> RegressionOutput {
        let output = self.forward(x);
        RegressionOutput::new(MseLoss::new().forward(output.clone(), y.clone(), Reduction::Mean), output, y)
    }
}

impl TrainStep for Model {
    type Input = [Tensor<2>; 2];
    type Output = RegressionOutput;

    fn step(&self, batch: Self::Input) -> TrainOutput<RegressionOutput> {
        let output = self.compare(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }

    fn optimize(self, optim: &mut ModuleOptimizer, lr: ModuleLearningRate, grads: GradientsParams) -> Self {
        let hooks = self.hooks.clone();
        let step = StepInfo::constant(1, lr.base());
        let mut hooks = hooks.lock().expect("no other thread");
        hooks.update(&step, lr, self, grads, optim).expect("finite gradients")
    }
}

impl InferenceStep for Model {
    type Input = [Tensor<2>; 2];
    type Output = RegressionOutput;

    fn step(&self, batch: Self::Input) -> RegressionOutput {
        self.compare(batch)
    }
}

/// Losses after `steps` steps with plain LoRA and with LoRA-Pro.
fn compare(steps: usize) -> Result<[(&'static str, f32); 2], OptimError> {
    let device = Device::default().autodiff();
    device.seed(7);
    let (teacher, base) = (Model::new(&device), Model::new(&device));
    let x = Tensor::random([256, 24], Distribution::Normal(0.0, 1.0), &device);
    let batch = [x.clone(), teacher.forward(x).detach()];

    let plain = base.apply_lora(Lora::new(4, 8.0));
    let mut pro = plain.clone();
    // In mode full the rule keeps the moments, and the optimizer is plain SGD.
    pro.hooks = Arc::new(Mutex::new(Hooks::new().with(LoraProConfig::new().init(&pro)?)));

    let train = |model: Model, optimizer: ModuleOptimizer, lr: f64| {
        let mut learner = Learner::new(model, optimizer, lr);
        let mut loss = f32::NAN;
        for _ in 0..steps {
            learner.lr_step();
            let output = learner.train_step(batch.clone());
            loss = output.item.loss.into_scalar::<f32>();
            learner.optimizer_step(output.grads);
        }
        loss
    };
    Ok([
        ("LoRA with AdamW", train(plain, AdamWConfig::new().init(), 1e-2)),
        ("LoRA-Pro", train(pro, SgdConfig::new().init(), 1e-3)),
    ])
}

fn main() -> Result<(), OptimError> {
    for (name, loss) in compare(200)? {
        println!("{name}: {loss:.4} after 200 steps");
    }
    Ok(())
}

#[test]
fn both_learn() {
    let [begin, end] = [1, 60].map(|steps| compare(steps).expect("a rule"));
    for ((name, begin), (_, end)) in begin.into_iter().zip(end) {
        assert!(end < 0.9 * begin, "{name}: {begin} to {end}");
    }
}
