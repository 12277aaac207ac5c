//! `lowrank pretrain`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{print, table};
use crate::config::{Config, Layers};
use crate::job::{Finished, JobError, Pretrain};
use crate::run::{RunFolder, Screen, bytes, count, duration};

/// Train a LLaMA-style model on text.
///
/// Without options it learns from the Rust sources of the burn crates that Cargo downloaded, for at most ten minutes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank pretrain
  lowrank pretrain --data books/ --model llama-20m --steps 5000 --out runs/books
  lowrank pretrain --data stories.jsonl --set data.field=story --set tokenizer.vocab_size=8192
  lowrank pretrain --resume --out runs/books
  lowrank pretrain --parameterization relora --model runs/books/checkpoints/step-005000
  lowrank pretrain --config run.toml --set optimizer.beta_2=0.99

Flags win over --set, --set over the file of --config, the file over the defaults. docs/configuration.md lists all keys.
Ctrl-C finishes the step, saves and exits; --resume goes on with the same bits as if nothing had happened.")]
pub struct Args {
    /// File with settings (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, as section.key=value; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Named shape such as llama-9m, or a Hugging Face model folder to go on from
    #[arg(long)]
    model: Option<String>,
    /// What the linear layers hold: dense, low_rank, sltrain, cola, lost, relora, loro; see `lowrank methods`
    #[arg(long, value_name = "NAME")]
    parameterization: Option<String>,
    /// Text: a file or folder; may be repeated
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// tokenizer.json, or `bytes`; without it one is trained on the data
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<String>,
    /// Optimizer, see `lowrank methods`
    #[arg(long)]
    optimizer: Option<String>,
    /// whole; checkpointed (less memory, more time); per-layer (each block is updated at once)
    #[arg(long, value_name = "MODE")]
    backward: Option<String>,
    /// Steps of the run
    #[arg(long)]
    steps: Option<u32>,
    /// Minutes after which the run ends in any case; 0 for no limit
    #[arg(long, allow_negative_numbers = true)]
    minutes: Option<f64>,
    /// Sequences in a batch
    #[arg(long)]
    batch: Option<u32>,
    /// Tokens in a sequence
    #[arg(long)]
    seq_len: Option<u32>,
    /// Highest learning rate
    #[arg(long, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Seed of weights, order and samples
    #[arg(long)]
    seed: Option<u32>,
    /// Folder of the run; without it the next free one below runs/
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the newest good checkpoint in --out, or of the newest run below runs/
    #[arg(long)]
    resume: bool,
    /// cpu, or a GPU of a build with that feature, such as cuda:0
    #[arg(long)]
    device: Option<String>,
    /// Show warnings and errors only
    #[arg(long)]
    quiet: bool,
}

/// Where runs go that were given no folder.
const RUNS: &str = "runs";

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let layers = layers(&args).map_err(JobError::from)?;
    let dir = args.out.clone().or_else(|| args.resume.then(|| RunFolder::newest(Path::new(RUNS))).flatten());
    let base = match (&dir, args.resume) {
        (Some(dir), true) => saved_config(dir)?,
        (None, true) => {
            return Err(
                JobError::Settings(format!("there is no run below {RUNS}/ to resume; name one with --out")).into()
            );
        }
        _ => Config::default(),
    };
    let mut config = layers.resolve(&base).map_err(JobError::from)?;
    let dir = match dir {
        Some(dir) => dir,
        None if !config.run.out.as_os_str().is_empty() => config.run.out.clone(),
        None => {
            let name = Path::new(&config.model.name).file_name().map(|name| name.to_string_lossy().into_owned());
            RunFolder::next_free(Path::new(RUNS), &name.unwrap_or_else(|| "pretrain".into()))
        }
    };
    config.run.out = dir.clone();
    let finished = Pretrain::new(config, &dir, args.resume, Screen::new(args.quiet))?.run()?;
    if !args.quiet {
        print(&report(&finished))?;
    }
    Ok(match finished.signal {
        Some(signal) => {
            eprintln!("stopped; go on with `lowrank pretrain --resume --out {}`", finished.folder.display());
            ExitCode::from(signal.exit_code() as u8)
        }
        None => ExitCode::SUCCESS,
    })
}

fn layers(args: &Args) -> Result<Layers, crate::config::ConfigError> {
    let mut layers = Layers::default();
    if let Some(path) = &args.config {
        layers.file(path)?;
    }
    for setting in &args.set {
        layers.set(setting)?;
    }
    let text = |path: &Path| path.to_string_lossy().into_owned();
    if let Some(model) = &args.model {
        layers.flag("--model", "model.name", model.as_str());
    }
    if let Some(name) = &args.parameterization {
        layers.flag("--parameterization", "model.parameterization", name.as_str());
    }
    if !args.data.is_empty() {
        layers.flag("--data", "data.path", args.data.iter().map(|path| text(path)).collect::<Vec<_>>());
    }
    if let Some(tokenizer) = &args.tokenizer {
        layers.flag("--tokenizer", "tokenizer.path", tokenizer.as_str());
    }
    if let Some(optimizer) = &args.optimizer {
        layers.flag("--optimizer", "optimizer.name", optimizer.as_str());
    }
    if let Some(device) = &args.device {
        layers.flag("--device", "train.device", device.as_str());
    }
    if let Some(mode) = &args.backward {
        layers.flag("--backward", "train.backward", mode.as_str());
    }
    let counts = [
        ("--steps", "train.steps", args.steps),
        ("--batch", "train.batch", args.batch),
        ("--seq-len", "train.seq_len", args.seq_len),
        ("--seed", "train.seed", args.seed),
    ];
    for (flag, key, value) in counts {
        if let Some(value) = value {
            layers.flag(flag, key, value);
        }
    }
    for (flag, key, value) in [("--lr", "optimizer.lr", args.lr), ("--minutes", "train.minutes", args.minutes)] {
        if let Some(value) = value {
            layers.flag(flag, key, value);
        }
    }
    Ok(layers)
}

/// The configuration that a run was begun with.
fn saved_config(dir: &Path) -> Result<Config, JobError> {
    let path = dir.join("config.toml");
    if !path.exists() {
        return Err(crate::run::RunFolderError::NoRun { path: dir.to_path_buf() }.into());
    }
    let mut layers = Layers::default();
    layers.file(&path)?;
    Ok(layers.resolve(&Config::default())?)
}

fn report(finished: &Finished) -> String {
    let summary = &finished.summary;
    let mut text = String::new();
    for (title, sample) in [("Before training", &finished.before), ("After training", &finished.after)] {
        if let Some(sample) = sample {
            text.push_str(&format!("\n{title} the model writes:\n----\n{sample}\n----\n"));
        }
    }
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_string(), value]);
    if let Some(loss) = summary.validation_loss {
        row("validation loss", format!("{loss:.4} nats a token (perplexity {:.1})", loss.exp()));
    }
    if let (Some(model), Some(gzip)) = (summary.validation_bits_per_byte, summary.gzip_bits_per_byte) {
        row("bits per byte", format!("{model:.3}, where gzip -9 needs {gzip:.3} for the same text"));
    }
    row(
        "steps",
        format!("{} with {} tokens in {}", count(summary.steps), count(summary.tokens), duration(summary.seconds)),
    );
    row("speed", format!("{} tokens a second", count(summary.tokens_per_second as u64)));
    let (weights, gradients, state) = (summary.weight_bytes, summary.gradient_bytes, summary.optimizer_state_bytes);
    row(
        "peak memory",
        format!(
            "{} (weights {}, gradients {}, optimizer {})",
            bytes(summary.peak_rss_bytes),
            bytes(weights),
            bytes(gradients),
            bytes(state)
        ),
    );
    row("logs", format!("{0}/metrics.jsonl; tensorboard --logdir {0}", finished.folder.display()));
    if let Some(checkpoint) = &summary.checkpoint {
        row("checkpoint", checkpoint.display().to_string());
        row("try it", format!("lowrank generate --model {} --prompt \"fn main() {{\"", checkpoint.display()));
    }
    format!("{text}\n{}", table(&rows))
}
