//! Common part of `lowrank pretrain` and `lowrank finetune`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::output::{print, table};
use crate::build::BuildError;
use crate::config::{Config, ConfigError, Job, Layers, bytes, count, duration};

use crate::plan::Freedom;
use crate::process::Peers;
use crate::run::report::{Console, EndedBy};
use crate::run::{Finished, Place, RunError, RunFolder, RunFolderError, Start, train};

/// Flags that decide how much memory a run takes, besides its methods.
#[derive(Debug, clap::Args)]
pub struct SizeArgs {
    /// File with settings (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, as section.key=value; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Sequences in a batch
    #[arg(long)]
    batch: Option<u32>,
    /// Tokens in a sequence
    #[arg(long)]
    seq_len: Option<u32>,
    /// Memory limit of the process, such as 8GiB, or auto for what is free; settings left unset are changed as little as possible to fit
    #[arg(long, value_name = "BYTES")]
    memory: Option<String>,
    /// cpu, or a GPU of a build with that feature, such as cuda:0
    #[arg(long)]
    device: Option<String>,
}

/// Flags of both.
#[derive(Debug, clap::Args)]
pub struct TrainingArgs {
    #[command(flatten)]
    sizes: SizeArgs,
    /// Optimizer, see `lowrank methods`
    #[arg(long)]
    optimizer: Option<String>,
    /// whole; checkpointed (less memory, more time); per-layer (each block is updated at once)
    #[arg(long, value_name = "MODE")]
    backward: Option<String>,
    /// Storage of trained weights: f32, bf16, bf16-kahan, 24bit or int8
    #[arg(long, value_name = "STORAGE")]
    weights: Option<String>,
    /// Steps of the run
    #[arg(long)]
    steps: Option<u32>,
    /// Times that all of the data is seen
    #[arg(long, allow_negative_numbers = true)]
    epochs: Option<f64>,
    /// Minutes after which the run ends; the learning rate follows them. 0 for no limit, which is what --steps and --epochs mean
    #[arg(long, allow_negative_numbers = true)]
    minutes: Option<f64>,
    /// Highest learning rate
    #[arg(long, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Seed of weights, order and samples
    #[arg(long)]
    seed: Option<u32>,
    /// Folder of the run; without it the next free one below runs/
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from the newest checkpoint in --out, or of the newest run below runs/; --data and --model may name new places of the same contents
    #[arg(long)]
    resume: bool,
    /// Go on from this checkpoint of the run, such as step-000100, and set the later ones aside
    #[arg(long, value_name = "CHECKPOINT")]
    resume_from: Option<String>,
    /// Replace the results of the run that --out holds
    #[arg(long, conflicts_with_all = ["resume", "resume_from"])]
    overwrite: bool,
    /// Show warnings and errors only
    #[arg(long)]
    quiet: bool,
}

/// Parent of the folders of runs without an explicit one.
const RUNS: &str = "runs";

impl SizeArgs {
    /// Layers of file, settings and flags in order of precedence.
    pub fn layers(&self) -> Result<Layers, ConfigError> {
        let mut layers = Layers::default();
        if let Some(path) = &self.config {
            layers.file(path)?;
        }
        for setting in &self.set {
            layers.set(setting)?;
        }
        let texts = [("--device", "train.device", &self.device), ("--memory", "train.memory", &self.memory)];
        for (flag, key, value) in texts {
            layers.optional(flag, key, value.as_deref());
        }
        for (flag, key, value) in [("--batch", "train.batch", self.batch), ("--seq-len", "train.seq_len", self.seq_len)]
        {
            layers.optional(flag, key, value);
        }
        Ok(layers)
    }
}

impl TrainingArgs {
    /// Layers of file, settings and flags in order of precedence.
    pub fn layers(&self) -> Result<Layers, ConfigError> {
        let mut layers = self.sizes.layers()?;
        let texts = [
            ("--optimizer", "optimizer.name", &self.optimizer),
            ("--backward", "train.backward", &self.backward),
            ("--weights", "weights.storage", &self.weights),
        ];
        for (flag, key, value) in texts {
            layers.optional(flag, key, value.as_deref());
        }
        for (flag, key, value) in [("--steps", "train.steps", self.steps), ("--seed", "train.seed", self.seed)] {
            layers.optional(flag, key, value);
        }
        let numbers = [
            ("--lr", "optimizer.lr", self.lr),
            ("--epochs", "train.epochs", self.epochs),
            ("--minutes", "train.minutes", self.minutes),
        ];
        for (flag, key, value) in numbers {
            layers.optional(flag, key, value);
        }
        Ok(layers)
    }

    fn start(&self) -> Start {
        match (self.resume, self.resume_from.clone()) {
            (_, Some(from)) => Start::Resume(Some(from)),
            (true, None) => Start::Resume(None),
            (false, None) if self.overwrite => Start::Overwrite,
            (false, None) => Start::New,
        }
    }

    /// Trains and prints the results. `name` is the name of a new folder; `adjust` changes the configuration of a new
    /// run.
    pub fn run(
        &self,
        job: Job,
        layers: Layers,
        name: impl Fn(&Config) -> String,
        adjust: impl FnOnce(&mut Config),
    ) -> anyhow::Result<ExitCode> {
        let start = self.start();
        let resumed = matches!(start, Start::Resume(_));
        let dir = self.out.clone().or_else(|| resumed.then(|| RunFolder::newest(Path::new(RUNS))).flatten());
        let base = match (&dir, resumed) {
            (Some(dir), true) => saved_config(dir, job)?,
            (None, true) => {
                return Err(BuildError::Settings(format!(
                    "there is no run below {RUNS}/ to resume; name one with --out"
                ))
                .into());
            }
            _ => Config::of(job),
        };
        let mut config = layers.resolve(&base).map_err(BuildError::from)?;
        // An explicit length of the run replaces that of the default job.
        let counted = ["train.steps", "train.tokens"].iter().any(|key| layers.has(key));
        if (counted || layers.has("train.epochs")) && !layers.has("train.minutes") {
            config.train.minutes = 0.0;
        }
        if counted && !layers.has("train.epochs") {
            config.train.epochs = 0.0;
        }
        if !resumed {
            adjust(&mut config);
        } else if let Some(path) = config.data.path.iter().find(|path| !path.exists()) {
            return Err(BuildError::Settings(format!(
                "data.path = {}: the data of the run is not here; --data names the new place of the same contents",
                path.display()
            ))
            .into());
        }
        let place = match dir {
            Some(dir) => Place::Folder(dir),
            None if !config.run.out.as_os_str().is_empty() => Place::Folder(config.run.out.clone()),
            None => Place::Next { parent: RUNS.into(), name: name(&config) },
        };
        let adapted = job == Job::Finetune && config.adapter.name != "none";
        let base = adapted.then(|| config.model.name.clone());
        let freedom = if resumed { Freedom::default() } else { Freedom::of(&layers, job) };
        let first = Peers::of_process().is_first();
        let console = if first { Console::new(self.quiet) } else { Console::silent() };
        let finished = train(config, freedom, &place, &start, console)?;
        if !self.quiet && first {
            print(&report(&finished, base.as_deref()))?;
        }
        Ok(match finished.signal {
            Some(signal) => {
                let folder = finished.folder.display();
                if first {
                    eprintln!("stopped; go on with `lowrank {} --resume --out {folder}`", job.name());
                }
                ExitCode::from(signal.exit_code() as u8)
            }
            None => ExitCode::SUCCESS,
        })
    }
}

/// Paths as strings.
pub fn texts(paths: &[PathBuf]) -> Vec<String> {
    paths.iter().map(|path| path.to_string_lossy().into_owned()).collect()
}

/// Last component of a path.
pub fn last_name(path: &str) -> Option<String> {
    Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned())
}

/// Configuration that a run was started with.
fn saved_config(dir: &Path, job: Job) -> Result<Config, RunError> {
    let path = dir.join("config.toml");
    if !path.exists() {
        return Err(RunFolderError::NoRun { path: dir.to_path_buf() }.into());
    }
    let mut layers = Layers::default();
    layers.file(&path).map_err(BuildError::from)?;
    Ok(layers.resolve(&Config::of(job)).map_err(BuildError::from)?)
}

/// Report of the results; `base` is the model that an adapter was trained on.
fn report(finished: &Finished, base: Option<&str>) -> String {
    let summary = &finished.summary;
    let mut text = String::new();
    for (title, sample) in [("Before training", &finished.before), ("After training", &finished.after)] {
        if let Some(sample) = sample {
            text.push_str(&format!("\n{title} the model writes:\n----\n{sample}\n----\n"));
        }
    }
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_string(), value]);
    if let Some(loss) = summary.final_validation_loss {
        let one = finished.unit.trim_end_matches('s');
        let perplexity = if summary.validation_accuracy.is_none() {
            format!(" (perplexity {:.1})", loss.exp())
        } else {
            String::new()
        };
        row("validation loss", format!("{loss:.4} nats a {one}{perplexity}"));
    }
    if let Some(accuracy) = summary.validation_accuracy {
        row("accuracy", format!("{:.2} % of what is held out", 100.0 * accuracy));
    }
    if let (Some(model), Some(gzip)) = (summary.validation_bits_per_byte, summary.gzip_bits_per_byte) {
        row("bits per byte", format!("{model:.3}, where gzip -9 needs {gzip:.3} for the same text"));
    }
    let planned = finished.planned.filter(|planned| *planned > summary.steps);
    let of = planned.map(|planned| format!(" of {}", count(planned))).unwrap_or_default();
    row(
        "steps",
        format!(
            "{}{of} with {} {} in {}",
            count(summary.steps),
            count(summary.tokens),
            finished.unit,
            duration(summary.seconds)
        ),
    );
    if summary.ended_by == Some(EndedBy::Clock) {
        row("ended by", "the clock (train.minutes); the learning rate followed it".into());
    }
    row("speed", format!("{} {} a second", count(summary.tokens_per_second as u64), finished.unit));
    let (weights, gradients, state) = (summary.weight_bytes, summary.gradient_bytes, summary.optimizer_state_bytes);
    row(
        "peak memory",
        format!(
            "{} (weights {}, gradients {}, optimizer {}{})",
            bytes(summary.peak_rss_bytes),
            bytes(weights),
            bytes(gradients),
            bytes(state),
            summary.activation_bytes.map(|kept| format!(", activations {}", bytes(kept))).unwrap_or_default()
        ),
    );
    row("logs", format!("{0}/metrics.jsonl; tensorboard --logdir {0}", finished.folder.display()));
    if let Some(checkpoint) = &summary.checkpoint {
        row("checkpoint", checkpoint.display().to_string());
        let model = match base {
            Some(base) => format!("{base} --adapter {}", checkpoint.display()),
            None => checkpoint.display().to_string(),
        };
        row("try it", format!("lowrank {}", finished.ask.replacen("MODEL", &format!("--model {model}"), 1)));
    }
    format!("{text}\n{}", table(&rows))
}
