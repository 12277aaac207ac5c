//! A projector of your own: a Hadamard-like basis of signs that is never stored, in about 30 lines.
//!
//! ```text
//! cargo run --release --example own_projector
//! ```

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use lowrank_optim::{ProjectedConfig, Projector, Renewal, Residual, Subspace};

/// Columns of the Hadamard matrix, different ones at each renewal. Lengths must be powers of two.
#[derive(Debug)]
struct Hadamard;

impl Projector for Hadamard {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let (n, rank) = (renewal.side(), renewal.rank);
        assert!(n.is_power_of_two(), "the Hadamard matrix of {n} is not built here");
        let first = renewal.count as usize * rank;
        let scale = (n as f32).sqrt().recip();
        let entry = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { scale } else { -scale };
        let values: Vec<f32> = (0..n).flat_map(|i| (0..rank).map(move |j| entry(i, (first + j) % n))).collect();
        Subspace::Dense(Tensor::from_data(TensorData::new(values, [n, rank]), &renewal.gradient.device()))
    }
}

#[derive(Module, Debug)]
struct Model {
    layer: Linear,
}

fn main() -> anyhow::Result<()> {
    let device = Device::default().autodiff();
    device.seed(1);
    let mut model = Model { layer: LinearConfig::new(64, 128).with_bias(false).init(&device) };
    // The residual outside the 16 columns updates the weights by its sign, as in FRUGAL.
    let pieces =
        ProjectedConfig::new(16).with_update_proj_gap(20).with_residual(Residual::Sign).with_inactive_lr_scale(0.3);
    let mut optimizer = ModuleOptimizer::from(pieces.build_with(Hadamard)?);

    let x = Tensor::<2>::random([256, 64], Distribution::Normal(0.0, 1.0), &device);
    let y = x.clone().matmul(Tensor::random([64, 128], Distribution::Normal(0.0, 0.1), &device));
    for step in 1..=200 {
        let loss = (model.layer.forward(x.clone()) - y.clone()).square().mean();
        if step % 50 == 0 {
            println!("step {step}: loss {:.5}", loss.clone().into_scalar::<f32>());
        }
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, grads);
    }
    Ok(())
}
