//! Two optimizers in one model: DCT-AdamW for the matrices inside, AdamW for everything else, chosen by role.
//!
//! ```text
//! cargo run --release --example mix_optimizers
//! ```

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, Relu};
use burn::optim::GradientsParams;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor};
use lowrank_optim::GlobalNormClip;
use lowrank_optim::{DctAdamWConfig, ParameterRoles, StateMeter};

/// Guesses the next letter from the two before.
#[derive(Module, Debug)]
struct Letters {
    embedding: Embedding,
    layers: Vec<Linear>,
    norm: LayerNorm,
    head: Linear,
}

impl Letters {
    fn new(device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(27, 64).init(device),
            layers: (0..3).map(|_| LinearConfig::new(128, 128).init(device)).collect(),
            norm: LayerNormConfig::new(128).init(device),
            head: LinearConfig::new(128, 27).init(device),
        }
    }

    /// `before` is `[examples, 2]`, `next` is `[examples, 1]`.
    fn loss(&self, before: Tensor<2, Int>, next: Tensor<2, Int>) -> Tensor<1> {
        let [examples, _] = before.dims();
        let mut x = self.embedding.forward(before).reshape([examples, 128]);
        for layer in &self.layers {
            x = x.clone() + Relu::new().forward(layer.forward(x));
        }
        let scores = log_softmax(self.head.forward(self.norm.forward(x)), 1);
        scores.gather(1, next).mean().neg()
    }
}

fn main() -> anyhow::Result<()> {
    let device = Device::default().autodiff();
    device.seed(1);
    let mut model = Letters::new(&device);

    let meter = StateMeter::new();
    let method = DctAdamWConfig::new(32);
    // The last layer keeps full moments: patterns decide where roles do not.
    let hidden = ParameterRoles::of(&model).excluding(r"layers\.2")?;
    let mut optimizer = hidden.optimizer(&method, &meter)?;
    for stepped in hidden.report(&method, "dct-adamw") {
        println!("{stepped}");
    }

    let text = "the quick brown fox jumps over the lazy dog while five wizards box and jugs of liquor pack my quartz ";
    let ids: Vec<i32> = text.bytes().map(|byte| if byte == b' ' { 26 } else { i32::from(byte - b'a') }).collect();
    let examples = ids.len() - 2;
    let before: Vec<i32> = ids.windows(2).take(examples).flatten().copied().collect();
    let column =
        |values: &[i32], width| Tensor::<1, Int>::from_data(values, &device.clone().inner()).reshape([examples, width]);
    for step in 1..=100 {
        let loss = model.loss(column(&before, 2), column(&ids[2..], 1));
        if step % 25 == 0 {
            println!("step {step}: loss {:.4}", loss.clone().into_scalar::<f32>());
        }
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        let grads = GlobalNormClip::new(Some(1.0)).apply(&model, grads)?.grads;
        meter.start();
        model = optimizer.step(3e-3, model, grads);
    }
    println!("moments and errors take {} bytes; AdamW's would take {}", meter.stop(), 8 * model.num_params());
    Ok(())
}
