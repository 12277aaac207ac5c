//! A run of two stages, each with data, objective, hooks and an end of its own, killed and resumed in each.

#[path = "program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use burn::module::Param;
use burn::tensor::Tensor;
use lowrank_models::Llama;
use lowrank_optim::{Hook, Hooks, StepInfo};
use lowrank_train::build::prepare_data;
use lowrank_train::config::{Config, Job, Layers};
use lowrank_train::objective::{MAIN, ModelLoss, Objective, Term};
use lowrank_train::recipe::{Recipe, RunData, Stage, TrainedModel};
use lowrank_train::run::checkpoint::TrainerState;
use lowrank_train::run::report::Console;
use lowrank_train::run::{Place, Start, Training};
use program::{Workshop, checkpoints, metrics, tensors};

/// Steps of each stage.
const STEPS: u64 = 200;

/// Lets the last norm decay a little before each update.
struct Decay;

impl Hook<Llama> for Decay {
    fn name(&self) -> &'static str {
        "decay"
    }

    fn before_update(&mut self, _: &StepInfo, mut model: Llama) -> Llama {
        let norm = &mut model.model.norm.weight;
        let value = norm.val().without_autodiff().mul_scalar(0.999);
        *norm = Param::initialized(norm.id, Tensor::from_inner(value)).set_require_grad(true);
        model
    }
}

/// First one text with the plain loss, then another one with half of it and a hook.
fn recipe(dir: &Path) -> Recipe {
    let mut layers = Layers::default();
    let cache = format!("data.cache={}", dir.join("cache").display());
    for setting in [
        &cache,
        "tokenizer.path=bytes",
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.max_position_embeddings=128",
        "train.batch=2",
        "train.seq_len=32",
        "train.minutes=0",
        "eval.every=0",
        "log.sample_tokens=0",
        "checkpoint.every=50",
        "checkpoint.keep_last=20",
        "schedule.warmup_steps=10",
    ] {
        layers.set(setting).unwrap();
    }
    let config = layers.resolve(&Config::of(Job::Pretrain)).unwrap();
    let mut models = Vec::new();
    let mut stage = |name: &str| {
        let mut config = config.clone();
        config.data.path = vec![dir.join(name)];
        let prepared = prepare_data(&config, &mut Console::new(true)).unwrap();
        models.push(TrainedModel::of_text(&config, &prepared.tokenizer).unwrap());
        Stage::new(name, RunData::text(&config, prepared).unwrap(), Some(STEPS))
    };
    let (first, second) = (stage("text"), stage("more"));
    let second = Stage {
        objective: Objective::new(vec![Term::new(MAIN, 0.5, ModelLoss)]).unwrap(),
        hooks: Hooks::new().with(Decay),
        ..second
    };
    Recipe { config, model: models.remove(0), stages: vec![first, second], forecast: None }
}

/// Folder of the workshop and name of the run of a process that trains.
const FOLDER: &str = "LOWRANK_STAGES_FOLDER";
const RUN: &str = "LOWRANK_STAGES_RUN";

/// Trains where a parent process asks for it.
#[test]
fn trains_in_a_process_of_its_own() {
    let (Some(dir), Some(run)) = (std::env::var_os(FOLDER), std::env::var_os(RUN)) else { return };
    let (dir, run) = (PathBuf::from(dir), PathBuf::from(run));
    let start = if run.join("checkpoints").exists() { Start::Resume(None) } else { Start::New };
    let training = Training::of_recipe(recipe(&dir), &Place::Folder(run), &start, Console::new(true)).unwrap();
    training.run().unwrap();
}

fn train(shop: &Workshop, run: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "trains_in_a_process_of_its_own", "--quiet"]);
    command.env(FOLDER, shop.dir.path()).env(RUN, shop.path(run)).spawn().expect("the test program starts")
}

fn newest(run: &Path) -> u64 {
    checkpoints(run).last().and_then(|path| TrainerState::read(path).ok()).map_or(0, |state| state.step)
}

#[test]
fn a_run_of_two_stages_resumes_in_each_with_the_same_bits() {
    let shop = Workshop::new(40);
    std::fs::create_dir(shop.path("more")).unwrap();
    for number in 0..40 {
        let text = format!("other text {number}, in which {} and {} stand\n", number * 7 % 13, number * 5 % 11);
        std::fs::write(shop.path(&format!("more/{number}.txt")), text.repeat(9)).unwrap();
    }
    assert!(train(&shop, "whole").wait().unwrap().success());

    let halves = shop.path("halves");
    for after in [50, STEPS + 50] {
        let mut child = train(&shop, "halves");
        let begin = Instant::now();
        while newest(&halves) < after {
            assert!(begin.elapsed() < Duration::from_secs(120), "no checkpoint of step {after}");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let state = TrainerState::read(checkpoints(&halves).last().unwrap()).unwrap();
        assert_eq!(state.stage, usize::from(state.step > STEPS), "killed after step {}", state.step);
        assert!(state.step < 2 * STEPS, "it had come to its end before the kill");
    }
    assert!(train(&shop, "halves").wait().unwrap().success());

    let whole = checkpoints(&shop.path("whole"));
    assert_eq!(whole.len(), 8);
    for (a, b) in whole.iter().zip(checkpoints(&halves)) {
        assert!(tensors(a) == tensors(&b), "{} and {} differ", a.display(), b.display());
    }
    let lines = |run: &str, key: &str| -> Vec<f64> {
        metrics(&shop.path(run)).iter().filter_map(|line| line[key].as_f64()).collect()
    };
    assert_eq!(lines("whole", "loss"), lines("halves", "loss"));
    let rates = lines("whole", "lr");
    assert_eq!(rates[0], rates[STEPS as usize], "each stage has a warm-up of its own");
    assert_eq!(lines("whole", "final_validation_loss").len(), 2, "each stage is measured at its end");

    let mut swapped = recipe(shop.dir.path());
    swapped.stages.reverse();
    let place = Place::Folder(halves);
    let error = Training::of_recipe(swapped, &place, &Start::Resume(None), Console::new(true)).err().unwrap();
    assert!(error.to_string().contains("stages text, more, not more, text"), "{error}");
}
