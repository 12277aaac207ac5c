//! `lowrank adapters`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use burn::optim::GradientsParams;
use burn::tensor::Device;
use lowrank_models::adapter::{
    AdapterConfig, Attach, PenaltyAt, Rank, STRUCTURES, StepOf, Targets, add_after_clipping, drop_frozen,
    frozen_this_step, penalty,
};
use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::gguf::is_gguf;
use lowrank_models::{Llama, LlamaConfig, ModelError, ids_tensor};
use lowrank_optim::AdamWConfig;

use super::output::{print, table};
use crate::build::BuildError;
use crate::config::{bytes, count};
use crate::process::{device, set_threads};

/// Measure the adapter structures on a model: values trained, bytes stored beside them, time of a training step.
///
/// Every structure is attached to the chosen layers with its own defaults and trains some steps with AdamW on random tokens; the time is the median.
/// The first line, without an adapter, trains all weights.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank adapters --model llama-60m
  lowrank adapters --model SmolLM2-135M --batch 2 --steps 3
  lowrank adapters --model llama-9m --only lora --only dora --rank 16")]
pub struct Args {
    /// Named shape, initialised at random, or a Hugging Face model folder
    #[arg(long, default_value = "llama-60m")]
    model: String,
    /// Vocabulary of a named shape
    #[arg(long, default_value_t = 8192)]
    vocab_size: usize,
    /// Structures to measure; all when none is named
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Rank, for structures that have one; each one's own when not given
    #[arg(long)]
    rank: Option<usize>,
    /// Layers: all-linear, names between commas, or a regular expression
    #[arg(long, default_value = "all-linear")]
    targets: String,
    /// Sequences in a batch
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    /// Steps that are timed, after one that is not
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// CPU threads; 0 for one a core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// cpu, or a GPU of a build with that feature
    #[arg(long, default_value = "cpu")]
    device: String,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    set_threads(args.threads);
    for (name, value) in [("batch", args.batch), ("seq-len", args.seq_len), ("steps", args.steps)] {
        if value == 0 {
            return Err(BuildError::Settings(format!("--{name} is 0; it must be at least 1")).into());
        }
    }
    let names: Vec<&str> = match args.only.is_empty() {
        true => STRUCTURES.iter().map(|entry| entry.spec.name).collect(),
        false => args.only.iter().map(String::as_str).collect(),
    };
    let device = device(&args.device).map_err(BuildError::from)?.autodiff();
    let model = model(&args, &device)?;
    let head = ["STRUCTURE", "TRAINED", "FROZEN BYTES", "INIT TIME", "STEP", "DENSE UPDATE", "MERGES"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let full = steps(&args, model.clone())?;
    let all = model.config().parameters() as u64;
    rows.push(["(all weights)", &count(all), "", "", &milliseconds(full), "", ""].map(String::from).to_vec());
    for name in names {
        rows.push(row(&args, name, model.clone())?);
        eprintln!("{}", rows[rows.len() - 1].join("  "));
    }
    print(&table(&rows))?;
    Ok(ExitCode::SUCCESS)
}

fn model(args: &Args, device: &Device) -> Result<Llama, BuildError> {
    let folder = Path::new(&args.model);
    if folder.join("config.json").exists() || is_gguf(folder) {
        return Ok(ModelFolder::open(folder)?.load(device)?);
    }
    Ok(Llama::random(&LlamaConfig::named(&args.model, args.vocab_size)?, 0, device)?)
}

/// Row of a structure; contains the reason if the structure does not support one of the layers.
fn row(args: &Args, name: &str, model: Llama) -> Result<Vec<String>, BuildError> {
    let config = AdapterConfig::new(name).with_targets(Targets::parse(&args.targets));
    let spec = config.entry().map_err(ModelError::from)?.spec;
    let ranked = spec.rank != Rank::None;
    let config = AdapterConfig { rank: args.rank.filter(|_| ranked), ..config };
    let begin = Instant::now();
    let (model, report) = match model.attach(Attach::new(config)) {
        Ok(attached) => attached,
        Err(error) => return Ok(vec![name.into(), format!("- {error}")]),
    };
    let begun = begin.elapsed().as_secs_f64();
    let step = steps(args, model)?;
    Ok(vec![
        name.into(),
        count(report.trained() as u64),
        bytes(report.frozen_bytes()),
        format!("{begun:.1} s"),
        milliseconds(step),
        if spec.dense_forward { "yes" } else { "no" }.into(),
        spec.merges.map_or("no", |()| "yes").into(),
    ])
}

/// Trains some steps and returns their median duration in seconds.
fn steps(args: &Args, mut model: Llama) -> Result<f64, BuildError> {
    let mut optimizer = AdamWConfig::new().init();
    let plain = model.model.norm.weight.val().device().inner();
    let vocabulary = model.config().vocab_size;
    let tokens = |shift: usize| -> Vec<i32> {
        (0..args.batch * args.seq_len).map(|i| ((i * 7919 + shift) % vocabulary) as i32).collect()
    };
    let mut seconds = Vec::new();
    for step in 0..args.steps + 1 {
        let begin = Instant::now();
        let (inputs, targets) = (tokens(step), tokens(step + 7919));
        let (inputs, targets) = (ids_tensor(&inputs, args.batch, &plain), ids_tensor(&targets, args.batch, &plain));
        let mut loss = model.loss_sum(inputs, targets, None).div_scalar((args.batch * args.seq_len) as f64);
        if let Some(penalty) = penalty(&model, PenaltyAt::Loss) {
            loss = loss + penalty;
        }
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        let grads = add_after_clipping(&model, grads, 1e-4).map_err(ModelError::from)?;
        let grads = drop_frozen(&model, grads, &frozen_this_step(&model, StepOf { step: step as u64, total: None }));
        model = optimizer.step(1e-4, model, grads);
        seconds.push(begin.elapsed().as_secs_f64());
    }
    // The first step creates the optimizer's state.
    let mut timed = seconds.split_off(1);
    timed.sort_by(f64::total_cmp);
    Ok(timed[timed.len() / 2])
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.0} ms", seconds * 1e3)
}
