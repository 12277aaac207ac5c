//! A project of Burn's own layers, adapters and `Learner`: our training rules are one line of it.

use burn::module::{Lora, LoraAdapter, Module, Param};
use burn::nn::loss::{MseLoss, Reduction};
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Distribution, Tensor};
use burn::train::{InferenceStep, Learner, RegressionOutput, TrainOutput, TrainStep};
use lowrank_models::adapter::{AdapterStack, Allora, AlloraOptions};
use lowrank_optim::OptimError;
use lowrank_optim::rules::{AlloraRowsOnly, LoraPro, LoraProConfig, LoraProMode, NormOf};

/// Content of the one line.
#[derive(Clone, Debug)]
enum Rule {
    None,
    Pro(LoraPro),
    Allora(AlloraRowsOnly),
}

impl Rule {
    fn apply<M: Module>(&self, model: &M, grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        match self {
            Self::None => Ok(grads),
            Self::Pro(rule) => rule.apply(model, grads),
            Self::Allora(rule) => rule.apply(model, grads),
        }
    }
}

#[derive(Module, Debug)]
struct Project {
    first: Linear,
    second: Linear,
    #[module(skip)]
    rule: Rule,
}

impl Project {
    fn new(device: &Device) -> Self {
        let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).init(device);
        Self { first: layer(10, 12), second: layer(12, 6), rule: Rule::None }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.second.forward(Relu::new().forward(self.first.forward(x)))
    }

    fn compare(&self, [x, y]: [Tensor<2>; 2]) -> RegressionOutput {
        let output = self.forward(x);
        RegressionOutput::new(MseLoss::new().forward(output.clone(), y.clone(), Reduction::Mean), output, y)
    }

    fn layers(&self) -> [&Linear; 2] {
        [&self.first, &self.second]
    }

    fn bases(&self) -> Vec<f32> {
        self.layers().into_iter().flat_map(|layer| host(layer.weight.base())).collect()
    }

    /// The factors of whichever adapters it has.
    fn factors(&self) -> Vec<f32> {
        let factors = self.layers().map(|layer| match layer.weight.reparameterization::<AdapterStack>() {
            Some(adapter) => adapter.stack[0].structure().as_factors().expect("a product"),
            None => {
                let LoraAdapter { a, b, .. } = layer.weight.reparameterization().expect("Burn's adapter");
                [a, b].map(Param::val)
            }
        });
        factors.into_iter().flatten().flat_map(host).collect()
    }
}

impl TrainStep for Project {
    type Input = [Tensor<2>; 2];
    type Output = RegressionOutput;

    fn step(&self, batch: Self::Input) -> TrainOutput<RegressionOutput> {
        let output = self.compare(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }

    fn optimize(self, optim: &mut ModuleOptimizer, lr: ModuleLearningRate, grads: GradientsParams) -> Self {
        let grads = self.rule.apply(&self, grads).expect("finite gradients");
        optim.step(lr, self, grads)
    }
}

impl InferenceStep for Project {
    type Input = [Tensor<2>; 2];
    type Output = RegressionOutput;

    fn step(&self, batch: Self::Input) -> RegressionOutput {
        self.compare(batch)
    }
}

fn host(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("f32")
}

const STEPS: usize = 40;

/// Burn's own loop. Returns the model and the first and last loss.
fn learn(model: Project, optimizer: ModuleOptimizer, lr: f64, batch: &[Tensor<2>; 2]) -> (Project, [f32; 2]) {
    let mut learner = Learner::new(model, optimizer, lr);
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        learner.lr_step();
        let output = learner.train_step(batch.clone());
        losses.push(output.item.loss.into_scalar::<f32>());
        learner.optimizer_step(output.grads);
    }
    (learner.model(), [losses[0], losses[STEPS - 1]])
}

/// The same steps without the loop.
fn by_hand(mut model: Project, mut optimizer: ModuleOptimizer, lr: f64, batch: &[Tensor<2>; 2]) -> Project {
    for _ in 0..STEPS {
        let grads = GradientsParams::from_grads(model.compare(batch.clone()).loss.backward(), &model);
        let grads = model.rule.apply(&model, grads).expect("finite gradients");
        model = optimizer.step(lr, model, grads);
    }
    model
}

#[test]
fn rules_are_one_line_of_a_project_that_used_apply_lora() {
    let device = Device::default().autodiff();
    device.seed(5);
    let (teacher, base) = (Project::new(&device), Project::new(&device));
    let x = Tensor::random([64, 10], Distribution::Normal(0.0, 1.0), &device);
    let batch = [x.clone(), teacher.forward(x).detach()];
    let bases = base.bases();
    let plain = base.apply_lora(Lora::new(3, 3.0));
    let adam = || AdamWConfig::new().with_weight_decay(0.0).init();
    let sgd = || SgdConfig::new().init();
    let with = |rule: Rule| Project { rule, ..plain.clone() };
    let pro = |mode| with(Rule::Pro(LoraProConfig::new().with_mode(mode).init(&plain).expect("LoRA-Pro")));
    let rows = |norm_of| with(Rule::Allora(AlloraRowsOnly::new(&plain, 4.0, norm_of).expect("a scale of 1")));
    let whole = Allora::convert(plain.clone(), AlloraOptions::default()).expect("Burn's adapters");

    let (untouched, _) = learn(plain.clone(), adam(), 1e-3, &batch);
    // Every run has a state of its own, so each is built twice.
    type Make<'a> = &'a dyn Fn() -> Project;
    let cases: [(&str, Make<'_>, &dyn Fn() -> ModuleOptimizer, f64); 6] = [
        ("lora-pro, full", &|| pro(LoraProMode::Full), &sgd, 1e-3),
        ("lora-pro, efficient", &|| pro(LoraProMode::Efficient), &adam, 1e-3),
        ("lora-pro, sgd", &|| pro(LoraProMode::Sgd), &sgd, 1e-2),
        ("allora, ba_row", &|| rows(NormOf::BaRow), &sgd, 1e-2),
        ("allora, b_row", &|| rows(NormOf::BRow), &sgd, 1e-2),
        ("allora, whole", &|| whole.clone(), &adam, 1e-3),
    ];
    for (name, model, optimizer, lr) in cases {
        let start = model().factors();
        let (learned, [first, last]) = learn(model(), optimizer(), lr, &batch);
        assert!(last < first, "{name}: {first} to {last}");
        assert_eq!(learned.bases(), bases, "{name}: the base stays");
        let ours = learned.factors();
        assert!(ours.iter().all(|value| value.is_finite()) && ours != start, "{name}");
        assert_eq!(ours, by_hand(model(), optimizer(), lr, &batch).factors(), "{name}: as by hand");
        if lr == 1e-3 {
            assert_ne!(ours, untouched.factors(), "{name}: the rule does something");
        }
    }
}
