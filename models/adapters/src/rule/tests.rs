//! Properties of the rules.

use super::{AlloraRule, LoraFaRule, LoraPlusRule, LoraProRule, PlainRule, RULES, Rule};
use crate::bench::Dense;
use crate::{AdapterConfig, Attach, Scaling, Targets, each_adapter};
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::registry::{Options, optimizer as find};
use lowrank_optim::rules::{LoraProMode, NormOf};
use lowrank_optim::{AssignedTo, StateMeter};
use serde_json::Value;

#[derive(Module, Debug)]
struct Model {
    first: Dense,
    second: Dense,
}

fn model(config: &AdapterConfig) -> Model {
    let values = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
    let weight = |shape: [usize; 2]| {
        let data = TensorData::new(values(shape[0] * shape[1]), shape);
        Dense::from_parts(Tensor::from_data(data, &Device::default().autodiff()), None)
    };
    let model = Model { first: weight([6, 8]), second: weight([8, 4]) };
    Attach::new(config.clone()).factored().to(model).unwrap().0
}

fn loss(model: &Model, step: u64) -> Tensor<1> {
    let values = (0..30).map(|i| ((i + 31 * step) as f32 * 1.3).cos()).collect::<Vec<f32>>();
    let x = Tensor::<2>::from_data(TensorData::new(values, [5, 6]), &Device::default().autodiff());
    model.second.forward(model.first.forward(x).tanh()).square().mean()
}

/// Values of all factors after some steps.
fn trained(rule: &dyn Rule, options: &[(&str, f64)], steps: u64) -> Vec<Vec<f32>> {
    // ALLoRA supports only scale 1.
    let config = AdapterConfig::new("lora").with_rank(2).with_alpha(2.0);
    let mut model = rule.freeze(model(&rule.prepared(config).unwrap()));
    let given = options.iter().map(|(name, value)| (name.to_string(), Value::from(*value)));
    let options = rule.options("adamw", given.collect()).unwrap();
    let meter = StateMeter::new();
    let mut optimizer = find("adamw").unwrap().init(&options, &rule.parameters(&model), &meter).unwrap().0;
    let gradient_rule = rule.gradients(&model, &options, &meter).unwrap();
    for step in 0..steps {
        let mut grads = GradientsParams::from_grads(loss(&model, step).backward(), &model);
        if let Some(rule) = &gradient_rule {
            grads = rule.apply(&model, grads).unwrap();
            model = rule.decay(model, 0.01);
        }
        model = optimizer.step(0.01, model, grads);
    }
    let mut found = Vec::new();
    each_adapter(&model, |_, adapter| {
        let factors = adapter.stack[0].structure().as_factors().unwrap();
        found.extend(factors.map(|factor| host(factor.inner())));
    });
    found
}

#[test]
fn lora_plus_with_ratio_one_is_lora_bit_for_bit() {
    let plain = trained(&PlainRule::default(), &[("weight_decay", 0.1)], 4);
    assert_eq!(trained(&LoraPlusRule { ratio: 1.0 }, &[("weight_decay", 0.1)], 4), plain);
    // The first step of Adam equals the learning rate, whatever the gradient.
    let moved = |ratio: f64| trained(&LoraPlusRule { ratio }, &[("epsilon", 1e-30)], 1)[1][0].abs();
    assert!((moved(8.0) / moved(1.0) - 8.0).abs() < 1e-4);
}

#[test]
fn lora_fa_leaves_a_and_keeps_no_state_for_it() {
    for corrected in [false, true] {
        let rule: &dyn Rule = &LoraFaRule { corrected };
        let (before, after) = (trained(rule, &[], 0), trained(rule, &[], 4));
        assert_eq!((&before[0], &before[2]), (&after[0], &after[2]));
        assert_ne!((&before[1], &before[3]), (&after[1], &after[3]));
        let model = rule.freeze(model(&AdapterConfig::new("lora").with_rank(2)));
        let parameters = rule.parameters(&model);
        let paths: Vec<&str> = parameters.parameters().iter().map(|p| p.path.as_str()).collect();
        assert!(paths.len() == 2 && paths.iter().all(|path| path.ends_with(".b")), "{paths:?}");
    }
}

#[test]
fn every_rule_trains_every_factor_that_it_is_meant_to() {
    for entry in RULES {
        let entry = &entry.entry;
        let rule = named(entry.name);
        assert_eq!(rule.name(), entry.name);
        let (before, after) = (trained(&*rule, &[], 0), trained(&*rule, &[], 3));
        for (place, (before, after)) in before.iter().zip(&after).enumerate() {
            let frozen = entry.name == "lora-fa" && place % 2 == 0;
            assert_eq!(before == after, frozen, "{}: factor {place}", entry.name);
            assert!(after.iter().all(|value| value.is_finite()));
        }
    }
    let error = <dyn Rule>::named("lora-minus", &Options::new()).unwrap_err().to_string();
    assert!(error.contains("lora-pro"), "{error}");
    for (name, option, value) in [("lora-plus", "ratio", 0.0), ("lora-pro", "delta", -1.0), ("allora", "eta", 0.0)] {
        let options = Options::from_iter([(option.to_string(), Value::from(value))]);
        let error = <dyn Rule>::named(name, &options).unwrap_err().to_string();
        assert!(error.starts_with(&format!("rule.options.{option} = ")), "{error}");
    }
}

fn named(name: &str) -> Box<dyn Rule> {
    <dyn Rule>::named(name, &Options::new()).unwrap()
}

#[test]
fn settings_that_a_rule_does_not_support_are_rejected_with_the_reason() {
    let lora = || AdapterConfig::new("lora").with_rank(2);
    let (pro, allora): (&dyn Rule, &dyn Rule) = (&LoraProRule::default(), &AlloraRule::default());
    let (undamped, plain) = (LoraProRule { delta: 0.0, ..LoraProRule::default() }, PlainRule::default());
    let block = AdapterConfig::new("block-lora");
    let refusals: Vec<(&dyn Rule, AdapterConfig, &str)> = vec![
        (pro, block.clone(), "block-lora"),
        (&LoraFaRule { corrected: false }, block.clone(), "block-lora"),
        (allora, block, "block-lora"),
        (&undamped, lora(), "greater than 0"),
        (&LoraPlusRule { ratio: 0.0 }, lora(), "greater than 0"),
        (&AlloraRule { eta: f64::NAN, norm_of: NormOf::BRow }, lora(), "eta"),
        (allora, lora().with_alpha(4.0), "alpha"),
        (allora, AdapterConfig { dropout: 0.1, ..lora() }, "dropout"),
        (allora, AdapterConfig { scaling: Some(Scaling::RootRank), ..lora() }, "no scale"),
        (allora, AdapterConfig { alpha_pattern: vec![("first".into(), 2.0)], ..lora() }, "no scale"),
        (&plain, lora().with_alpha(-1.0), "alpha"),
    ];
    for (rule, config, reason) in refusals {
        let error = rule.prepared(config).unwrap_err().to_string();
        assert!(error.contains(reason), "{}: {error}", rule.name());
    }
    assert!(allora.prepared(lora().with_alpha(2.0)).is_ok(), "alpha equal to the rank is no scale");
    for rule in [pro, &LoraFaRule { corrected: true }] {
        assert!(rule.options("muon", Options::new()).unwrap_err().to_string().contains("adamw"));
    }
    assert_eq!(PlainRule::default().warnings(&lora()), Vec::<String>::new());
    assert_eq!(pro.warnings(&AdapterConfig { dropout: 0.1, ..lora() }).len(), 1);
    assert_eq!(LoraFaRule::default().warnings(&AdapterConfig { init: "pissa".into(), ..lora() }).len(), 1);
    assert_eq!(LoraPlusRule { ratio: 0.5 }.warnings(&lora()).len(), 1);
}

#[test]
fn modes_without_moments_on_the_factors_take_descent_and_keep_no_state_in_the_optimizer() {
    let config = AdapterConfig::new("lora").with_rank(2).with_targets(Targets::parse("first"));
    for (mode, who, optimizer_bytes, rule_bytes) in [
        (LoraProMode::Full, AssignedTo::Descent, 0, 2 * 4 * 6 * 8),
        (LoraProMode::Efficient, AssignedTo::Method("adamw"), 2 * 4 * 2 * (6 + 8), 0),
        (LoraProMode::Sgd, AssignedTo::Descent, 0, 0),
    ] {
        let rule: &dyn Rule = &LoraProRule { mode, ..LoraProRule::default() };
        let mut model = model(&rule.prepared(config.clone()).unwrap());
        let options = rule.options("adamw", Options::new()).unwrap();
        let meter = StateMeter::new();
        let (mut optimizer, report) = find("adamw").unwrap().init(&options, &rule.parameters(&model), &meter).unwrap();
        assert!(report.len() == 2 && report.iter().all(|assignment| assignment.optimizer == who));
        let gradient_rule = rule.gradients(&model, &options, &meter).unwrap().unwrap();
        let grads = GradientsParams::from_grads(loss(&model, 0).backward(), &model);
        meter.start();
        let grads = gradient_rule.apply(&model, grads).unwrap();
        assert_eq!(meter.stop(), rule_bytes);
        meter.start();
        model = optimizer.step(0.01, model, grads);
        assert_eq!(meter.stop(), optimizer_bytes);
        assert_eq!(gradient_rule.to_record().is_empty(), mode != LoraProMode::Full);
        assert!(loss(&model, 0).into_scalar::<f32>().is_finite());
    }
}

#[test]
fn decay_of_the_whole_weight_is_refused_where_it_has_more_parts() {
    let rule = named("lora-pro");
    let options = Options::from_iter([("weight_decay".to_string(), Value::from(0.1))]);
    let options = rule.options("adamw", options).unwrap();
    let meter = StateMeter::new();
    let plain = AdapterConfig::new("lora").with_rank(2);
    assert!(rule.gradients(&model(&plain), &options, &meter).is_ok());
    let pissa = AdapterConfig { init: "pissa".into(), ..plain.clone() };
    let error = rule.gradients(&model(&pissa), &options, &meter).unwrap_err().to_string();
    assert!(error.contains("weight_decay"), "{error}");
    let freezing: &dyn Rule = &LoraFaRule::default();
    let half = freezing.freeze(model(&plain));
    assert!(rule.gradients(&half, &options, &meter).unwrap_err().to_string().contains("frozen"));
    let sgd = LoraProRule { mode: LoraProMode::Sgd, ..LoraProRule::default() };
    assert!(sgd.options("adamw", options).unwrap_err().to_string().contains("weight_decay = 0.1"));
}

#[test]
fn decay_shrinks_the_base_and_its_product_as_one_weight() {
    let rule = named("lora-pro");
    let options = Options::from_iter([("weight_decay".to_string(), Value::from(0.5))]);
    let options = rule.options("adamw", options).unwrap();
    let model = model(&rule.prepared(AdapterConfig::new("lora").with_rank(2)).unwrap());
    let gradient_rule = rule.gradients(&model, &options, &StateMeter::new()).unwrap().unwrap();
    // B starts at zero: after some steps the product contributes to the weight.
    let mut optimizer = find("adamw").unwrap().init(&options, &rule.parameters(&model), &StateMeter::new()).unwrap().0;
    let grads = GradientsParams::from_grads(loss(&model, 0).backward(), &model);
    let model = optimizer.step(0.5, model, grads);
    let weights = |model: &Model| [&model.first, &model.second].map(|layer| host(layer.weight.val().inner()));
    let before = weights(&model);
    let after = gradient_rule.decay(model, 0.1);
    for (before, after) in before.iter().flatten().zip(weights(&after).iter().flatten()) {
        assert!((after - 0.95 * before).abs() <= 1e-6 * before.abs().max(1.0), "{before} became {after}");
    }
}
