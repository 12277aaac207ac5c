//! The engine with a model of another crate: a residual multilayer perceptron on vectors.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_models::adapter::{AdapterConfig, Attach, Targets};
use lowrank_models::analysis::collect_gradients;
use lowrank_models::{Rows, Segment, SegmentedModel};
use lowrank_optim::registry::{Options, optimizer};
use lowrank_optim::{Hook, HookError, Hooks, ModulePath, ParameterRoles, Part, StateMeter, StepInfo};
use lowrank_train::data::DataError;
use lowrank_train::engine::{BackwardMode, Schedule, TrainError, Trainer, TrainerOptions, evaluate};
use lowrank_train::objective::{MAIN, ModelLoss, Objective, Stream, StreamBatch, Streams, Term, per_example_gradients};
use lowrank_train::recipe::{ModelFiles, RecordFiles};
use lowrank_train::run::checkpoint::{Checkpoints, TrainerState, restore_training, save_training};

#[derive(Module, Debug)]
struct Mlp {
    entry: Linear,
    blocks: Vec<Block>,
    head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    up: Linear,
    down: Linear,
}

/// Vectors and what is to be made of them.
#[derive(Clone, Debug)]
struct Pairs {
    x: Tensor<2>,
    y: Tensor<2>,
}

impl Rows for Pairs {
    fn rows(&self) -> usize {
        self.x.dims()[0]
    }

    fn narrow(&self, start: usize, count: usize) -> Self {
        Self { x: self.x.clone().narrow(0, start, count), y: self.y.clone().narrow(0, start, count) }
    }
}

impl SegmentedModel for Mlp {
    type Batch = Pairs;
    type Hidden = Tensor<2>;
    type Context = ();

    fn context(&self, _: &Pairs) {}

    fn enter(&self, batch: &Pairs, _: &()) -> Tensor<2> {
        self.entry.forward(batch.x.clone())
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, number: usize, x: Tensor<2>, _: &()) -> Tensor<2> {
        let Block { up, down } = &self.blocks[number];
        x.clone() + down.forward(relu(up.forward(x)))
    }

    fn loss(&self, x: Tensor<2>, batch: &Pairs) -> Tensor<1> {
        (self.head.forward(x) - batch.y.clone()).square().sum()
    }

    fn counted(batch: &Pairs) -> u64 {
        batch.y.shape().num_elements() as u64
    }

    fn visit_segment<V: ModuleVisitor>(&self, segment: Segment, visitor: &mut V) {
        match segment {
            Segment::Entry => self.entry.visit(visitor),
            Segment::Block(number) => self.blocks[number].visit(visitor),
            Segment::Head => self.head.visit(visitor),
        }
    }
}

/// Draws of the device's generator, which the tests of this file share, are made by one of them at a time.
static DRAWS: Mutex<()> = Mutex::new(());

fn model() -> Mlp {
    let _one = DRAWS.lock().unwrap_or_else(PoisonError::into_inner);
    let device = Device::default().autodiff();
    device.seed(3);
    let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).init(&device);
    let blocks = (0..3).map(|_| Block { up: layer(8, 12), down: layer(12, 8) }).collect();
    let model = Mlp { entry: layer(6, 8), blocks, head: layer(8, 2) };
    // Parameters are drawn when they are first read: while no other test seeds the draws.
    trained(&model);
    model
}

/// Rows that follow from their number.
struct Source {
    batch: usize,
    phase: f32,
}

const MAIN_ROWS: Source = Source { batch: 4, phase: 0.0 };

impl Stream<Pairs> for Source {
    fn batch(&self) -> usize {
        self.batch
    }

    fn rows(&self) -> u64 {
        16
    }

    fn at(&self, position: u64, device: &Device) -> Result<StreamBatch<Pairs>, DataError> {
        let tensor = |width: usize, factor: f32| {
            let value = |i: usize| ((position as f32 + i as f32) * factor + self.phase).sin();
            let values: Vec<f32> = (0..self.batch * width).map(value).collect();
            Tensor::from_data(TensorData::new(values, [self.batch, width]), device)
        };
        let batch = Pairs { x: tensor(6, 0.7), y: tensor(2, 1.3) };
        Ok(StreamBatch { counted: Mlp::counted(&batch), batch, tags: Vec::new() })
    }
}

/// Trained values by path.
fn trained(model: &Mlp) -> BTreeMap<String, Vec<f32>> {
    #[derive(Default)]
    struct Values(ModulePath, BTreeMap<String, Vec<f32>>);
    impl ModuleVisitor for Values {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if param.is_require_grad() {
                let values = param.base().without_autodiff().into_data().try_into_vec();
                self.1.insert(self.0.joined(), values.expect("floats"));
            }
        }
    }
    let mut values = Values::default();
    model.visit(&mut values);
    values.1
}

fn options(backward: BackwardMode, accumulation: usize) -> TrainerOptions {
    TrainerOptions { backward, accumulation, ..TrainerOptions::new(Schedule::constant(0.05)) }
}

fn sgd(model: Mlp, backward: BackwardMode, accumulation: usize) -> Trainer<Mlp> {
    Trainer::new(model, SgdConfig::new().init(), Hooks::new(), options(backward, accumulation))
}

/// Losses of some steps on one stream.
fn steps(trainer: &mut Trainer<Mlp>, count: usize) -> Vec<f64> {
    let streams = Streams::one(&MAIN_ROWS);
    (0..count).map(|_| trainer.step(&streams, &mut |_, _| ()).expect("a step").loss).collect()
}

fn near(name: &str, ours: &BTreeMap<String, Vec<f32>>, theirs: &BTreeMap<String, Vec<f32>>) {
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
    for (path, ours) in ours {
        let most = ours.iter().fold(0f32, |most, value| most.max(value.abs()));
        let worst = ours.iter().zip(&theirs[path]).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst <= 3e-6 * most, "{name} {path}: {worst} of {most}");
    }
}

fn adapted() -> Mlp {
    let config = AdapterConfig::new("lora").with_rank(2).with_targets(Targets::parse("up,down"));
    Attach::new(config).to(model()).expect("an adapter").0
}

#[test]
fn whole_checkpointed_and_per_layer_steps_have_the_same_numbers() {
    let frozen = || {
        let mut model = model();
        model.entry = model.entry.no_grad();
        model.blocks[0] = model.blocks[0].clone().no_grad();
        model
    };
    let cases: [(&str, &dyn Fn() -> Mlp); 3] = [("all", &model), ("adapter", &adapted), ("upper blocks", &frozen)];
    for (name, start) in cases {
        // One model for all ways: the layers' own draws need not repeat.
        let start = start();
        let mut whole = sgd(start.clone(), BackwardMode::Whole, 1);
        let losses = steps(&mut whole, 4);
        assert!(losses.iter().all(|loss| loss.is_finite()), "{name}: {losses:?}");
        assert!(trained(whole.model()).iter().all(|(path, values)| *values != trained(&start)[path]), "{name}");
        for mode in [BackwardMode::Checkpointed, BackwardMode::PerLayer] {
            let mut other = sgd(start.clone(), mode, 1);
            let found = steps(&mut other, 4);
            assert!(losses.iter().zip(&found).all(|(a, b)| (a - b).abs() <= 1e-6 * a), "{losses:?} and {found:?}");
            near(&format!("{name} {mode:?}"), &trained(whole.model()), &trained(other.model()));
        }
        let mut both = [BackwardMode::Whole, BackwardMode::Checkpointed].map(|mode| sgd(start.clone(), mode, 2));
        both.iter_mut().for_each(|trainer| drop(steps(trainer, 2)));
        near(name, &trained(both[0].model()), &trained(both[1].model()));
    }
    let held_out = MAIN_ROWS.at(40, &Device::default());
    let found = evaluate(&model(), &ModelLoss, [held_out].into_iter(), |_| true).expect("a loss");
    assert!(found.loss().is_finite() && found.tokens == 8);
}

fn adamw(model: &Mlp, meter: &StateMeter) -> ModuleOptimizer {
    let parameters = ParameterRoles::of(model).trained(|_| ());
    optimizer("adamw").expect("a method").init(&Options::new(), &parameters, meter).expect("an optimizer").0
}

/// Adds noise that follows from its own counter, which a checkpoint has to keep.
struct Decay {
    state: ModuleOptimizer,
    scale: Linear,
}

impl Decay {
    fn new(meter: &StateMeter) -> Self {
        let _one = DRAWS.lock().unwrap_or_else(PoisonError::into_inner);
        let device = Device::default().autodiff();
        let scale = LinearConfig::new(1, 1).with_bias(false).init(&device).materialize();
        let weight = Param::initialized(7u64.into(), Tensor::ones([1, 1], &Device::default()).autodiff());
        let scale = Linear { weight: weight.set_require_grad(true), ..scale };
        Self { state: adam(meter), scale }
    }
}

fn adam(meter: &StateMeter) -> ModuleOptimizer {
    let adam = lowrank_optim::AdamWConfig::new().build();
    ModuleOptimizer::from(adam.clone()).with_group(burn::module::ParamGroup::all(), meter.watch(adam), None)
}

impl Hook<Mlp> for Decay {
    fn name(&self) -> &'static str {
        "decay"
    }

    fn after_clipping(
        &mut self,
        step: &StepInfo,
        _: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        // A moment of the steps' numbers.
        let mut own = GradientsParams::new();
        own.register(self.scale.weight.id, Tensor::<2>::full([1, 1], step.step as f32, &Device::default()));
        let start = Tensor::ones([1, 1], &Device::default()).autodiff();
        self.scale.weight = Param::initialized(self.scale.weight.id, start).set_require_grad(true);
        self.scale = self.state.step(0.1, self.scale.clone(), own);
        Ok(grads)
    }

    fn after_update(&mut self, _: &StepInfo, model: &mut Mlp) -> Result<(), HookError> {
        let factor = self.scale.weight.val().inner().into_scalar::<f32>();
        model.head = model.head.clone().map(&mut Scale(factor));
        Ok(())
    }

    fn to_record(&self) -> burn::optim::OptimizerRecord {
        self.state.to_record()
    }

    fn load_record(&mut self, record: burn::optim::OptimizerRecord) {
        self.state = self.state.clone().load_record(record);
    }
}

struct Scale(f32);

impl burn::module::ModuleMapper for Scale {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let trained = param.is_require_grad();
        let value = param.val().without_autodiff().mul_scalar(self.0);
        Param::initialized(param.id, Tensor::from_inner(value)).set_require_grad(trained)
    }
}

fn with_adamw(model: Mlp, meter: &StateMeter, backward: BackwardMode) -> Trainer<Mlp> {
    let optimizer = adamw(&model, meter);
    Trainer::new(model, optimizer, Hooks::new().with(Decay::new(meter)), options(backward, 1))
}

fn saved_and_resumed(start: &dyn Fn() -> Mlp, backward: BackwardMode, dir: &Path) {
    let checkpoints = Checkpoints::new(dir.to_path_buf(), 3, false);
    let meter = StateMeter::new();
    let mut trainer = with_adamw(start(), &meter, backward);
    steps(&mut trainer, 3);
    let files = RecordFiles::new(start());
    save_training(&checkpoints, &trainer, &files, &meter, TrainerState::default()).expect("a checkpoint");
    steps(&mut trainer, 3);

    let path = checkpoints.newest().expect("a folder").expect("a checkpoint");
    assert!(path.join("hook-decay.bpk").exists());
    let state = TrainerState::read(&path).expect("a state");
    let meter = StateMeter::new();
    let model = RecordFiles::new(start()).load(&path, &Device::default().autodiff()).expect("a model");
    let mut resumed = with_adamw(model, &meter, backward);
    restore_training(&mut resumed, &meter, &path, &state).expect("a restored trainer");
    assert_eq!((resumed.step, resumed.samples), (3, 12));
    steps(&mut resumed, 3);
    assert_eq!(trained(trainer.model()), trained(resumed.model()), "bit for bit");

    let other = RecordFiles::new(start()).load(&path, &Device::default().autodiff()).expect("a model");
    let mut without = Trainer::new(other.clone(), adamw(&other, &meter), Hooks::new(), options(backward, 1));
    let error = restore_training(&mut without, &meter, &path, &state).expect_err("a hook is missing").to_string();
    assert!(error.contains("decay"), "{error}");
}

#[test]
fn a_checkpoint_restores_model_optimizer_and_hooks_bit_for_bit() {
    for backward in [BackwardMode::Whole, BackwardMode::PerLayer] {
        for start in [&model as &dyn Fn() -> Mlp, &adapted] {
            let dir = tempfile::tempdir().expect("a folder");
            saved_and_resumed(start, backward, dir.path());
        }
    }
}

/// Sum of absolute differences: a loss that is not the model's own.
fn absolute(model: &Mlp, hidden: Tensor<2>, batch: &StreamBatch<Pairs>) -> Tensor<1> {
    (model.head.forward(hidden) - batch.batch.y.clone()).abs().sum()
}

#[test]
fn a_weighted_sum_of_streams_is_the_same_in_every_mode_and_the_sum_by_hand() {
    let second = Source { batch: 3, phase: 2.0 };
    let objective = || {
        Objective::new(vec![
            Term::new(MAIN, 0.7, ModelLoss),
            Term::new("forget", -0.2, ModelLoss),
            Term::new(MAIN, 0.4, absolute),
        ])
        .expect("an objective")
    };
    let streams = || Streams::one(&MAIN_ROWS).with("forget", &second);
    let run = |backward| {
        let mut trainer = sgd(model(), backward, 1).with_objective(objective());
        let reports: Vec<_> = (0..3).map(|_| trainer.step(&streams(), &mut |_, _| ()).expect("a step")).collect();
        (reports, trained(trainer.model()))
    };
    let (reports, whole) = run(BackwardMode::Whole);
    for mode in [BackwardMode::Checkpointed, BackwardMode::PerLayer] {
        let (others, values) = run(mode);
        near(&format!("{mode:?}"), &whole, &values);
        assert!((others[2].loss - reports[2].loss).abs() < 1e-5);
    }

    let mut by_hand = model();
    let mut optimizer: ModuleOptimizer = SgdConfig::new().init();
    for (step, report) in (0..3).zip(&reports) {
        let device = Device::default();
        let [main, forget] = [MAIN_ROWS.at(4 * step, &device), second.at(3 * step, &device)].map(|read| read.unwrap());
        let hidden = |batch: &StreamBatch<Pairs>| by_hand.last_hidden(&batch.batch);
        // Eight and six numbers count.
        let terms = [
            by_hand.loss(hidden(&main), &main.batch) / 8.0,
            absolute(&by_hand, hidden(&main), &main) / 8.0,
            by_hand.loss(hidden(&forget), &forget.batch) / 6.0,
        ];
        let means: Vec<f32> = terms.iter().map(|term| term.clone().inner().into_scalar()).collect();
        assert!(report.terms.iter().zip(&means).all(|(ours, theirs)| (ours - f64::from(*theirs)).abs() < 1e-5));
        let [a, b, c] = terms;
        let grads = GradientsParams::from_grads((a * 0.7 + b * 0.4 - c * 0.2).backward(), &by_hand);
        by_hand = optimizer.step(0.05, by_hand, grads);
    }
    near("by hand", &whole, &trained(&by_hand));

    let mut alone = sgd(model(), BackwardMode::Whole, 1).with_objective(objective());
    let error = alone.step(&Streams::one(&MAIN_ROWS), &mut |_, _| ()).expect_err("a stream is missing").to_string();
    assert!(error.contains("forget") && error.contains("train"), "{error}");
    assert!(Objective::<Mlp>::new(Vec::new()).is_err());
    assert!(Objective::<Mlp>::new(vec![Term::new(MAIN, f64::NAN, ModelLoss)]).is_err());
}

struct NeedsAll;

impl Hook<Mlp> for NeedsAll {
    fn name(&self) -> &'static str {
        "needs-all"
    }

    fn needs_all_gradients(&self) -> Option<String> {
        Some("it ranks all layers".into())
    }
}

#[test]
fn a_hook_that_needs_all_gradients_is_rejected_block_by_block() {
    let new =
        |backward| Trainer::new(model(), SgdConfig::new().init(), Hooks::new().with(NeedsAll), options(backward, 1));
    steps(&mut new(BackwardMode::Checkpointed), 1);
    let error = new(BackwardMode::PerLayer).step(&Streams::one(&MAIN_ROWS), &mut |_, _| ()).expect_err("a refusal");
    assert!(matches!(&error, TrainError::AllGradients { hook: "needs-all", .. }), "{error}");
    assert!(error.to_string().contains("ranks all layers"));
}

#[test]
fn gradients_of_single_rows_add_up_to_those_of_the_batch() {
    let model = model();
    let batch = MAIN_ROWS.at(0, &Device::default()).expect("rows");
    let mean = model.loss(model.last_hidden(&batch.batch), &batch.batch) / 8.0;
    let whole = GradientsParams::from_grads(mean.backward(), &model);
    let id = model.blocks[1].up.weight.id;
    let mut sum: Option<Tensor<2>> = None;
    per_example_gradients(&model, &ModelLoss, &batch, |row, loss, mut grads| {
        assert!(row < 4 && loss.is_finite());
        let grad = grads.remove::<2>(id).expect("a gradient");
        sum = Some(match sum.take() {
            Some(sum) => sum + grad,
            None => grad,
        });
        Ok::<(), TrainError>(())
    })
    .expect("four rows");
    let far = sum.expect("gradients") / 4.0 - whole.get::<2>(id).expect("a gradient");
    assert!(far.abs().max().into_scalar::<f32>() < 1e-6);
}

#[test]
fn gradients_of_base_weights_are_collected_from_any_model() {
    let model = model();
    let config = AdapterConfig::new("lora").with_rank(2).with_targets(Targets::parse("up"));
    let batches = [MAIN_ROWS.at(0, &Device::default()).expect("rows").batch];
    let sums = collect_gradients(&model, &config, 4, batches.clone()).expect("gradients");
    let whole = GradientsParams::from_grads(model.loss(model.last_hidden(&batches[0]), &batches[0]).backward(), &model);
    let expected: Vec<f32> = whole.get::<2>(model.blocks[2].up.weight.id).unwrap().into_data().try_into_vec().unwrap();
    assert_eq!(sums.len(), 3);
    let found = &sums["blocks.2.up"];
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5), "{found:?} and {expected:?}");
}
