//! Fine-tunes a small network of Burn's own layers with an adapter and merges it; the network's code does not change.
//!
//! ```text
//! cargo run --release --example adapt_module -- dora
//! ```

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Tensor};
use lowrank_models::adapter::{AdapterConfig, Attach, Targets, merged};
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

/// Runs steps of AdamW on all parameters that are not frozen.
fn train(mut network: Network, x: &Tensor<2>, y: &Tensor<2>, lr: f64, steps: usize) -> Network {
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    for step in 0..=steps {
        let loss = network.loss(x.clone(), y.clone());
        if step % 50 == 0 {
            println!("  step {step}: loss {:.5}", loss.clone().into_scalar::<f32>());
        }
        let grads = GradientsParams::from_grads(loss.backward(), &network);
        network = optimizer.step(lr, network, grads);
    }
    network
}

/// Losses during training.
struct Losses {
    first_task: f32,
    adapted: f32,
    switched_off: f32,
    merged: f32,
}

fn adapt(structure: &str, steps: usize) -> anyhow::Result<Losses> {
    let device = Device::default().autodiff();
    device.seed(1);
    let x = Tensor::<2>::random([256, 32], Distribution::Normal(0.0, 1.0), &device);
    let first_task = x.clone().narrow(1, 0, 4).sin();
    let second_task = first_task.clone() + x.clone().narrow(1, 4, 4).cos();

    println!("the whole network on a first task");
    let network = train(Network::new(&device), &x, &first_task, 1e-3, steps);
    let loss = |network: &Network, y: &Tensor<2>| network.loss(x.clone(), y.clone()).into_scalar::<f32>();
    let first = loss(&network, &first_task);

    // Layers are chosen by name; everything else is frozen.
    let config = AdapterConfig::new(structure).with_rank(4).with_targets(Targets::parse("first,second"));
    let (network, report) = Attach::new(config).to(network)?;
    println!("{report} of {}", network.num_params() - report.trained());
    println!("the adapter on a second task");
    let network = train(network, &x, &second_task, 1e-2, steps);

    let adapted = loss(&network, &second_task);
    report.control.switch(false);
    let switched_off = loss(&network, &first_task);
    report.control.switch(true);
    // Dense weights with the adapter inside, at the cost of the plain network.
    let network = merged(network)?;
    Ok(Losses { first_task: first, adapted, switched_off, merged: loss(&network, &second_task) })
}

fn main() -> anyhow::Result<()> {
    let structure = std::env::args().nth(1).unwrap_or_else(|| "lora".into());
    let Losses { first_task, adapted, switched_off, merged } = adapt(&structure, 200)?;
    println!("switched off, the first task again: loss {switched_off:.5}, before the adapter {first_task:.5}");
    println!("merged: loss {merged:.5}, before merging {adapted:.5}");
    Ok(())
}

#[test]
fn adapters_leave_the_network_and_merge() {
    for structure in ["lora", "dora"] {
        let [short, long] = [1, 50].map(|steps| adapt(structure, steps).expect("an adapter"));
        assert!(long.adapted < 0.9 * short.adapted, "{structure}: {} to {}", short.adapted, long.adapted);
        assert_eq!(long.switched_off, long.first_task, "{structure}");
        assert!((long.merged - long.adapted).abs() < 1e-4 * long.adapted, "{structure}: {}", long.merged);
    }
}
