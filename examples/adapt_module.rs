//! Fine-tunes a small network of Burn's own layers through an adapter, and merges it: the network itself does not change.
//!
//! ```text
//! cargo run --release --example adapt_module -- dora
//! ```

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Tensor};
use lowrank_models::adapter::{AdapterConfig, Attach, Targets};
use lowrank_optim::AdamWConfig;

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

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let hidden = Relu::new().forward(self.first.forward(x));
        let hidden = Relu::new().forward(self.second.forward(hidden));
        self.last.forward(hidden)
    }

    fn loss(&self, x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
        (self.forward(x) - y).square().mean()
    }
}

/// Steps of AdamW on whatever is not frozen.
fn train(mut network: Network, x: &Tensor<2>, y: &Tensor<2>, lr: f64) -> Network {
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    for step in 0..=200 {
        let loss = network.loss(x.clone(), y.clone());
        if step % 50 == 0 {
            println!("  step {step}: loss {:.5}", loss.clone().into_scalar::<f32>());
        }
        let grads = GradientsParams::from_grads(loss.backward(), &network);
        network = optimizer.step(lr, network, grads);
    }
    network
}

fn main() -> anyhow::Result<()> {
    let structure = std::env::args().nth(1).unwrap_or_else(|| "lora".into());
    let device = Device::default().autodiff();
    device.seed(1);
    let x = Tensor::<2>::random([256, 32], Distribution::Normal(0.0, 1.0), &device);
    let first_task = x.clone().narrow(1, 0, 4).sin();
    let second_task = first_task.clone() + x.clone().narrow(1, 4, 4).cos();

    println!("the whole network on a first task");
    let network = train(Network::new(&device), &x, &first_task, 1e-3);

    // Layers are chosen by name; everything else is frozen.
    let config = AdapterConfig::new(&structure).with_rank(4).with_targets(Targets::parse("first,second"));
    let (network, report) = Attach::new(config).to(network)?;
    println!("{report} of {}", network.num_params() - report.trained());
    println!("the adapter on a second task");
    let network = train(network, &x, &second_task, 1e-2);

    let adapted = network.loss(x.clone(), second_task.clone()).into_scalar::<f32>();
    report.control.switch(false);
    println!(
        "switched off, the first task again: loss {:.5}",
        network.loss(x.clone(), first_task).into_scalar::<f32>()
    );
    report.control.switch(true);
    // Dense weights with the adapter inside, at the cost of the plain network.
    let merged = network.materialize();
    println!("merged: loss {:.5}, before merging {adapted:.5}", merged.loss(x, second_task).into_scalar::<f32>());
    Ok(())
}
