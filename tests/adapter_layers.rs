//! Small layers under every structure, for the tests over the registry.
#![allow(dead_code)] // the tests use their part

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{
    Adapter, AdapterConfig, Attach, BaseGradients, GivenTensors, PenaltyAt, Rank, Report, SHARED, STRUCTURES, StepOf,
    StructureEntry, TensorRole, add_after_clipping, drop_frozen, each_adapter, frozen_this_step, penalty,
};
use lowrank_optim::AdamWConfig;

/// Layers side by side: tall with a bias, wide, square.
#[derive(Module, Debug)]
pub struct Layers {
    pub tall: Dense,
    pub wide: Dense,
    pub square: Dense,
}

/// The same layers as Burn has them.
#[derive(Module, Debug)]
pub struct BurnLayers {
    pub tall: Linear,
    pub wide: Linear,
    pub square: Linear,
}

pub const SHAPES: [(&str, [usize; 2]); 3] = [("tall", [24, 12]), ("wide", [12, 24]), ("square", [16, 16])];

/// Numbers that look random.
pub fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * i + 7 * i + 13 * seed) as f32 * 0.731 + seed as f32).sin()).collect()
}

pub fn tensor(shape: [usize; 2], seed: usize) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values(shape[0] * shape[1], seed), shape), &Device::default()).autodiff()
}

pub fn layers() -> Layers {
    let bias = Tensor::<1>::from_data(TensorData::new(values(12, 9), [12]), &Device::default()).autodiff();
    let weight = |place: usize| tensor(SHAPES[place].1, place + 1).div_scalar(4.0);
    Layers {
        tall: Dense::from_parts(weight(0), Some(bias)),
        wide: Dense::from_parts(weight(1), None),
        square: Dense::from_parts(weight(2), None),
    }
}

pub fn inputs() -> [Tensor<2>; 3] {
    [0, 1, 2].map(|place| tensor([10, SHAPES[place].1[0]], place + 11))
}

impl Layers {
    pub fn all(&self) -> [&Dense; 3] {
        [&self.tall, &self.wide, &self.square]
    }

    pub fn outputs(&self) -> [Tensor<2>; 3] {
        let [tall, wide, square] = inputs();
        [self.tall.forward(tall), self.wide.forward(wide), self.square.forward(square)]
    }

    /// Squared errors against outputs of other layers.
    pub fn loss(&self) -> Tensor<1> {
        loss(self.outputs())
    }

    pub fn weights(&self) -> Vec<Vec<f32>> {
        self.all().map(|layer| host(layer.weight.base())).into()
    }
}

pub fn loss(outputs: [Tensor<2>; 3]) -> Tensor<1> {
    let [tall, wide, square] = outputs;
    let error = |y: Tensor<2>, seed: usize| {
        let target = tensor(y.dims(), seed);
        (y - target).square().mean()
    };
    error(tall, 21) + error(wide, 22) + error(square, 23)
}

pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().expect("f32")
}

pub fn all_values(outputs: [Tensor<2>; 3]) -> Vec<f32> {
    outputs.into_iter().flat_map(host).collect()
}

/// Largest difference over the largest value.
pub fn apart(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
    let differences = ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs());
    differences.fold(0f32, |worst, difference| if difference.is_nan() { f32::NAN } else { worst.max(difference) })
        / largest
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Options that a structure needs on the layers of the tests at this rank, beyond its defaults.
pub fn settings(entry: &StructureEntry, rank: usize) -> AdapterConfig {
    let config = AdapterConfig { seed: 3, ..AdapterConfig::new(entry.spec.name) };
    let config = if entry.spec.rank == Rank::None { config } else { config.with_rank(rank) };
    match entry.spec.name {
        "block-lora" => config.with_option("blocks", if rank.is_multiple_of(2) { 2 } else { 1 }),
        // Other blocks have to divide the sides.
        "bone" if rank > 4 => config.with_option("mode", "shared"),
        "lora-xs" => config.with_option("init_step_size", 1e-2),
        // What is not adapted one by one has less values than the smaller side.
        "salt" => config.with_rank(rank.min(8)).with_option("top_k", 4),
        // Places move within the few steps of these tests.
        "loca" => config
            .with_option("n_components", 40)
            .with_option("coef_steps", 2)
            .with_option("loc_steps", 2)
            .with_option("learn_location_iters", 100.0)
            .with_option("loc_lr_scale", 1.0),
        "snell" if !rank.is_multiple_of(2) => config.with_option("heads", 1),
        // Not more positions than the smallest layer has.
        "shira" => config.with_rank(rank.min(8)),
        // Blocks that divide every side.
        "oft" => config.with_option("oft_block_size", 4),
        // Each of two halves has it.
        "wara" => config.with_rank(rank.min(6)),
        _ => config,
    }
}

/// The same with dropout.
pub fn dropping(entry: &StructureEntry, dropout: f64) -> AdapterConfig {
    let config = AdapterConfig { dropout, ..settings(entry, 4) };
    if entry.spec.name == "bone" { config.with_option("mode", "shared") } else { config }
}

pub fn gradients() -> BaseGradients {
    SHAPES.iter().map(|(name, [d_in, d_out])| (name.to_string(), values(d_in * d_out, 31))).collect()
}

pub fn attach(config: &AdapterConfig) -> (Layers, Report) {
    attach_to(layers(), config)
}

pub fn attach_to(layers: Layers, config: &AdapterConfig) -> (Layers, Report) {
    let attach = Attach::new(config.clone()).with_gradients(gradients()).factored();
    attach.to(layers).unwrap_or_else(|error| panic!("{}: {error}", config.structure))
}

/// The newest adapter of every layer, by its path.
pub fn newest<M: Module>(module: &M) -> BTreeMap<String, Adapter> {
    let mut found = BTreeMap::new();
    each_adapter(module, |layer, adapter| {
        if let Some(attached) = adapter.stack.last() {
            found.insert(layer.to_string(), attached.clone());
        }
    });
    found
}

/// Values of the newest adapters, by layer and field.
pub fn state<M: Module>(module: &M) -> BTreeMap<(String, String), (TensorRole, Vec<f32>)> {
    let mut found = BTreeMap::new();
    for (layer, attached) in newest(module) {
        for (tensor, data) in attached.tensors() {
            let values = data.convert::<f32>().try_into_vec().expect("f32");
            found.insert((layer.clone(), tensor.field), (tensor.role, values));
        }
    }
    found
}

pub const STEPS: u64 = 8;

/// A few steps of AdamW with all that adapters ask of a training loop; `see` gets the gradients of each step.
pub fn train(mut layers: Layers, mut see: impl FnMut(&mut GradientsParams, &Layers)) -> Layers {
    let lr = 1e-2;
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    for step in 0..STEPS {
        let loss = match penalty(&layers, PenaltyAt::Loss) {
            Some(penalty) => layers.loss() + penalty,
            None => layers.loss(),
        };
        let grads = GradientsParams::from_grads(loss.backward(), &layers);
        let mut grads = add_after_clipping(&layers, grads, lr).expect("a peak rate above 0");
        see(&mut grads, &layers);
        let grads = drop_frozen(&layers, grads, &frozen_this_step(&layers, StepOf { step, total: Some(STEPS) }));
        layers = optimizer.step(lr, layers, grads);
    }
    layers
}

pub fn trained(config: &AdapterConfig) -> (Layers, Report) {
    let (layers, report) = attach(config);
    (train(layers, |_, _| ()), report)
}

/// Every structure with the starts that it knows.
pub fn each_start(mut test: impl FnMut(&'static StructureEntry, &AdapterConfig, &str)) {
    for entry in STRUCTURES {
        for init in std::iter::once("default").chain(entry.spec.inits.iter().map(|init| init.name)) {
            let config = AdapterConfig { init: init.to_string(), ..settings(entry, 4) };
            test(entry, &config, &format!("{} ({init})", entry.spec.name));
        }
    }
}

pub fn each(mut test: impl FnMut(&'static StructureEntry, &AdapterConfig, &str)) {
    STRUCTURES.iter().for_each(|entry| test(entry, &settings(entry, 4), entry.spec.name));
}

/// Tensors that a file holds of a module's newest adapter.
pub fn written<M: Module>(module: &M) -> BTreeMap<String, GivenTensors> {
    let mut written: BTreeMap<String, GivenTensors> = BTreeMap::new();
    for (layer, attached) in newest(module) {
        for shared in attached.structure().shared() {
            written.entry(SHARED.into()).or_default().insert(shared.key.clone(), shared.tensor());
        }
        let own = attached.tensors().into_iter().map(|(tensor, data)| (tensor.field, data)).collect();
        written.insert(layer, own);
    }
    written
}

/// The module with a seed that adapts Burn's own layers.
pub fn burn_layers(biased: bool) -> BurnLayers {
    let ours = layers();
    let linear = |layer: &Dense| Linear {
        weight: Param::from_tensor(layer.weight.base()),
        bias: layer.bias.as_ref().filter(|_| biased).map(|bias| Param::from_tensor(bias.val())),
    };
    BurnLayers { tall: linear(&ours.tall), wide: linear(&ours.wide), square: linear(&ours.square) }
}
