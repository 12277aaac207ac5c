//! Trains a small LLaMA with Burn's own `Learner`, with TensorBoard as the logger.
//!
//! ```text
//! cargo run --release --example burn_learner
//! tensorboard --logdir runs/learner
//! ```

use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher};
use burn::data::dataset::InMemDataset;
use burn::optim::AdamWConfig;
use burn::tensor::Device;
use burn::train::metric::LossMetric;
use burn::train::{Learner, SupervisedTraining};
use lowrank_models::{LanguageBatch, Llama, LlamaConfig, ids_tensor};
use lowrank_train::run::report::TensorBoardLogger;

/// Builds batches of text windows, one token per byte.
#[derive(Clone)]
struct Windows;

impl Batcher<Vec<u8>, LanguageBatch> for Windows {
    fn batch(&self, windows: Vec<Vec<u8>>, device: &Device) -> LanguageBatch {
        let ids = |shift: usize| -> Vec<i32> {
            windows
                .iter()
                .flat_map(|window| window[shift..window.len() - 1 + shift].iter().map(|byte| i32::from(*byte)))
                .collect()
        };
        LanguageBatch {
            inputs: ids_tensor(&ids(0), windows.len(), device),
            targets: ids_tensor(&ids(1), windows.len(), device),
            starts: None,
        }
    }
}

fn loader(text: &[u8], device: &Device) -> Arc<dyn DataLoader<LanguageBatch>> {
    let windows = text.chunks_exact(65).map(<[u8]>::to_vec).collect();
    DataLoaderBuilder::new(Windows)
        .batch_size(8)
        .shuffle(7)
        .set_device(device.clone())
        .build(InMemDataset::new(windows))
}

fn main() -> anyhow::Result<()> {
    let device = Device::default();
    let text = include_bytes!("burn_learner.rs").repeat(8);
    let (train, valid) = text.split_at(text.len() * 7 / 8);

    let config = LlamaConfig { num_hidden_layers: 2, ..LlamaConfig::named("llama-9m", 256)? };
    let model = Llama::random(&config, 1, &device.clone().autodiff())?;
    let result = SupervisedTraining::new("runs/learner", loader(train, &device), loader(valid, &device))
        .metrics((LossMetric::new(),))
        .with_metric_logger(TensorBoardLogger::new("runs/learner/tensorboard")?)
        .num_epochs(2)
        .summary()
        .launch(Learner::new(model, AdamWConfig::new().init(), 1e-3));
    println!("{}", result.model.config().parameters());
    Ok(())
}
