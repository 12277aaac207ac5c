//! Every allocation: a run that stops anywhere goes on with the same bits, ranks in files are those in memory, what is pruned is gone, and a merged
//! adapter is the same model; and the program around them.

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::Path;

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
use program::{Workshop, checkpoints, metrics, refused, stderr, succeeded, tensors};
use safetensors::SafeTensors;
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

/// Tensors of a checkpoint; its list of ranks may be written relative to those that were read.
fn values(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = tensors(checkpoint);
    let file = all.remove("adapter_model.safetensors").expect("an adapter");
    let file = SafeTensors::deserialize(&file).expect("safetensors");
    all.extend(file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())));
    all
}

#[test]
fn the_program_trains_resumes_reports_and_exports() {
    let shop = Workshop::with_model(60);
    let more = |name: &'static str, options: &[&'static str]| {
        let mut args = vec![
            "--allocation",
            name,
            "--steps",
            "8",
            "--set",
            "checkpoint.every=1",
            "--set",
            "checkpoint.keep_last=9",
        ];
        options.iter().for_each(|option| args.extend(["--set", option]));
        args
    };
    let growing = more(
        "increlora",
        &["allocation.options.init_warmup=1", "allocation.options.increment_interval=2", "allocation.options.top_h=9"],
    );
    succeeded(shop.run(&shop.tuned("growing", &growing)));
    let run = shop.path("growing");
    let ranks = || -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(run.join("rank.json")).expect("ranks")).expect("JSON")
    };
    let before = ranks();
    assert_eq!(before["total_rank"], 28, "{before}");
    let logged: Vec<_> = metrics(&run).into_iter().filter(|line| !line["layers"].is_null()).collect();
    assert!(logged.len() > 1 && logged.last().expect("a line")["layers"] == before["layers"], "{logged:?}");
    let whole = values(&checkpoints(&run)[7]);
    // Before, at and after the second growth.
    for from in ["step-000004", "step-000005", "step-000006"] {
        succeeded(shop.run(&["finetune", "--quiet", "--resume-from", from, "--out", "growing"]));
        assert!(values(&checkpoints(&run)[7]) == whole, "{from}");
        assert_eq!(ranks(), before);
    }
    let longer =
        shop.run(&["finetune", "--quiet", "--resume", "--out", "growing", "--set", "allocation.options.top_h=3"]);
    assert!(stderr(&longer).contains("allocation.options.top_h"), "{}", stderr(&longer));

    // Ranks that were found are used for a plain LoRA.
    let found = ["--steps", "2", "--set", "adapter.rank_pattern=@growing/rank.json"];
    succeeded(shop.run(&shop.tuned("found", &found)));
    let plain = std::fs::read_to_string(checkpoints(&shop.path("found"))[0].join("adapter_config.json")).expect("JSON");
    assert!(plain.contains("self_attn") && plain.contains("rank_pattern"), "{plain}");
    let other = std::fs::read_to_string(run.join("rank.json")).expect("ranks").replace("layers.1.", "layers.7.");
    std::fs::write(shop.path("other.json"), other).expect("a file");
    let wrong = ["--steps", "2", "--set", "adapter.rank_pattern=@other.json"];
    refused(&shop.run(&shop.tuned("out", &wrong)), &["layers", "7", "no linear layer matches"]);
    assert!(!shop.path("out").exists());

    let staged = more("sora", &["allocation.options.thresholds=[0.05, 0.1]", "adapter.options.gate_lr_scale=2.0"]);
    succeeded(shop.run(&shop.tuned("staged", &staged)));
    assert_eq!(
        checkpoints(&shop.path("staged")).last().and_then(|dir| dir.file_name()).expect("a name"),
        "step-000016"
    );

    succeeded(shop.run(&shop.tuned("nested", &more("dylora", &["adapter.rank=4"]))));
    let nested = checkpoints(&shop.path("nested")).pop().expect("a checkpoint");
    let nested = nested.to_str().expect("a path");
    for (command, rank, out) in [("merge", "2", "merged"), ("export", "2", "exported"), ("export", "4", "whole")] {
        succeeded(shop.run(&[command, "--model", "model", "--adapter", nested, "--rank", rank, "--out", out]));
    }
    let config =
        |dir: &str| std::fs::read_to_string(shop.path(dir).join("adapter_config.json")).expect("a configuration");
    assert!(config("exported").contains("\"r\": 2") && config("whole").contains("\"r\": 4"));
    let measured = |more: &[&str]| {
        let args = ["eval", "--quiet", "--data", "examples.jsonl", "--seq-len", "48", "--model"];
        String::from_utf8(succeeded(shop.run(&[&args, more].concat())).stdout).expect("text")
    };
    assert_eq!(measured(&["merged"]), measured(&["model", "--adapter", nested, "--rank", "2"]));
    assert_eq!(measured(&["model", "--adapter", "exported"]), measured(&["merged"]));
    refused(
        &shop.run(&["merge", "--model", "model", "--adapter", nested, "--rank", "5", "--out", "x"]),
        &["--rank 5", "1 to 4"],
    );

    for (args, parts) in [
        (
            vec!["--allocation", "diffora", "--steps", "4", "--set", "allocation.options.search_steps=4"],
            vec!["search_steps = 4", "train.steps"],
        ),
        (
            vec!["--allocation", "diffora", "--steps", "4", "--set", "allocation.options.val_fraction=0.001"],
            vec!["val_fraction = 0.001", "57 examples"],
        ),
        (
            vec!["--allocation", "diffora", "--steps", "9", "--backward", "per-layer", "--set", "optimizer.clip=0"],
            vec!["allocation", "gradients of a second batch"],
        ),
        (vec!["--targets", "@other.json"], vec!["adapter.targets = @other.json", "modules.json"]),
        (vec!["--allocation", "sroa"], vec!["allocation.name", "sora"]),
        (vec!["--allocation", "sora", "--adapter", "lora"], vec!["allocation.name = sora", "gated"]),
        (vec!["--allocation", "adalora", "--minutes", "1"], vec!["adalora", "train.minutes"]),
        (vec!["--allocation", "adalora", "--rank", "2", "--steps", "5"], vec!["target_rank = 8", "112", "28"]),
        (
            vec!["--allocation", "increlora", "--steps", "500", "--optimizer", "muon"],
            vec!["optimizer.name = muon", "increlora"],
        ),
        (vec!["--allocation", "sora", "--adapter", "none"], vec!["allocation.name = sora"]),
    ] {
        refused(&shop.run(&shop.tuned("out", &args)), &parts);
        assert!(!shop.path("out").exists(), "{args:?}");
    }
}

#[test]
fn a_search_selects_layers_resumes_and_its_choice_serves_another_run() {
    let shop = Workshop::with_model(60);
    for (order, sharing, layers) in [("first", "pair", 14), ("second", "none", 8)] {
        let options = [
            "checkpoint.every=1".to_string(),
            "checkpoint.keep_last=9".into(),
            "allocation.options.search_steps=4".into(),
            format!("allocation.options.order={order}"),
            format!("allocation.options.sharing={sharing}"),
        ];
        let mut args = vec!["--allocation", "diffora", "--steps", "8", "--rank", "2"];
        options.iter().for_each(|option| args.extend(["--set", option]));
        succeeded(shop.run(&shop.tuned(order, &args)));
        let run = shop.path(order);
        let whole = values(&checkpoints(&run)[7]);
        let modules = || std::fs::read_to_string(run.join("modules.json")).expect("what was selected");
        let selected = modules();
        let list: serde_json::Value = serde_json::from_str(&selected).expect("JSON");
        // Four of the seven layers of each of two blocks.
        assert_eq!(list["modules"].as_array().map(Vec::len), Some(8), "{selected}");
        let weights: Vec<f64> = metrics(&run)
            .iter()
            .filter_map(|line| line["layers"].as_object().cloned())
            .flat_map(|layers| layers.into_iter().filter_map(|(_, layer)| layer["weight"].as_f64()))
            .collect();
        assert!(weights.iter().any(|weight| *weight != 0.5 && *weight != 1.0), "weights learn: {weights:?}");
        // Within the search, at its end, and after it.
        for from in ["step-000002", "step-000004", "step-000006"] {
            succeeded(shop.run(&["finetune", "--quiet", "--resume-from", from, "--out", order]));
            assert!(values(&checkpoints(&run)[7]) == whole, "{order}: {from}");
            assert_eq!(modules(), selected);
        }
        let longer =
            shop.run(&["finetune", "--quiet", "--resume", "--out", order, "--set", "allocation.options.rho=0.9"]);
        assert!(stderr(&longer).contains("allocation.options.rho"), "{}", stderr(&longer));

        let adapter = checkpoints(&run).pop().expect("a checkpoint");
        let adapter = adapter.to_str().expect("a path");
        let exported = format!("{order}-exported");
        succeeded(shop.run(&["export", "--model", "model", "--adapter", adapter, "--out", &exported]));
        let file = std::fs::read(shop.path(&exported).join("adapter_model.safetensors")).expect("an adapter");
        let factors = SafeTensors::deserialize(&file).expect("safetensors").len();
        assert_eq!(factors, 2 * layers, "{order}: layers without an adapter are left out");
        let loss = |more: &[&str]| {
            let args =
                ["eval", "--quiet", "--data", "examples.jsonl", "--seq-len", "48", "--model", "model", "--adapter"];
            String::from_utf8(succeeded(shop.run(&[&args, more].concat())).stdout).expect("text")
        };
        assert_eq!(loss(&[adapter]), loss(&[&exported]));

        let (target, out) = (format!("@{order}/modules.json"), format!("{order}-plain"));
        succeeded(shop.run(&shop.tuned(&out, &["--steps", "2", "--targets", &target])));
        let plain = checkpoints(&shop.path(&out)).pop().expect("a checkpoint");
        let file = std::fs::read(plain.join("adapter_model.safetensors")).expect("an adapter");
        assert_eq!(SafeTensors::deserialize(&file).expect("safetensors").len(), 16);
    }
}

#[test]
fn bits_and_sparsity_are_shared_resumed_and_leave_as_peft_reads_them() {
    let shop = Workshop::with_model(60);
    let every_step = ["--set", "checkpoint.every=1", "--set", "checkpoint.keep_last=9"];
    for (name, more) in
        [("snella", vec!["--steps", "8", "--rank", "2"]), ("bayesian", vec!["--steps", "8", "--rank", "3"])]
    {
        let args = [&["--allocation", name][..], &more, &every_step].concat();
        succeeded(shop.run(&shop.tuned(name, &args)));
        let run = shop.path(name);
        let whole = values(&checkpoints(&run)[7]);
        for from in ["step-000002", "step-000005"] {
            succeeded(shop.run(&["finetune", "--quiet", "--resume-from", from, "--out", name]));
            assert!(values(&checkpoints(&run)[7]) == whole, "{name}: {from}");
        }
        let adapter = checkpoints(&run).pop().expect("a checkpoint");
        let adapter = adapter.to_str().expect("a path");
        let exported = format!("{name}-exported");
        let form = if name == "snella" { vec!["--as", "shira"] } else { vec![] };
        let args = ["export", "--model", "model", "--adapter", adapter, "--out", &exported];
        succeeded(shop.run(&[&args[..], &form].concat()));
        let config =
            std::fs::read_to_string(shop.path(&exported).join("adapter_config.json")).expect("a configuration");
        let kind = if name == "snella" { "SHIRA" } else { "LORA" };
        assert!(config.contains(&format!("\"peft_type\": \"{kind}\"")), "{name}: {config}");
        let loss = |adapter: &str| -> f64 {
            let args = [
                "eval",
                "--quiet",
                "--data",
                "examples.jsonl",
                "--seq-len",
                "48",
                "--model",
                "model",
                "--adapter",
                adapter,
            ];
            let text = String::from_utf8(succeeded(shop.run(&args)).stdout).expect("text");
            let number = text.split_whitespace().find_map(|word| word.parse().ok());
            number.unwrap_or_else(|| panic!("no loss in {text}"))
        };
        assert!((loss(adapter) - loss(&exported)).abs() < 1e-4, "{name}");
    }
    let (snell, lora) = ("snella-exported", "bayesian-exported");
    for (args, parts) in [
        (vec!["--adapter", lora, "--as", "shira", "--model", "model"], vec!["--as shira", "not sparse", "--as lora"]),
        (vec!["--adapter", snell, "--as", "shira"], vec!["--as shira", "--model"]),
        (vec!["--adapter", snell, "--as", "lora"], vec!["--as lora", "--rank"]),
        (vec!["--adapter", snell, "--as", "shira", "--rank", "3", "--model", "model"], vec!["--as shira", "--rank"]),
    ] {
        refused(&shop.run(&[&["export", "--out", "none"][..], &args].concat()), &parts);
        assert!(!shop.path("none").exists());
    }
}

#[test]
fn every_allocation_trains_in_every_backward_mode_that_it_has() {
    let shop = Workshop::with_model(30);
    let modes: [&[&str]; 3] =
        [&[], &["--backward", "checkpointed"], &["--backward", "per-layer", "--set", "optimizer.clip=0"]];
    for (entry, mode) in ALLOCATIONS.iter().flat_map(|entry| modes.map(|mode| (entry, mode))) {
        let name = entry.entry.name;
        let options: &[&str] = match name {
            "increlora" => {
                &["--set", "allocation.options.init_warmup=2", "--set", "allocation.options.increment_interval=3"]
            }
            _ => &[],
        };
        let args = [&["--allocation", name, "--steps", "12", "--overwrite"][..], options, mode].concat();
        let output = shop.run(&shop.tuned("run", &args));
        if output.status.code() == Some(2) && mode.contains(&"per-layer") {
            refused(&output, &["train.backward = per-layer", name, "needs all gradients"]);
            continue;
        }
        succeeded(output);
        let losses = metrics(&shop.path("run"));
        assert!(losses.iter().all(|line| line["loss"].as_f64().is_some_and(f64::is_finite)), "{name} {mode:?}");
    }
}
