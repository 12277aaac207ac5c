//! `lowrank compose`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lowrank_models::ModelError;
use lowrank_models::adapter::compose::{Composite, Composition, CompositionEntry, Figures};
use lowrank_models::hub::MAX_SHARD_BYTES;
use lowrank_models::hub::compose::{
    AdapterSource, LayerOutcome, Options as RunOptions, Outcome, PoolFolder, PoolSettings, PoolWriter, Sources,
    merge_into,
};
use lowrank_models::hub::peft::PlainLora;
use lowrank_optim::registry::Options;
use serde_json::{Value, json};

use super::folder;
use super::output::{print, table};
use crate::build::BuildError;
use crate::config::{bytes, parse_bytes};

/// Make several adapters into one, into a pool that gives each one back, or add them to a model's weights.
///
/// Reads adapter folders of this program and of Python's peft for any model, layer by layer. The result is a plain LoRA folder that peft reads.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank compose --method lego --adapter french=0.5 --adapter german --set k=16 --out both
  lowrank compose --method ties --adapter french --adapter german --set density=0.5 --set space=deltas --model SmolLM2-135M --out merged
  lowrank compose --method rmm --adapter french --adapter german --adapter dutch --budget 8MiB --out pool
  lowrank compose --pool pool --adapter danish --out larger-pool

`lowrank methods` lists the compositions, `lowrank methods NAME` the options of one.")]
pub struct Args {
    /// Composition
    #[arg(long, value_name = "NAME", required_unless_present = "pool")]
    method: Option<String>,
    /// Adapter folder, with its weight after an equals sign; may be repeated. With --base also the folder of a fine-tuned model
    #[arg(long = "adapter", value_name = "DIR[=WEIGHT]", required = true)]
    adapters: Vec<String>,
    /// Names of the adapters, between commas and in their order; the last parts of their paths when not given
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    names: Vec<String>,
    /// Option of the composition
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Size limit of a pool, which chooses p: --set budget in units
    #[arg(long, value_name = "SIZE", conflicts_with = "residual")]
    budget: Option<String>,
    /// Share of the squared deviations that a pool may lose, which chooses p: --set residual
    #[arg(long, value_name = "SHARE")]
    residual: Option<f64>,
    /// Let layers that an adapter does not have count as unchanged by it
    #[arg(long)]
    allow_missing: bool,
    /// Model that fine-tuned models among the sources started from; their difference from it is truncated to --base-rank
    #[arg(long, value_name = "DIR", requires = "base_rank")]
    base: Option<PathBuf>,
    /// Rank of the difference of a fine-tuned model from its base
    #[arg(long, value_name = "RANK", requires = "base")]
    base_rank: Option<usize>,
    /// Write this model with the composition added to its weights, instead of an adapter
    #[arg(long, value_name = "DIR", conflicts_with = "pool")]
    model: Option<PathBuf>,
    /// Type of the weights of that model: f32, f16 or bf16; when not given, each has the type that it has in the model's files
    #[arg(long, value_name = "TYPE", requires = "model")]
    dtype: Option<String>,
    /// Add the adapters to this pool, whose mean and directions stay, instead of composing them with each other
    #[arg(long, value_name = "DIR", conflicts_with_all = ["method", "set", "budget", "residual"])]
    pool: Option<PathBuf>,
    /// Print the report as JSON, by layer
    #[arg(long)]
    json: bool,
    /// Folder to write; it must not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    folder::refuse_existing(&args.out)?;
    let sources = sources(&args)?;
    for (adapter, warning) in sources.warnings() {
        eprintln!("warning: {adapter}: {warning}");
    }
    let report = match (&args.pool, &args.method) {
        (Some(pool), _) => add_to_pool(pool, sources, &args.out)?,
        (None, Some(method)) => composed(&args, method, sources)?,
        (None, None) => unreachable!("one of both is required"),
    };
    print(&if args.json { report.json() } else { report.text(&args.out) })?;
    Ok(ExitCode::SUCCESS)
}

/// A folder with its weight: what follows the last equals sign, unless a folder has the whole text as its name.
fn weighted(text: &str) -> Result<(PathBuf, Option<f64>), BuildError> {
    let whole = PathBuf::from(text);
    let Some((dir, weight)) = text.rsplit_once('=').filter(|_| !whole.exists()) else { return Ok((whole, None)) };
    match weight.trim().parse::<f64>() {
        Ok(weight) if weight.is_finite() => Ok((PathBuf::from(dir), Some(weight))),
        _ => Err(BuildError::Settings(format!(
            "--adapter {text}: the weight is \"{weight}\"; it must be a finite number"
        ))),
    }
}

fn sources(args: &Args) -> Result<Sources, BuildError> {
    let given = args.adapters.iter().map(|text| weighted(text)).collect::<Result<Vec<_>, _>>()?;
    if !args.names.is_empty() && args.names.len() != given.len() {
        return Err(BuildError::Settings(format!(
            "--names has {} names, --adapter is given {} times; give as many",
            args.names.len(),
            given.len()
        )));
    }
    let last = |dir: &Path| dir.file_name().map_or(dir.to_string_lossy(), |name| name.to_string_lossy()).into_owned();
    let once = |name: &str| given.iter().filter(|(dir, _)| last(dir) == name).count() == 1;
    let mut all = Vec::new();
    for (place, (dir, weight)) in given.iter().enumerate() {
        let name = match args.names.get(place) {
            Some(name) => name.clone(),
            None if once(&last(dir)) => last(dir),
            None => dir.to_string_lossy().into_owned(),
        };
        let whole = dir.join("config.json").exists() && !dir.join("adapter_config.json").exists();
        all.push(match (&args.base, args.base_rank) {
            (Some(_), Some(0)) => return Err(BuildError::Settings("--base-rank 0: it must be at least 1".into())),
            (Some(base), Some(rank)) if whole => AdapterSource::tuned(&name, dir, base, rank, *weight)?,
            _ if whole => {
                return Err(BuildError::Settings(format!(
                    "--adapter {}: is a whole model; name the one that it started from with --base, and a rank with --base-rank",
                    dir.display()
                )));
            }
            _ => AdapterSource::adapter(&name, dir, *weight)?,
        });
    }
    Ok(Sources::new(all, args.allow_missing)?)
}

/// Options of the method from `--set`, `--budget` and `--residual`.
fn options(args: &Args) -> Result<Options, BuildError> {
    let mut options = Options::new();
    for text in &args.set {
        let Some((name, value)) = text.split_once('=') else {
            return Err(BuildError::Settings(format!("--set {text}: write it as name=value")));
        };
        let value = value.trim();
        let parsed = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        if options.insert(name.trim().to_string(), parsed).is_some() {
            return Err(BuildError::Settings(format!("--set {} is given twice; give it once", name.trim())));
        }
    }
    let mut flag = |flag: &str, name: &str, value: Value| match options.insert(name.to_string(), value) {
        None => Ok(()),
        Some(_) => Err(BuildError::Settings(format!("{flag} and --set {name} state the same; give one"))),
    };
    if let Some(text) = &args.budget {
        let Some(size) = parse_bytes(text) else {
            return Err(BuildError::Settings(format!("--budget {text}: must be a size such as 8MiB")));
        };
        flag("--budget", "budget", json!(size))?;
    }
    if let Some(share) = args.residual {
        flag("--residual", "residual", json!(share))?;
    }
    Ok(options)
}

fn composed(args: &Args, method: &str, mut sources: Sources) -> anyhow::Result<Report> {
    let error = |error| BuildError::from(ModelError::Compose(error));
    let entry = CompositionEntry::find(method).map_err(error)?;
    let options = options(args)?;
    let mut composition = <dyn Composition>::named(method, &options).map_err(error)?;
    let mut report = Report { method: method.into(), adapters: sources.names(), ..Report::default() };
    let before: u64 = sources
        .sizes()
        .iter()
        .map(|size| 4 * (size.shape[0] + size.shape[1]) as u64 * size.ranks.iter().sum::<usize>() as u64)
        .sum();
    let dtype = args.dtype.as_deref().map(folder::file_type).transpose()?;
    if entry.makes_pool {
        if let Some(model) = &args.model {
            let model = model.display();
            let reason = format!("--model {model}: {method} makes a pool, which has no place in weights; remove it");
            return Err(BuildError::Settings(reason).into());
        }
        folder::whole(&args.out, |dir| {
            let mut pool = PoolWriter::create(dir).map_err(BuildError::from)?;
            let settings = PoolSettings { method: method.into(), names: sources.names(), plain: sources.settings() };
            let taken = sources.compose(&mut *composition, RunOptions::default(), |layer| {
                let LayerOutcome { path, outcome: Outcome::Whole(Composite::Pool(part)), report: figures } = layer
                else {
                    unreachable!("a pool was asked for")
                };
                report.add(&path, figures, part.a.mean.nrows());
                pool.push(&path, &part)
            });
            taken.map_err(BuildError::from)?;
            report.bytes = pool.bytes();
            Ok(pool.finish(settings).map_err(BuildError::from)?)
        })?;
        if report.bytes >= before {
            eprintln!(
                "warning: the pool takes {}, the adapters {}: keep them as they are, or lower p",
                bytes(report.bytes),
                bytes(before)
            );
        }
        return Ok(report);
    }
    match &args.model {
        None => folder::whole(&args.out, |dir| {
            let settings = sources.settings();
            let plain = PlainLora::create(dir).map_err(BuildError::from)?;
            let mut plain = plain.with_embeddings(settings.embeddings.clone());
            let taken = sources.compose(&mut *composition, RunOptions::default(), |layer| {
                let LayerOutcome { path, outcome: Outcome::Factors(factors), report: figures } = layer else {
                    unreachable!("factors were asked for")
                };
                report.add(&path, figures, factors.a.dims()[1]);
                plain.push(&path, &factors)
            });
            taken.map_err(BuildError::from)?;
            (report.bytes, report.left_out) = (plain.bytes(), plain.left_out().to_vec());
            Ok(plain.finish(settings).map_err(BuildError::from)?)
        })?,
        Some(model) => folder::whole(&args.out, |dir| {
            sources.prepare(&mut *composition).map_err(BuildError::from)?;
            let layers: BTreeMap<String, [usize; 2]> = sources.layers().clone();
            let embeddings = sources.settings().embeddings;
            let merged = merge_into(model, &layers, &embeddings, dtype, dir, MAX_SHARD_BYTES, |path| {
                let Some(layer) = sources.compose_layer(&*composition, path)? else { return Ok(None) };
                let Outcome::Whole(made) = layer.outcome else { unreachable!("an update was asked for") };
                let rank = match &made {
                    Composite::Factors { a, .. } => a.nrows(),
                    _ => layers[path][0].min(layers[path][1]),
                };
                report.add(path, layer.report, rank);
                Ok(made.into_delta())
            });
            Ok(merged.map_err(BuildError::from)?)
        })?,
    }
    Ok(report)
}

/// Adds adapters to a pool without changing its mean and directions.
fn add_to_pool(pool: &Path, mut sources: Sources, out: &Path) -> anyhow::Result<Report> {
    let mut folder = PoolFolder::open(pool).map_err(BuildError::from)?;
    let mut settings = folder.settings();
    let names = sources.names();
    if let Some(name) = names.iter().find(|name| settings.names.contains(name)) {
        let reason =
            format!("--adapter {name}: {} holds an adapter of that name; give another with --names", pool.display());
        return Err(BuildError::Settings(reason).into());
    }
    if let (Some(own), Some(base)) = (sources.settings().base, &settings.plain.base)
        && own != *base
    {
        let reason = format!(
            "--adapter {}: was trained on other base weights (number {own}) than the pool ({base})",
            names.join(", ")
        );
        return Err(BuildError::Settings(reason).into());
    }
    let layers: Vec<(String, [usize; 2])> =
        folder.layers().map(|(path, shape, ..)| (path.to_string(), shape)).collect();
    let known: Vec<&String> = layers.iter().map(|(path, _)| path).collect();
    let extra =
        sources.layers().keys().find(|path| !known.contains(path)).map(|path| (path, "the pool does not have it"));
    let missing = known
        .iter()
        .find(|path| !sources.layers().contains_key(**path))
        .map(|path| (*path, "the adapter does not have it"));
    if let Some((path, reason)) = extra.or(missing) {
        let reason = format!("layer {path}: {reason}; a pool holds adapters of the same layers");
        return Err(BuildError::Settings(reason).into());
    }
    let mut report = Report { method: settings.method.clone(), adapters: names.clone(), ..Report::default() };
    folder::whole(out, |dir| {
        let mut writer = PoolWriter::create(dir).map_err(BuildError::from)?;
        for (path, shape) in &layers {
            let mut added = || -> Result<(), ModelError> {
                let layer = sources.take(path, *shape)?;
                let mut part = folder.take(path)?;
                let mut figures = Figures::new();
                for source in &layer.sources {
                    if source.weight.is_some() {
                        let weight = "has a weight; a pool gives each adapter back as it was: remove it";
                        return Err(ModelError::Compose(layer.refused_source(source, weight)));
                    }
                    let lost = part.add(source).map_err(|reason| layer.refused_source(source, reason))?;
                    figures.insert(format!("residual of {}", source.adapter), lost.into());
                }
                report.add(path, figures, part.a.mean.nrows());
                writer.push(path, &part)
            };
            added().map_err(BuildError::from)?;
        }
        report.bytes = writer.bytes();
        settings.names.extend(names);
        Ok(writer.finish(settings).map_err(BuildError::from)?)
    })?;
    Ok(report)
}

/// Figures of a composition.
#[derive(Default)]
struct Report {
    method: String,
    adapters: Vec<String>,
    /// Figures and rank by layer.
    layers: BTreeMap<String, Figures>,
    /// Bytes of the tensors that were written; 0 for a model.
    bytes: u64,
    /// Layers without an update.
    left_out: Vec<String>,
}

impl Report {
    fn add(&mut self, path: &str, mut figures: Figures, rank: usize) {
        figures.insert("rank".into(), rank.into());
        self.layers.insert(path.to_string(), figures);
    }

    fn json(&self) -> String {
        let report = json!({
            "method": self.method,
            "adapters": self.adapters,
            "bytes": self.bytes,
            "left_out": self.left_out,
            "layers": self.layers,
        });
        format!("{report:#}\n")
    }

    fn text(&self, out: &Path) -> String {
        let mut rows = vec![
            vec!["method".to_string(), self.method.clone()],
            vec!["adapters".into(), self.adapters.join(", ")],
            vec!["layers".into(), self.layers.len().to_string()],
        ];
        if self.bytes > 0 {
            rows.push(vec!["size".into(), bytes(self.bytes)]);
        }
        if !self.left_out.is_empty() {
            rows.push(vec!["left out".into(), format!("{} layers whose update is zero", self.left_out.len())]);
        }
        let names: std::collections::BTreeSet<&String> = self.layers.values().flat_map(Figures::keys).collect();
        for name in names {
            let numbers: Vec<(&String, f64)> =
                self.layers.iter().filter_map(|(path, figures)| Some((path, figures.get(name)?.as_f64()?))).collect();
            let Some(largest) = numbers.iter().max_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
            let mean = numbers.iter().map(|(_, value)| value).sum::<f64>() / numbers.len() as f64;
            rows.push(vec![
                name.replace('_', " "),
                format!("mean {mean:.4}, largest {:.4} ({})", largest.1, largest.0),
            ]);
        }
        format!("{}{}\n", table(&rows), out.display())
    }
}
