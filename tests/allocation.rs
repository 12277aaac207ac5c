//! Every allocation: a run that stops anywhere goes on with the same bits, ranks in files are those in memory, what is pruned is gone, and a merged
//! adapter is the same model.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, Device};
use lowrank_models::adapter::{
    ALLOCATIONS, AdapterConfig, Allocation, AllocationHook, AllocationRun, Attach, PassInfo, PlainRule, Rule,
    adapters_of, each_adapter, merged,
};
use lowrank_models::hub::peft::{Form, PeftFolder, save};
use lowrank_models::{Llama, LlamaConfig, ids_tensor};
use lowrank_optim::registry::{Options, optimizer};
use lowrank_optim::{GlobalNormClip, Hook, StateMeter, StepInfo};
use serde_json::json;

/// Steps of a run; ranks change in the middle of it.
const STEPS: u64 = 8;

/// An allocation with settings under which something happens in a few steps.
struct Setting {
    allocation: &'static str,
    rank: usize,
    options: serde_json::Value,
    structure: serde_json::Value,
}

fn settings() -> Vec<Setting> {
    let of = |allocation, rank, options, structure| Setting { allocation, rank, options, structure };
    vec![
        of("sora", 3, json!({"lambda": 0.1, "threshold": 0.1}), json!({"gate_lr_scale": 2.0})),
        of(
            "sora",
            3,
            json!({"lambda": 0.1, "threshold": 15.0, "threshold_mode": "lr-scaled", "prox": "soft"}),
            json!({}),
        ),
        of("dylora", 3, json!({}), json!({"update": "all"})),
        of("dylora", 3, json!({"min_rank": 2}), json!({"strict": true})),
        of("adalora", 3, json!({"target_rank": 1, "t_init": 1, "t_final": 2, "delta_t": 2}), json!({})),
        of("increlora", 1, json!({"target_rank": 2, "top_h": 5, "init_warmup": 1, "increment_interval": 2}), json!({})),
        of(
            "increlora",
            1,
            json!({"total_rank": 22, "add_rank": 2, "init_warmup": 1, "increment_interval": 2, "advance_learn": false}),
            json!({}),
        ),
    ]
}

fn table(value: &serde_json::Value) -> Options {
    value.as_object().expect("a table").clone().into_iter().collect()
}

impl Setting {
    fn allocation(&self) -> Box<dyn Allocation> {
        <dyn Allocation>::named(self.allocation, &table(&self.options)).expect("an allocation")
    }
}

fn base() -> Llama {
    let config = LlamaConfig {
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 8,
        initializer_range: 0.2,
        ..LlamaConfig::named("llama-9m", 61).expect("a known shape")
    };
    Llama::random(&config, 5, &Device::default().autodiff()).expect("a model")
}

/// A run: a model, its optimizer and allocation, and the number of steps taken.
struct Run {
    model: Llama,
    optimizer: ModuleOptimizer,
    hook: AllocationHook,
    step: u64,
}

impl Run {
    fn new(setting: &Setting) -> Self {
        let allocation = setting.allocation();
        let mut config = AdapterConfig::new(allocation.entry().structures[0]).with_rank(setting.rank);
        config.options = setting.structure.as_object().expect("a table").clone();
        let config = allocation.prepared(config).expect("an adapter of the allocation");
        let (model, report) = base().attach(Attach::new(config)).expect("an adapter");
        let places: Vec<_> = report.layers.iter().map(|layer| layer.place.clone()).collect();
        allocation.check(&Self::facts(), &places).expect("settings that the run allows");
        Self::of(setting, model, 0)
    }

    fn facts() -> AllocationRun {
        AllocationRun { seed: 7, ..AllocationRun::constant("default", Some(STEPS), 1e-2) }
    }

    fn of(setting: &Setting, model: Llama, step: u64) -> Self {
        let rule: &dyn Rule = &PlainRule {};
        let method = optimizer("adamw").expect("an optimizer");
        let options = Options::from_iter([("weight_decay".to_string(), 0.1.into())]);
        let (optimizer, _) = method.init(&options, &rule.parameters(&model), &StateMeter::new()).expect("an optimizer");
        let hook = AllocationHook::new(&*setting.allocation(), &Self::facts());
        hook.look(&model);
        Self { model, optimizer, hook, step }
    }

    fn advance(mut self, steps: u64) -> Self {
        for _ in 0..steps {
            let info = StepInfo { step: self.step + 1, total: Some(STEPS), lr: 1e-2, peak_lr: 1e-2 };
            Hook::<Llama>::begin_step(&mut self.hook, &info, &self.model).expect("a step");
            let ids = |shift: u64| -> Vec<i32> {
                (0..14).map(|i| ((i * i + 5 * (i + shift) + 3 * self.step) % 61) as i32).collect()
            };
            for control in adapters_of(&self.model) {
                control.set_pass(PassInfo::training(self.step, None));
            }
            let device = Device::default();
            let loss = self.model.loss_sum(ids_tensor(&ids(0), 2, &device), ids_tensor(&ids(1), 2, &device), None);
            let mut loss = loss.div_scalar(14.0);
            if let Some(term) = Hook::<Llama>::loss_term(&self.hook, &info, &self.model).expect("a term") {
                loss = loss + term;
            }
            let grads = GradientsParams::from_grads(loss.backward(), &self.model);
            let grads = GlobalNormClip::new(Some(1.0)).apply(&self.model, grads).expect("finite gradients").grads;
            let grads = Hook::<Llama>::after_clipping(&mut self.hook, &info, &self.model, grads).expect("gradients");
            let model = self.hook.before_update(&info, self.model);
            let mut model = self.optimizer.step(info.lr, model, grads);
            self.hook.after_update(&info, &mut model).expect("an update");
            self.model = self.hook.end_step(&info, model, &mut self.optimizer);
            adapters_of(&self.model).into_iter().for_each(|control| control.set_pass(PassInfo::default()));
            self.step += 1;
        }
        self
    }

    /// The run as another process finds it.
    fn resumed(self, setting: &Setting) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        save(&self.model, "default", Form::Own, None, dir.path()).expect("a folder that can be written");
        let again = |record: OptimizerRecord| {
            let bytes = record.into_bytes().expect("a record").to_vec();
            OptimizerRecord::from_bytes(Bytes::from_bytes_vec(bytes)).expect("the same record")
        };
        let (state, hook) = (again(self.optimizer.to_record()), again(Hook::<Llama>::to_record(&self.hook)));
        let folder = PeftFolder::open(dir.path()).expect("a folder that was written");
        let (model, _) = folder.attach(base()).expect("an adapter of this model");
        let mut resumed = Self::of(setting, model, self.step);
        resumed.optimizer = resumed.optimizer.load_record(state);
        Hook::<Llama>::load_record(&mut resumed.hook, hook);
        resumed
    }

    fn ranks(&self) -> BTreeMap<String, usize> {
        self.hook.look(&self.model);
        self.hook.view().layers().into_iter().map(|(path, layer)| (path, layer.rank)).collect()
    }

    /// Bits of all trained tensors.
    fn bits(&self) -> BTreeMap<String, Vec<u8>> {
        let mut bits = BTreeMap::new();
        each_adapter(&self.model, |path, stack| {
            for (tensor, data) in stack.stack[0].tensors() {
                bits.insert(format!("{path}.{}", tensor.field), data.as_bytes().to_vec());
            }
        });
        bits
    }
}

fn logits(model: &Llama) -> Vec<f32> {
    let ids: Vec<i32> = (0..22).map(|i| (i * i * 7 + 3) % 61).collect();
    model.valid().logits(ids_tensor(&ids, 2, &Device::default()), None).into_data().try_into_vec().expect("f32")
}

fn near(ours: &[f32], expected: &[f32], what: &str) {
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    let worst = ours.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(ours.len() == expected.len() && worst < 1e-4 * largest, "{what}: {worst} of {largest}");
}

#[test]
fn a_run_that_stops_anywhere_goes_on_with_the_same_bits() {
    for setting in settings() {
        let whole = Run::new(&setting).advance(STEPS);
        for stop in 1..STEPS {
            let stopped = Run::new(&setting).advance(stop).resumed(&setting).advance(STEPS - stop);
            let name = format!("{} {} at step {stop}", setting.allocation, setting.options);
            assert_eq!(stopped.ranks(), whole.ranks(), "{name}");
            assert!(stopped.bits() == whole.bits(), "{name}: other bits");
        }
        let moves = setting.allocation != "dylora";
        assert_eq!(moves, Run::new(&setting).ranks() != whole.ranks(), "{}: ranks change", setting.allocation);
    }
}

#[test]
fn tensors_move_and_ranks_in_files_are_those_in_memory_and_merged_is_unmerged() {
    for setting in settings() {
        let name = format!("{} {}", setting.allocation, setting.options);
        let fresh = Run::new(&setting);
        near(&logits(&fresh.model), &logits(&base()), &format!("{name} starts at the base"));
        let start = fresh.bits();
        let run = fresh.advance(STEPS);
        let now = run.bits();
        let still: Vec<&String> =
            start.iter().filter(|(path, bits)| now.get(*path) == Some(bits)).map(|(path, _)| path).collect();
        // Strict nested training moves the components that were drawn alone.
        let ranks = run.ranks();
        let is_left_out = |path: &str| ranks.iter().any(|(layer, rank)| *rank == 0 && path.starts_with(layer));
        let may_rest = |path: &str| {
            let is_first = path.ends_with(".0") || path.ends_with(".1");
            is_left_out(path) || setting.structure["strict"] == true && is_first
        };
        assert!(still.iter().all(|path| may_rest(path)), "{name}: {still:?} did not move");

        let expected = logits(&run.model);
        let total: usize = ranks.values().sum();
        match setting.allocation {
            "sora" => assert!(total < 3 * ranks.len() && total > 0, "{name}: {ranks:?}"),
            "adalora" => assert_eq!(total, ranks.len(), "{name}: {ranks:?}"),
            "increlora" => {
                let target = setting.options["total_rank"].as_u64().map_or(2 * ranks.len(), |total| total as usize);
                assert_eq!(total, target, "{name}: {ranks:?}");
            }
            _ => assert_eq!(total, 3 * ranks.len()),
        }
        let dir = tempfile::tempdir().expect("a folder");
        save(&run.model, "default", Form::Peft, None, dir.path()).expect("an export");
        let config = std::fs::read_to_string(dir.path().join("adapter_config.json")).expect("a configuration");
        assert!(config.contains("\"peft_type\": \"LORA\""), "{name}: {config}");
        let (exported, _) = PeftFolder::open(dir.path()).expect("an export").attach(base()).expect("the same model");
        let mut written: BTreeMap<String, usize> = ranks.keys().map(|path| (path.clone(), 0)).collect();
        each_adapter(&exported, |path, stack| {
            written.insert(path.to_string(), stack.stack[0].place().rank);
        });
        assert_eq!(written, ranks, "{name}");
        near(&logits(&exported), &expected, &format!("{name} exported"));
        near(&logits(&merged(run.model).expect("a product merges")), &expected, &format!("{name} merged"));
    }
}

#[test]
fn budgets_and_schedules_that_the_run_does_not_allow_are_refused_with_the_numbers() {
    let places = {
        let (_, report) = base().attach(Attach::new(AdapterConfig::new("triplet").with_rank(2))).expect("an adapter");
        report.layers.into_iter().map(|layer| layer.place).collect::<Vec<_>>()
    };
    let refusal = |name: &str, options: serde_json::Value, total: Option<u64>| {
        let run = AllocationRun::constant("default", total, 1e-2);
        let error = match <dyn Allocation>::named(name, &table(&options)) {
            Ok(allocation) => allocation.check(&run, &places).expect_err("settings that the run does not allow"),
            Err(error) => error,
        };
        error.to_string()
    };
    for (name, options, total, parts) in [
        ("adalora", json!({"target_rank": 3}), Some(9), ["target_rank = 3", "42", "28"]),
        ("adalora", json!({"total_rank": 0}), Some(9), ["total_rank = 0", "at least", "1"]),
        ("adalora", json!({"target_rank": 0}), Some(9), ["target_rank = 0", "from 1", "131072"]),
        ("adalora", json!({"target_rank": 1, "t_init": 5, "t_final": 4}), Some(9), ["t_init = 5", "4", "9 steps"]),
        ("adalora", json!({"target_rank": 1}), None, ["adalora", "train.steps", "train.minutes"]),
        ("increlora", json!({"target_rank": 1}), Some(900), ["target_rank = 1", "14", "28"]),
        ("increlora", json!({"target_rank": 3}), Some(90), ["init_warmup = 100", "90 steps", "100"]),
        (
            "sora",
            json!({"stages": 4, "threshold": 0.5, "max_threshold": 0.1}),
            Some(9),
            ["max_threshold = 0.1", "0.5", "ends before"],
        ),
        (
            "sora",
            json!({"stages": 4, "threshold": 0.0, "schedule": "exp-linear"}),
            Some(9),
            ["threshold = 0", "above 0", "linear"],
        ),
        ("dylora", json!({"min_rank": 3}), Some(9), ["min_rank = 3", "1", "2"]),
        ("dylora", json!({"weights": [1.0, 2.0, 3.0]}), Some(9), ["weights", "from 1 to 2", "3"]),
        ("dylora", json!({"weights": [0.0, 0.0]}), Some(9), ["weights", "sum", "above 0"]),
    ] {
        let told = refusal(name, options, total);
        assert!(parts.iter().all(|part| told.contains(part)), "{name}: {told}");
    }
    for entry in ALLOCATIONS {
        let allocation = <dyn Allocation>::named(entry.entry.name, &Options::new());
        let Ok(allocation) = allocation else { continue };
        let other = allocation.prepared(AdapterConfig::new("vera")).expect_err("another structure").to_string();
        assert!(other.contains("vera") && other.contains(entry.structures[0]), "{other}");
    }
}
