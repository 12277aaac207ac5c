//! Bytes that stay alive between the forward and the backward pass, counted by the program's own allocator.

use burn::tensor::{Device, Tensor};
use lowrank_models::linear::PARAMETERIZATIONS;
use lowrank_models::{Family, Features, Llama, LlamaConfig, Parameterization, ids_tensor};
use lowrank_train::process::BlockAllocator;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: BlockAllocator = BlockAllocator;

const BATCH: usize = 2;
const POSITIONS: usize = 256;

/// Sides large enough for every tensor to be counted; blocks below 128 KiB are not.
fn config(layers: usize, parameterization: Parameterization) -> LlamaConfig {
    of_family(layers, Family::Llama.features(), parameterization)
}

fn of_family(layers: usize, features: Features, parameterization: Parameterization) -> LlamaConfig {
    LlamaConfig {
        features,
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        parameterization,
        ..LlamaConfig::named("llama-9m", 64).expect("a shape")
    }
}

/// Bytes that a forward pass through so many blocks leaves.
fn alive(config: &LlamaConfig) -> u64 {
    let device = Device::default().autodiff();
    let model = Llama::random(config, 1, &device).expect("a model");
    let ids: Vec<i32> = (0..BATCH * POSITIONS).map(|place| (place * 7 % 64) as i32).collect();
    let ids = ids_tensor(&ids, BATCH, &device.inner());
    let live = || BlockAllocator::live().expect("this program's allocator");
    let before = live();
    let loss: Tensor<1> = model.loss_sum(ids.clone(), ids, None);
    let after = live();
    // The pass must have kept enough for the way back.
    let grads = loss.backward();
    assert!(model.model.layers[0].post_attention_layernorm.weight.val().grad(&grads).is_some());
    after - before
}

#[test]
fn a_block_keeps_what_the_configuration_says_and_never_a_dense_weight() {
    let rank = 64;
    for entry in PARAMETERIZATIONS {
        // Factors that the test can count, and a start that takes no time.
        let given = [("rank", json!(rank)), ("init", json!("gaussian"))].into_iter();
        let given = given.filter(|(option, _)| entry.spec().options().get(option).is_some());
        let options = given.map(|(option, value)| (option.to_string(), value)).collect();
        let (name, parameterization) = (entry.spec().name, entry.parse(&options).expect("a parameterization"));
        check(name, |layers| config(layers, parameterization.clone()));
    }
    // In the same test: the allocator counts the whole process.
    for family in Family::ALL {
        let features = Features {
            output_bias: true,
            mlp_bias: true,
            sliding_window: (family == Family::Mistral).then_some(64),
            residual_multiplier: (family == Family::Granite).then_some(0.5),
            ..family.features()
        };
        check(family.model_type(), |layers| of_family(layers, features.clone(), Parameterization::default()));
    }
}

/// Compares what a block keeps with what its configuration says.
fn check(name: &str, config: impl Fn(usize) -> LlamaConfig) {
    // The threads' own work memory comes with the first pass and stays.
    alive(&config(1));
    let block = alive(&config(2)) - alive(&config(1));
    let kept = 4 * BATCH * POSITIONS * config(1).kept();
    let ratio = block as f64 / kept as f64;
    println!("{name:10} {block:9} bytes a block, {kept:9} expected, {ratio:.3}");
    assert!((0.97..1.03).contains(&ratio), "{name}: {block} bytes stay, {kept} were expected");
}
