//! Peak memory of fine-tuning one LLaMA in three ways, each in a process of its own.

use std::path::Path;
use std::process::Command;

use burn::module::{Lora, Module, ParamGroup};
use burn::optim::GradientsParams;
use burn::tensor::Device;
use lowrank_models::adapter::{AdapterConfig, Attach};
use lowrank_models::hub::ModelFolder;
use lowrank_models::{LanguageBatch, Llama, LlamaConfig, ids_tensor};
use lowrank_optim::{AdamWConfig, ParameterRoles, Role};
use lowrank_train::process::MemoryUse;

/// From the least memory to the most.
const WAYS: [(&str, &str); 3] =
    [("ours", "LoRA as it runs here"), ("burn", "LoRA of Burn's own apply_lora"), ("whole", "all weights")];

const WAY: &str = "LOWRANK_TEST_WAY";

/// A folder to measure on in place of random weights.
const MODEL: &str = "LOWRANK_TEST_MODEL";

const MIB: u64 = 1 << 20;

fn model(device: &Device) -> Llama {
    if let Some(folder) = std::env::var_os(MODEL) {
        return ModelFolder::open(Path::new(&folder)).expect("a model folder").load(device).expect("a model");
    }
    let config = LlamaConfig {
        hidden_size: 512,
        intermediate_size: 1376,
        num_hidden_layers: 6,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        ..LlamaConfig::named("llama-60m", 512).expect("a shape")
    };
    Llama::random(&config, 1, device).expect("a model")
}

#[test]
#[ignore = "one of the processes that the test below measures"]
fn a_process_of_one_way() {
    let Ok(way) = std::env::var(WAY) else { return };
    let model = model(&Device::default().autodiff());
    let mut model = match way.as_str() {
        "ours" => model.attach(Attach::new(AdapterConfig::new("lora").with_rank(16))).expect("LoRA").0,
        "burn" => {
            let all = ParameterRoles::of(&model);
            let hidden = all.parameters().iter().filter(|parameter| parameter.role == Role::Hidden);
            let weights = hidden.map(|parameter| parameter.id).collect();
            model.apply_lora(Lora::new(16, 16.0).set_param_group(ParamGroup::from_ids(weights)))
        }
        _ => model,
    };
    let ids: Vec<i32> = (0..2 * 257).map(|place| (place * place + 3) % 509).collect();
    let rows =
        |shift: usize| -> Vec<i32> { ids.chunks(257).flat_map(|row| &row[shift..shift + 256]).copied().collect() };
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    let mut trained = 0;
    for _ in 0..2 {
        let tensor = |shift| ids_tensor(&rows(shift), 2, &Device::default());
        let batch = LanguageBatch { inputs: tensor(0), targets: tensor(1), starts: None };
        let grads = GradientsParams::from_grads(model.mean_loss(batch).backward(), &model);
        trained = grads.len();
        model = optimizer.step(1e-4, model, grads);
    }
    let blocks = model.config().num_hidden_layers;
    assert!(trained == 14 * blocks || way == "whole", "{trained} trained tensors in {blocks} blocks");
    println!("\npeak {}", MemoryUse::now().peak);
}

/// With `LOWRANK_TEST_MODEL=DIR` on the model of a folder; `--nocapture` shows the figures.
#[test]
fn ours_takes_less_than_burns_own_and_that_less_than_all_weights() {
    let peaks = WAYS.map(|(way, message)| {
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command.args(["--exact", "a_process_of_one_way", "--ignored", "--nocapture", "--test-threads=1"]);
        let output = command.env(WAY, way).output().expect("the process starts");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{message}: {text}{}", String::from_utf8_lossy(&output.stderr));
        let peak = text.lines().find_map(|line| line.strip_prefix("peak ")?.split(' ').next()?.parse::<u64>().ok());
        let peak = peak.unwrap_or_else(|| panic!("{message} printed no peak: {text}"));
        println!("{message}: {} MiB", peak / MIB);
        peak
    });
    assert!(peaks[0] < peaks[1] && peaks[1] < peaks[2], "{peaks:?} of {WAYS:?}");
}
