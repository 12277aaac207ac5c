//! Whole, checkpointed and per-layer steps compute the same numbers, for any frozen parameters and adapters of the
//! model.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::SgdConfig;
use burn::tensor::{Device, Tensor};
use lowrank_models::adapter::{AdapterConfig, Attach, Rank, STRUCTURES, Targets};
use lowrank_models::{Llama, LlamaConfig};
use lowrank_optim::{Hooks, ModulePath};

use super::{BackwardMode, Schedule, TrainError, Trainer, TrainerOptions, evaluate};
use crate::data::{Batch, DataError, IGNORE, Samples};
use crate::objective::{ModelLoss, Stream, Streams, TokenStream};

/// Rank that every structure supports on layers of these sides and that 8 blocks divide.
const RANK: usize = 8;

/// Stream that repeats the same four rows, some targets of which are ignored.
struct Rows;

impl Samples for Rows {
    fn batch(&self) -> usize {
        2
    }

    fn rows(&self) -> u64 {
        4
    }

    fn at(&self, position: u64) -> Result<Batch, DataError> {
        let token = |k: u64| ((position + 1) * 7 + k * k) as i32 % 20;
        let target = |k| if k % 6 == 0 { IGNORE } else { token(k + 1) };
        let starts = (0..12).map(|k| if k % 6 < 3 { 0 } else { 3 });
        let (inputs, targets) = (0..12).map(|k| (token(k), target(k))).unzip();
        Ok(Batch { inputs, targets, starts: starts.collect(), batch: 2, seq_len: 6, tags: Vec::new() })
    }
}

fn model(tied: bool) -> Llama {
    let config = LlamaConfig {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 16,
        tie_word_embeddings: tied,
        initializer_range: 0.2,
        ..LlamaConfig::named("llama-9m", 20).unwrap()
    };
    Llama::random(&config, 3, &Device::default().autodiff()).unwrap()
}

fn attached(model: Llama, config: AdapterConfig) -> Llama {
    let structure = config.structure.clone();
    match model.attach(Attach::new(config)) {
        Ok((model, _)) => model,
        Err(error) => panic!("{structure}: {error}"),
    }
}

/// Values of the trained parameters by path.
fn trained(model: &Llama) -> BTreeMap<String, Vec<f32>> {
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
                self.1.insert(self.0.joined(), param.val().inner().into_data().try_into_vec().unwrap());
            }
        }
    }
    let mut values = Values::default();
    model.visit(&mut values);
    values.1
}

fn options(backward: BackwardMode, accumulation: usize) -> TrainerOptions {
    let schedule = Schedule { total_steps: Some(4), ..Schedule::constant(0.05) };
    TrainerOptions { accumulation, backward, ..TrainerOptions::new(schedule) }
}

/// Losses of four steps, the held-out loss after them, and the values of the trained parameters.
fn run(model: Llama, backward: BackwardMode, accumulation: usize) -> (Vec<f64>, BTreeMap<String, Vec<f32>>) {
    let rows = TokenStream::new(Rows, true);
    let mut trainer = Trainer::new(model, SgdConfig::new().init(), Hooks::new(), options(backward, accumulation));
    let mut losses: Vec<f64> =
        (0..4).map(|_| trainer.step(&Streams::one(&rows), &mut |_, _| ()).unwrap().loss).collect();
    let held_out = rows.at(2, trainer.device());
    losses.push(evaluate(trainer.model(), &ModelLoss, [held_out].into_iter(), |_| true).unwrap().loss());
    (losses, trained(trainer.model()))
}

fn same_numbers(name: &str, model: impl Fn() -> Llama) {
    let (losses, values) = run(model(), BackwardMode::Whole, 1);
    assert!(losses.iter().all(|loss| loss.is_finite()), "{name}: {losses:?}");
    assert!(values.iter().any(|(path, value)| *value != trained(&model())[path]), "{name}: nothing was learned");
    for mode in [BackwardMode::Checkpointed, BackwardMode::PerLayer] {
        let (other, others) = run(model(), mode, 1);
        for (a, b) in losses.iter().zip(&other) {
            assert!((a - b).abs() <= 1e-6 * a, "{name} {mode:?}: {losses:?} and {other:?}");
        }
        compare(name, &values, &others);
    }
    let whole = run(model(), BackwardMode::Whole, 2).1;
    compare(&format!("{name}, two micro-batches"), &whole, &run(model(), BackwardMode::Checkpointed, 2).1);
}

fn compare(name: &str, values: &BTreeMap<String, Vec<f32>>, others: &BTreeMap<String, Vec<f32>>) {
    assert_eq!(values.len(), others.len(), "{name}");
    for (path, value) in values {
        let most = value.iter().fold(0f32, |most, value| most.max(value.abs()));
        let worst = value.iter().zip(&others[path]).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst <= 2e-6 * most, "{name} {path}: {worst} of {most}");
    }
}

#[test]
fn every_structure_has_the_same_numbers_in_every_mode() {
    for entry in STRUCTURES {
        let rank = (entry.spec.rank != Rank::None).then_some(RANK);
        let config = AdapterConfig { rank, ..AdapterConfig::new(entry.spec.name) };
        let config = match entry.spec.name {
            "block-lora" => config.with_option("blocks", 2),
            "loca" => config.with_option("n_components", 40),
            _ => config,
        };
        same_numbers(entry.spec.name, || attached(model(true), config.clone()));
        let config = AdapterConfig { layers: Some(vec![1, 2]), ..config };
        // With dropout, if the structure supports it by default.
        let dropped = AdapterConfig { dropout: 0.25, ..config.clone() };
        let config = if model(false).attach(Attach::new(dropped.clone())).is_ok() { dropped } else { config };
        same_numbers(&format!("{} above block 0", entry.spec.name), || attached(model(false), config.clone()));
    }
}

#[test]
fn the_backward_pass_ends_where_nothing_below_is_trained() {
    let lora = AdapterConfig::new("lora").with_rank(4);
    let head = AdapterConfig { targets: Targets::parse("lm_head"), ..lora.clone() };
    same_numbers("head alone", || attached(model(false), head.clone()));
    let both = AdapterConfig { targets: Targets::parse("lm_head,v_proj"), init: "pissa".into(), ..lora };
    same_numbers("head and values", || attached(model(false), both.clone()));
    for tied in [true, false] {
        same_numbers("all", || model(tied));
        same_numbers("a frozen embedding", || {
            let mut model = model(tied);
            model.model.embed_tokens = model.model.embed_tokens.no_grad();
            model
        });
        same_numbers("frozen blocks between trained ones", || {
            let mut model = model(tied);
            let first = model.model.layers.remove(0);
            model.model.layers.insert(0, first.no_grad());
            model.model.norm = model.model.norm.no_grad();
            model
        });
    }
    let mut trainer =
        Trainer::new(model(true).no_grad(), SgdConfig::new().init(), Hooks::new(), options(BackwardMode::Whole, 1));
    let rows = TokenStream::new(Rows, true);
    let refused = trainer.step(&Streams::one(&rows), &mut |_, _| ());
    assert!(matches!(refused, Err(TrainError::NothingTrained)));
}
