//! `lowrank adapter-start`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::ModelError;
use lowrank_models::adapter::{AdapterConfig, LinearLayer, SharedTensors, Targets, start_of};
use lowrank_models::hub::TensorFiles;
use lowrank_models::hub::compose::linear_layers_of;
use lowrank_models::hub::peft::{PlainLora, PlainSettings};
use lowrank_optim::registry::Options;
use serde_json::json;

use super::folder;
use super::output::{print, table};
use crate::build::BuildError;
use crate::config::bytes;

/// Write the start of an adapter as a plain LoRA folder, for another trainer and for any model whose shapes are known.
///
/// Only the header of the weights is read. With structure orthogonal the rows of A are vectors of a shared basis: the trainer freezes them.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank adapter-start --shapes model.safetensors --structure orthogonal --rank 16 --seed 1 --out start
  lowrank adapter-start --shapes MODEL --set registry=used.json --set concept=french --targets q_proj,v_proj --out start")]
pub struct Args {
    /// File of weights, or model folder: names and shapes of the layers
    #[arg(long, value_name = "PATH")]
    shapes: PathBuf,
    /// Adapter structure whose start does not depend on the weights
    #[arg(long, value_name = "NAME", default_value = "orthogonal")]
    structure: String,
    /// Rank; the structure's own when not given
    #[arg(long)]
    rank: Option<usize>,
    /// Layers: all-linear, names between commas, or a regular expression
    #[arg(long, default_value = "all-linear")]
    targets: String,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Option of the structure
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Model that the folder names as its base
    #[arg(long, value_name = "NAME")]
    base_model: Option<String>,
    /// Folder to write; it must not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    folder::refuse_existing(&args.out)?;
    let files = match args.shapes.is_dir() {
        true => TensorFiles::open(&args.shapes),
        false => TensorFiles::of_file(&args.shapes).map(|(files, _)| files),
    };
    let layers: Vec<LinearLayer> = linear_layers_of(files.map_err(BuildError::from)?.shapes())
        .into_iter()
        .map(|(path, shape)| LinearLayer { path, shape, bias: false, embedding: false })
        .collect();
    let mut options = Options::new();
    for text in &args.set {
        let Some((name, value)) = text.split_once('=') else {
            return Err(BuildError::Settings(format!("--set {text}: write it as name=value")).into());
        };
        options.insert(
            name.trim().to_string(),
            serde_json::from_str(value.trim()).unwrap_or_else(|_| json!(value.trim())),
        );
    }
    let config = AdapterConfig {
        rank: args.rank,
        targets: Targets::parse(&args.targets),
        seed: args.seed,
        options,
        ..AdapterConfig::new(&args.structure)
    };
    let places = config.places(&layers).map_err(ModelError::from).map_err(BuildError::from)?;
    let mut written = 0;
    folder::whole(&args.out, |dir| {
        let mut plain = PlainLora::create(dir).map_err(BuildError::from)?;
        let mut shared = SharedTensors::default();
        for place in &places {
            let factors = start_of(&config, place, &mut shared).map_err(ModelError::from).map_err(BuildError::from)?;
            plain.push(&place.path, &factors).map_err(BuildError::from)?;
        }
        written = plain.bytes();
        let targets = matches!(config.targets, Targets::Names(_)).then(|| config.targets.clone());
        let settings = PlainSettings { targets, base_model: args.base_model.clone(), ..PlainSettings::default() };
        Ok(plain.finish(settings).map_err(BuildError::from)?)
    })?;
    let rows = [
        vec!["structure".into(), config.structure.clone()],
        vec!["layers".into(), places.len().to_string()],
        vec!["size".into(), bytes(written)],
    ];
    print(&format!("{}{}\n", table(&rows), args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
