//! `lowrank inspect`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lowrank_models::adapter::compose::Source;
use lowrank_models::hub::compose::PoolFolder;
use lowrank_models::hub::gguf::GgufFile;
use lowrank_models::hub::peft::PeftFolder;
use lowrank_models::hub::{HubConfig, TensorFiles, VisionFolder};

use super::output::{print, table};
use crate::build::BuildError;
use crate::config::{bytes, count};
use crate::run::RunError;
use crate::run::checkpoint::{Manifest, TrainerState, verify};

/// Show what a checkpoint, model, adapter or pool folder holds: configuration, tensors, sizes, step. Hashes of a checkpoint or pool are checked.
///
/// Of an adapter whose update follows from its files alone, each layer is shown with its sides, rank, scale and the norm of its update.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank inspect runs/pretrain-001/checkpoints/step-001500
  lowrank inspect SmolLM2-135M
  lowrank inspect runs/SmolLM2-135M-lora-001/checkpoints/step-000300")]
pub struct Args {
    /// Checkpoint, Hugging Face model folder, adapter folder, pool or GGUF file
    dir: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.dir.is_file() {
        print(&gguf(&args.dir)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let is_adapter = args.dir.join("adapter_config.json").exists() && !args.dir.join("config.json").exists();
    let text = match is_adapter {
        true => adapter(&args.dir)?,
        false if PoolFolder::is_pool(&args.dir) => pool(&args.dir)?,
        false => model(&args)?,
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Metadata and tensors of a GGUF file.
fn gguf(path: &Path) -> anyhow::Result<String> {
    let file = GgufFile::open(path).map_err(BuildError::from)?;
    let keys: Vec<Vec<String>> = file.metadata().map(|(key, value)| vec![format!("  {key}"), value]).collect();
    let (mut values, mut size) = (0, 0);
    let mut rows = Vec::new();
    for (name, shape, kind) in file.tensors() {
        let count_of = shape.iter().product::<usize>() as u64;
        values += count_of;
        size += file.bytes(name).map_err(BuildError::from)?.1.len() as u64;
        rows.push(vec![format!("  {name}"), format!("{shape:?}"), kind.name().into(), count(count_of)]);
    }
    let sums = format!("{} values in {} tensors, {}\n", count(values), rows.len(), bytes(size));
    Ok(format!("metadata\n{}tensors\n{}{sums}", table(&keys), table(&rows)))
}

/// Manifest of a checkpoint whose files are all unchanged; none for other folders.
fn checked(dir: &Path) -> Result<Option<Manifest>, RunError> {
    let is_checkpoint = ["manifest.json", "trainer.json"].iter().any(|name| dir.join(name).exists());
    is_checkpoint.then(|| verify(dir)).transpose().map_err(RunError::Damaged)
}

fn adapter(dir: &Path) -> anyhow::Result<String> {
    let saved = checked(dir)?;
    let folder = PeftFolder::open(dir).map_err(BuildError::from)?;
    let config = &folder.config;
    let entry = config.entry().map_err(BuildError::from)?;
    let spec = entry.spec;
    let or_own = |value: Option<String>| value.unwrap_or_else(|| "the method's own".into());
    let mut rows = vec![
        vec!["adapter".into(), format!("{}: {} ({})", spec.name, spec.title, entry.entry.papers[0].cited())],
        vec!["base model".into(), folder.base_model.clone().unwrap_or_else(|| "not named".into())],
        vec!["targets".into(), config.targets.to_string()],
        vec!["rank".into(), or_own(config.rank.map(|rank| rank.to_string()))],
        vec!["alpha".into(), or_own(config.alpha.map(|alpha| alpha.to_string()))],
        vec!["dropout".into(), config.dropout.to_string()],
        vec!["start".into(), config.init.clone()],
    ];
    rows.extend(config.rank_pattern.iter().map(|(name, rank)| vec!["rank of".into(), format!("{name}: {rank}")]));
    rows.extend(config.alpha_pattern.iter().map(|(name, alpha)| vec!["alpha of".into(), format!("{name}: {alpha}")]));
    rows.extend(config.options.iter().map(|(name, value)| vec![name.clone(), value.to_string()]));
    rows.extend(
        saved.map(|saved| vec!["checkpoint".into(), format!("{} files, all as they were saved", saved.files.len())]),
    );
    rows.extend(folder.warnings.iter().map(|warning| vec!["warning".into(), warning.clone()]));
    let tensors = listed(folder.shapes());
    let layers = match folder.factors() {
        Ok(layers) => layers.collect::<Result<Vec<_>, _>>(),
        Err(error) => Err(error),
    };
    let layers = match layers {
        Ok(layers) => {
            let mut rows =
                vec![["layers", "INPUTS", "OUTPUTS", "RANK", "SCALE", "NORM OF THE UPDATE"].map(String::from).to_vec()];
            for layer in layers {
                let scale = layer.factors.scale;
                let source = Source::of("adapter", layer.factors, None);
                let [d_in, d_out] = [source.a.ncols(), source.b.nrows()].map(|side| side.to_string());
                let (rank, norm) = (source.rank().to_string(), format!("{:.4}", source.norm()));
                rows.push(vec![format!("  {}", layer.path), d_in, d_out, rank, scale.to_string(), norm]);
            }
            table(&rows)
        }
        Err(error) => format!("updates need the model: {error}\n"),
    };
    Ok(table(&rows) + &layers + &tensors)
}

fn pool(dir: &Path) -> anyhow::Result<String> {
    let pool = PoolFolder::open(dir).map_err(BuildError::from)?;
    let settings = pool.settings();
    let mut rows = vec![
        vec!["pool".into(), format!("{} of {} adapters", settings.method, settings.names.len())],
        vec!["adapters".into(), settings.names.join(", ")],
        vec!["base model".into(), settings.plain.base_model.unwrap_or_else(|| "not named".into())],
        vec!["size".into(), bytes(pool.bytes())],
    ];
    let separate: u64 = pool
        .layers()
        .map(|(_, [d_in, d_out], rank, _)| 4 * ((d_in + d_out) * rank * settings.names.len()) as u64)
        .sum();
    rows.push(vec!["the adapters alone".into(), bytes(separate)]);
    let mut layers = vec![["layers", "INPUTS", "OUTPUTS", "RANK", "DIRECTIONS"].map(String::from).to_vec()];
    layers.extend(pool.layers().map(|(path, [d_in, d_out], rank, p)| {
        let numbers = [d_in, d_out, rank, p].map(|number| number.to_string());
        std::iter::once(format!("  {path}")).chain(numbers).collect()
    }));
    Ok(table(&rows) + &table(&layers))
}

fn model(args: &Args) -> anyhow::Result<String> {
    let tensors = TensorFiles::open(&args.dir).map_err(BuildError::from)?;
    let config = match VisionFolder::is_one(&args.dir).map_err(BuildError::from)? {
        true => VisionFolder::open(&args.dir).map_err(BuildError::from)?.config.to_json(tensors.types().usual()),
        false => {
            let config = HubConfig::read(&args.dir.join("config.json")).map_err(BuildError::from)?;
            config.to_json(tensors.types().usual())
        }
    };
    let mut text = String::new();
    if let Some(manifest) = checked(&args.dir)? {
        let state = TrainerState::read(&args.dir).map_err(RunError::Damaged)?;
        let size: u64 = manifest.files.values().map(|file| file.size).sum();
        let loss = |loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{loss:.4}"));
        text.push_str(&table(&[
            vec![
                "checkpoint".into(),
                format!(
                    "step {}, {} tokens, {} files with {}, all as they were saved",
                    count(state.step),
                    count(state.tokens),
                    manifest.files.len(),
                    bytes(size)
                ),
            ],
            vec![
                "losses".into(),
                format!(
                    "train {}, validation {}, best validation {}",
                    loss(state.train_loss),
                    loss(state.validation_loss),
                    loss(state.best_validation_loss)
                ),
            ],
            vec!["optimizer".into(), format!("{} tensors", state.optimizer_tensors)],
        ]));
        text.push_str("settings\n");
        for (key, value) in &state.settings {
            text.push_str(&format!("  {key} = {value}\n"));
        }
    }
    text.push_str("configuration\n");
    for line in config.lines().filter(|line| !line.starts_with(['{', '}'])) {
        text.push_str(&format!("{}\n", line.trim_end_matches(',')));
    }
    text.push_str(&listed(tensors.shapes()));
    Ok(text)
}

/// Tensors with their shapes, and the total number of elements.
fn listed<'a>(tensors: impl Iterator<Item = (&'a str, &'a [usize])>) -> String {
    let mut total = 0;
    let rows: Vec<Vec<String>> = tensors
        .map(|(name, shape)| {
            let values = shape.iter().product::<usize>() as u64;
            total += values;
            vec![format!("  {name}"), format!("{shape:?}"), count(values)]
        })
        .collect();
    let sums = format!("{} values in {} tensors, {} in f32\n", count(total), rows.len(), bytes(4 * total));
    format!("tensors\n{}{sums}", table(&rows))
}
