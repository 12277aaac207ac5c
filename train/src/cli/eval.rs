//! `lowrank eval`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::anyhow;
use lowrank_models::hub::{ModelFolder, VisionFolder};

use super::eval_examples::{Score, Scored};
use super::eval_images::eval_images;
use super::on_model::{Adapters, Storage};
use super::output::{print, table};
use super::vision_folder::VisionOf;
use crate::build::{BuildError, Listener, held_out, prepare_options, source};
use crate::config::{Config, Job, Layers, count};
use crate::data::{Batches, ExampleOptions, Examples, Held, HeldOut, PrepareOptions, Rows, TokenizerChoice, prepare};
use crate::engine::{Evaluation, evaluate};
use crate::objective::{ModelLoss, TokenStream, epoch};
use crate::process::device;
use crate::recipe::{ModelText, check_vocabulary};
use crate::run::RunError;
use crate::run::report::Console;

/// Measure a model on text, or on examples, that it did not learn from.
///
/// Data that is named is measured whole; of conversations and of prompts with completions what counts in training is measured. Without --data, or
/// with --set data.validation_fraction=PART, the documents are measured that `pretrain` sets aside with the same data, fraction and seed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank eval --model runs/pretrain-001/checkpoints/step-001500
  lowrank eval --model SmolLM2-135M --data test/ --seq-len 512
  lowrank eval --model SmolLM2-135M --adapter runs/SmolLM2-135M-lora-001/checkpoints/step-000300 --data chats.jsonl
  lowrank eval --model SmolLM2-135M --examples test.jsonl --score exact --out scores.jsonl
  lowrank eval --model SmolLM2-135M --examples questions.jsonl --score likeliest
  lowrank eval --model vit-base --adapter runs/vit-base-lora-001/checkpoints/step-000300 --data photos/

Lines of --examples are those of `lowrank finetune`; for likeliest they are questions: {\"prompt\": .., \"choices\": [.., ..], \"answer\": 0}, or messages
in place of the prompt. The answer counts from 0, or is the text of a choice.")]
pub struct Args {
    /// Checkpoint or Hugging Face model folder, or GGUF file
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    adapters: Adapters,
    #[command(flatten)]
    storage: Storage,
    /// Text: a file or folder; may be repeated; without it the sources of the burn crates. Of a vision transformer its images
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// JSON lines to score one by one: a file or folder; may be repeated
    #[arg(long, value_name = "PATH", conflicts_with_all = ["data", "batch"])]
    examples: Vec<PathBuf>,
    /// Score of an example
    #[arg(long, value_enum, default_value_t = Score::Loss, requires = "examples")]
    score: Score,
    /// File for the scores of --examples, as JSON lines: one for each example, then one for each file; it must not exist yet
    #[arg(long, value_name = "FILE", requires = "examples")]
    out: Option<PathBuf>,
    /// Sequences in a batch
    #[arg(long, default_value_t = 8)]
    batch: u32,
    /// Tokens in a sequence; of text and of --data 256 where the model has as many positions, of --examples all that it has positions for
    #[arg(long)]
    seq_len: Option<u32>,
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
    let (config, held_out) = config(&args).map_err(BuildError::from)?;
    let device = device(&args.device).map_err(BuildError::from)?;
    if VisionFolder::is_one(&args.model).map_err(BuildError::from)? {
        if !args.examples.is_empty() || args.data.is_empty() || args.seq_len.is_some() {
            let problem =
                "--model is a vision transformer: give its images with --data, and none of --examples and --seq-len";
            return Err(BuildError::Settings(problem.into()).into());
        }
        let vision = VisionOf::open(&args.model)?;
        let batch = args.batch as usize;
        eval_images(&vision, &args.adapters, &config, batch, &device, Console::new(args.quiet))?;
        return Ok(ExitCode::SUCCESS);
    }
    let folder = ModelFolder::open(&args.model).map_err(BuildError::from)?;
    let (rows, positions) = (folder.config.llama.vocab_size, folder.config.llama.longest_sequence());
    let seq_len = match (args.seq_len, args.examples.is_empty()) {
        (Some(seq_len), _) => seq_len as usize,
        (None, true) => positions.min(256),
        (None, false) => positions,
    };
    if seq_len > positions {
        let problem = format!("--seq-len {seq_len} is longer than the model's {positions} positions; shorten it");
        return Err(BuildError::Settings(problem).into());
    }
    let load = || Ok::<_, anyhow::Error>(args.adapters.on(args.storage.load(&folder, &device)?)?);
    let mut console = Console::new(args.quiet);
    if !args.examples.is_empty() {
        let scored = Scored { paths: &args.examples, score: args.score, out: args.out.as_deref(), seq_len };
        let text = ModelText::read(&args.model, &folder.config)?;
        return scored.run(load, &text, &config, rows, &device, &mut console);
    }
    let mask = config.data.document_mask;
    let measure = |stream: TokenStream, total: u64, console: &mut Console| {
        let model = load()?;
        console.begin("evaluating", total);
        let found = evaluate(&model, &ModelLoss, epoch(&stream, &device), |found| {
            console.advance(found.tokens);
            true
        })
        .map_err(RunError::from)?;
        console.end();
        match found.nats.is_finite() {
            true => Ok(found),
            false => Err(anyhow!("the loss is {}: the weights are damaged or too large", found.nats)),
        }
    };
    let rows_of = |found: &Evaluation| {
        [
            vec!["tokens".into(), count(found.tokens)],
            vec!["loss".into(), format!("{:.4} nats a token", found.loss())],
            vec!["perplexity".into(), format!("{:.2}", found.perplexity())],
        ]
    };
    let source = source(&config);
    if !args.data.is_empty() && source.holds().map_err(BuildError::from)? != Held::Texts {
        let text = ModelText::read(&args.model, &folder.config)?;
        let end = text.end()?;
        console.begin("reading the examples", 0);
        let examples = Examples::read(&ExampleOptions {
            source: &source,
            held_out: &held_out,
            tokenizer: &text.tokenizer,
            template: text.template.as_ref(),
            end,
            vocab_size: rows,
            learn_prompt: config.data.learn_prompt,
            seq_len,
            length_key: "--seq-len",
            too_long: config.data.too_long,
            seed: config.train.seed,
            cache: &config.data.cache,
            fields: &[],
        })
        .map_err(BuildError::from)?;
        let mut message = count(examples.validation.len() as u64);
        for (number, what) in [(examples.truncated, "cut"), (examples.dropped, "left out")] {
            if number > 0 {
                message.push_str(&format!(", {} {what} for their length", count(number as u64)));
            }
        }
        let samples = Rows::new(examples.validation, args.batch as usize, end);
        let found = measure(TokenStream::new(samples, mask), 0, &mut console)?;
        print(&table(&[vec![vec!["examples".into(), message]], rows_of(&found).to_vec()].concat()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let tokenizer = TokenizerChoice::File(args.model.join("tokenizer.json"));
    let options = PrepareOptions { tokenizer, held_out, ..prepare_options(&config)? };
    console.begin("preparing the text", 0);
    let prepared = prepare(&options, &config.data.cache, &mut |_| ()).map_err(BuildError::from)?;
    if config.data.verify {
        prepared.validation.verify(&mut |_| ()).map_err(BuildError::from)?;
    }
    if let Some(warning) = check_vocabulary(prepared.tokenizer.vocab_size(), rows, &args.model)? {
        eprintln!("warning: {warning}");
        prepared.validation.check_ids(rows).map_err(BuildError::from)?;
    }
    let batches =
        Batches::validation(prepared.validation.clone(), args.batch as usize, seq_len).map_err(BuildError::from)?;
    let found = measure(TokenStream::new(batches, mask), prepared.validation.len(), &mut console)?;
    let bits = found.bits_per_byte(prepared.validation.text_bytes());
    let gzip = prepared.facts.gzip_bits_per_byte;
    let last = vec!["bits per byte".into(), format!("{bits:.3} (gzip -9: {gzip:.3})")];
    print(&table(&[rows_of(&found).to_vec(), vec![last]].concat()))?;
    Ok(ExitCode::SUCCESS)
}

/// Configuration, and the part of the data to measure.
fn config(args: &Args) -> Result<(Config, HeldOut), crate::config::ConfigError> {
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
    // Settings of examples are those of a fine-tuning.
    let job = if layers.keys().all(|key| Job::Pretrain.knows(key)) { Job::Pretrain } else { Job::Finetune };
    let config = layers.resolve(&Config::of(job))?;
    let whole =
        !args.data.is_empty() && !layers.has("data.validation_fraction") || config.data.validation_fraction == 1.0;
    let held_out = if whole { HeldOut::Everything } else { held_out(&config) };
    Ok((config, held_out))
}
