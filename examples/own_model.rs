//! A model of your own in the training engine: blocks are updated one by one, so that only one block's gradients exist at a time.
//!
//! ```text
//! cargo run --release --example own_model
//! ```

use burn::module::{Module, ModuleVisitor};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Distribution, Tensor};
use lowrank_models::{Rows, Segment, SegmentedModel};
use lowrank_optim::{AdamWConfig, Hooks};
use lowrank_train::data::DataError;
use lowrank_train::engine::{BackwardMode, Schedule, Trainer, TrainerOptions};
use lowrank_train::objective::{Stream, StreamBatch, Streams};

/// A residual network on vectors.
#[derive(Module, Debug)]
struct Network {
    entry: Linear,
    blocks: Vec<Linear>,
    head: Linear,
}

/// Vectors `x [rows, 6]` and their target numbers `y [rows, 1]`.
#[derive(Clone)]
struct Pairs {
    x: Tensor<2>,
    y: Tensor<2>,
}

impl Rows for Pairs {
    fn rows(&self) -> usize {
        self.x.dims()[0]
    }

    fn narrow(&self, start: usize, count: usize) -> Self {
        Self { x: self.x.clone().narrow(0, start, count), y: self.y.clone().narrow(0, start, count) }
    }
}

impl SegmentedModel for Network {
    type Batch = Pairs;
    type Hidden = Tensor<2>;
    type Context = ();

    fn context(&self, _: &Pairs) {}

    fn enter(&self, batch: &Pairs, _: &()) -> Tensor<2> {
        self.entry.forward(batch.x.clone())
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, number: usize, x: Tensor<2>, _: &()) -> Tensor<2> {
        x.clone() + relu(self.blocks[number].forward(x))
    }

    fn loss(&self, x: Tensor<2>, batch: &Pairs) -> Tensor<1> {
        (self.head.forward(x) - batch.y.clone()).square().sum()
    }

    fn counted(batch: &Pairs) -> u64 {
        batch.rows() as u64
    }

    fn visit_segment<V: ModuleVisitor>(&self, segment: Segment, visitor: &mut V) {
        match segment {
            Segment::Entry => self.entry.visit(visitor),
            Segment::Block(number) => self.blocks[number].visit(visitor),
            Segment::Head => self.head.visit(visitor),
        }
    }
}

/// Endless stream of random vectors.
struct Vectors;

impl Stream<Pairs> for Vectors {
    fn batch(&self) -> usize {
        32
    }

    fn rows(&self) -> u64 {
        32
    }

    fn at(&self, _position: u64, device: &Device) -> Result<StreamBatch<Pairs>, DataError> {
        let x = Tensor::random([32, 6], Distribution::Normal(0.0, 1.0), device);
        let batch = Pairs { y: x.clone().sum_dim(1).abs(), x };
        Ok(StreamBatch { counted: 32, batch, tags: Vec::new() })
    }
}

/// Losses of the first steps.
fn losses(steps: usize) -> anyhow::Result<Vec<f64>> {
    let device = Device::default().autodiff();
    device.seed(5);
    let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).init(&device);
    let blocks = (0..3).map(|_| layer(32, 32)).collect();
    let model = Network { entry: layer(6, 32), blocks, head: layer(32, 1) };
    let options = TrainerOptions { backward: BackwardMode::PerLayer, ..TrainerOptions::new(Schedule::constant(3e-3)) };
    let mut trainer = Trainer::new(model, AdamWConfig::new().init(), Hooks::new(), options);
    let streams = Streams::one(&Vectors);
    (0..steps).map(|_| Ok(trainer.step(&streams, &mut |_, _| ())?.loss)).collect()
}

fn main() -> anyhow::Result<()> {
    let losses = losses(300)?;
    println!("loss {:.3} at first, {:.3} after {} steps", losses[0], losses[losses.len() - 1], losses.len());
    Ok(())
}

#[test]
fn it_learns() {
    let losses = losses(100).expect("steps");
    assert!(losses[99] < 0.3 * losses[0], "{} to {}", losses[0], losses[99]);
}
