//! `lowrank eval`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::hub::ModelFolder;

use super::on_model::Adapters;
use super::output::{print, table};
use crate::build::{BuildError, Listener, prepare_options};
use crate::config::{Config, Layers, count};
use crate::data::{Batches, PrepareOptions, TokenizerChoice, prepare};
use crate::engine::evaluate;
use crate::objective::{ModelLoss, TokenStream, epoch};
use crate::process::device;
use crate::run::RunError;
use crate::run::report::Screen;

/// Measure a model on text that it did not learn from.
///
/// The held-out documents are the same that `pretrain` sets aside with the same data, fraction and seed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank eval --model runs/pretrain-001/checkpoints/step-001500
  lowrank eval --model SmolLM2-135M --data books/ --seq-len 512")]
pub struct Args {
    /// Checkpoint or Hugging Face model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    adapters: Adapters,
    /// Text: a file or folder; may be repeated; without it the sources of the burn crates
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Sequences in a batch
    #[arg(long, default_value_t = 8)]
    batch: u32,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    seq_len: u32,
    /// Seed with which documents were set aside
    #[arg(long)]
    seed: Option<u32>,
    /// A setting of the data section, as section.key=value; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// cpu, or a GPU of a build with that feature
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Show warnings and errors only
    #[arg(long)]
    quiet: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = config(&args).map_err(BuildError::from)?;
    let device = device(&args.device).map_err(BuildError::from)?;
    let folder = ModelFolder::open(&args.model).map_err(BuildError::from)?;
    let options = PrepareOptions {
        tokenizer: TokenizerChoice::File(args.model.join("tokenizer.json")),
        ..prepare_options(&config)?
    };
    let mut screen = Screen::new(args.quiet);
    screen.begin("preparing the text", 0);
    let prepared = prepare(&options, &config.data.cache, &mut |_| ()).map_err(BuildError::from)?;
    if config.data.verify {
        prepared.validation.verify(&mut |_| ()).map_err(BuildError::from)?;
    }
    let model = args.adapters.on(folder.load(&device).map_err(BuildError::from)?)?;
    if prepared.tokenizer.vocab_size() > model.config().vocab_size {
        return Err(
            BuildError::Settings("the tokens of this data are of another tokenizer than the model's".into()).into()
        );
    }
    let (batch, seq_len) = (args.batch as usize, args.seq_len as usize);
    let batches = Batches::validation(prepared.validation.clone(), batch, seq_len).map_err(BuildError::from)?;
    screen.begin("evaluating", prepared.validation.len());
    let stream = TokenStream::new(batches, config.data.document_mask);
    let found = evaluate(&model, &ModelLoss, epoch(&stream, &device), |found| {
        screen.advance(found.tokens);
        true
    })
    .map_err(RunError::from)?;
    screen.end();
    let bits = found.bits_per_byte(prepared.validation.text_bytes());
    print(&table(&[
        vec!["tokens".into(), count(found.tokens)],
        vec!["loss".into(), format!("{:.4} nats a token", found.loss())],
        vec!["perplexity".into(), format!("{:.2}", found.perplexity())],
        vec!["bits per byte".into(), format!("{bits:.3} (gzip -9: {:.3})", prepared.facts.gzip_bits_per_byte)],
    ]))?;
    Ok(ExitCode::SUCCESS)
}

fn config(args: &Args) -> Result<Config, crate::config::ConfigError> {
    let mut layers = Layers::default();
    for setting in &args.set {
        layers.set(setting)?;
    }
    if !args.data.is_empty() {
        let paths = args.data.iter().map(|path| path.to_string_lossy().into_owned()).collect::<Vec<_>>();
        layers.flag("--data", "data.path", paths);
    }
    if let Some(seed) = args.seed {
        layers.flag("--seed", "train.seed", seed);
    }
    layers.resolve(&Config::default())
}
