//! A plain Burn project in which one line was changed: DCT-AdamW in place of AdamW, with a quarter of the moments.
//!
//! ```text
//! cargo run --release --example swap_optimizer
//! ```

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Distribution, Tensor};
use lowrank_optim::GlobalNormClip;
use lowrank_optim::{AdamWConfig, DctAdamWConfig};

#[derive(Module, Debug)]
struct Network {
    first: Linear,
    second: Linear,
    last: Linear,
}

impl Network {
    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(32, 128).init(device),
            second: LinearConfig::new(128, 128).init(device),
            last: LinearConfig::new(128, 4).init(device),
        }
    }

    fn loss(&self, x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
        let hidden = Relu::new().forward(self.first.forward(x));
        let hidden = Relu::new().forward(self.second.forward(hidden));
        (self.last.forward(hidden) - y).square().mean()
    }
}

fn train(name: &str, mut optimizer: ModuleOptimizer) -> anyhow::Result<()> {
    let device = Device::default().autodiff();
    device.seed(1);
    let mut network = Network::new(&device);
    let x = Tensor::<2>::random([256, 32], Distribution::Normal(0.0, 1.0), &device);
    let y = x.clone().narrow(1, 0, 4).sin() + x.clone().narrow(1, 4, 4);
    for step in 1..=300 {
        let loss = network.loss(x.clone(), y.clone());
        if step % 100 == 0 {
            println!("{name} step {step}: loss {:.5}", loss.clone().into_scalar::<f32>());
        }
        let grads = GradientsParams::from_grads(loss.backward(), &network);
        let grads = GlobalNormClip::new(Some(1.0)).apply(&network, grads)?.grads;
        network = optimizer.step(1e-3, network, grads);
    }
    println!("{name} state on disk: {} bytes", optimizer.into_bytes().map_err(|e| anyhow::anyhow!("{e}"))?.len());
    Ok(())
}

fn main() -> anyhow::Result<()> {
    train("AdamW", AdamWConfig::new().init())?;
    train("DCT-AdamW", DctAdamWConfig::new(32).with_error_levels(15).init())
}
