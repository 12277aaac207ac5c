//! A small LLaMA with any adapter on it, for tests of files.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, TensorData};
use lowrank_models::adapter::{
    Adapter, AdapterConfig, Attach, BaseGradients, GivenTensors, Rank, STRUCTURES, TensorRole, each_adapter,
};
use lowrank_models::hub::peft::PeftFolder;
use lowrank_models::{
    Choose, Family, Features, Init, Layout, Llama, LlamaConfig, ModelError, RandomWeights, WeightSource,
};

/// Random weights, with biases that are not 0.
struct WithBiases(RandomWeights);

impl WeightSource for WithBiases {
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, init: Init) -> Result<Vec<f32>, ModelError> {
        self.0.matrix(path, shape, layout, init)
    }

    fn vector(&mut self, path: &str, len: usize, init: Init) -> Result<Vec<f32>, ModelError> {
        self.0.vector(path, len, if path.ends_with(".bias") { Init::Normal(0.1) } else { init })
    }

    fn positions(&mut self, path: &str, n: usize, below: usize, at: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        self.0.positions(path, n, below, at)
    }
}

/// A small model whose layers are tall, wide and square, some with a bias, and which has norms of queries and keys.
pub fn base() -> Llama {
    base_on(&Device::default())
}

/// The same model on a device.
pub fn base_on(device: &Device) -> Llama {
    let config = LlamaConfig {
        family: Family::Qwen3,
        features: Features { qkv_bias: true, output_bias: true, ..Family::Qwen3.features() },
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        initializer_range: 0.2,
        ..LlamaConfig::named("llama-9m", 61).expect("a known shape")
    };
    let source = RandomWeights { seed: 5, std: config.initializer_range };
    Llama::build(&config, &mut WithBiases(source), device).expect("a model")
}

/// Largest difference over the largest value.
pub fn apart(a: &[f32], b: &[f32]) -> f32 {
    let largest = |values: &mut dyn Iterator<Item = f32>| values.map(f32::abs).fold(0.0, f32::max);
    largest(&mut a.iter().zip(b).map(|(a, b)| a - b)) / largest(&mut b.iter().copied())
}

/// A structure as it stands on the small model.
pub fn config(structure: &str) -> AdapterConfig {
    let config = AdapterConfig { seed: 11, ..AdapterConfig::new(structure) };
    let config = match config.entry().expect("a structure of the list").spec.rank {
        Rank::None => config,
        _ => config.with_rank(8),
    };
    match structure {
        "loca" => config.with_option("n_components", 40),
        "oft" => config.with_option("oft_block_size", 4),
        _ => config,
    }
}

/// Values without structure, between -1 and 1.
fn noise(place: usize) -> f32 {
    ((place * place + 3 * place + 1) as f32 * 0.37).sin()
}

/// The base with an adapter whose trained tensors have moved.
pub fn moved(model: Llama, config: &AdapterConfig) -> Llama {
    let gradients = |model: &Llama| -> BaseGradients {
        let fresh = Attach::new(AdapterConfig { name: "shapes".into(), ..AdapterConfig::new("lora") });
        let (shapes, report) = model.clone().attach(fresh).expect("LoRA");
        drop(shapes);
        let gradient = |[d_in, d_out]: [usize; 2]| (0..d_in * d_out).map(noise).collect();
        report.layers.into_iter().map(|layer| (layer.place.path, gradient(layer.place.shape))).collect()
    };
    let gradients = gradients(&model);
    let attach = || Attach::new(config.clone()).with_gradients(gradients.clone());
    let (fresh, _) = model.clone().attach(attach()).unwrap_or_else(|error| panic!("{}: {error}", config.structure));
    let mut tensors: BTreeMap<String, GivenTensors> = BTreeMap::new();
    each_adapter(&fresh, |path, adapter| {
        let own = |attached: &&Adapter| attached.control().name() == config.name;
        let Some(attached) = adapter.stack.iter().find(own) else { return };
        let fields = attached.tensors().into_iter().map(|(tensor, data)| {
            let shape = data.shape().as_slice().to_vec();
            let mut values: Vec<f32> = data.try_into_vec().expect("f32");
            if !matches!(tensor.role, TensorRole::Frozen | TensorRole::Position) {
                values.iter_mut().enumerate().for_each(|(place, value)| *value += 0.05 * noise(place + path.len()));
            }
            (tensor.field, TensorData::new(values, shape))
        });
        tensors.insert(path.to_string(), fields.collect());
    });
    model.attach(attach().with_tensors(tensors)).expect("an adapter of its own tensors").0
}

/// A folder that can be read.
pub fn open(dir: &Path) -> PeftFolder {
    PeftFolder::open(dir).unwrap_or_else(|error| panic!("{error}"))
}

/// All structures, and the starts that change the base.
pub fn all() -> Vec<AdapterConfig> {
    let starts = ["pissa", "olora"].map(|init| AdapterConfig { init: init.into(), ..config("lora") });
    let update = AdapterConfig { init: "lora-sb".into(), ..config("lora-xs").with_option("init_step_size", 1e-2) };
    STRUCTURES.iter().map(|entry| config(entry.spec.name)).chain(starts).chain([update]).collect()
}
