//! `lowrank plan`.

mod lists;
mod rows;
mod shaped;
mod traffic;

use std::process::ExitCode;

use lowrank_models::adapter::{PlainRule, Rank, Rule, StructureEntry};
use serde_json::json;

use self::lists::Lists;
use self::rows::{describe, head, json_row, row};
use self::traffic::{bandwidth, traffic};
use super::output::{print, table};
use super::training::SizeArgs;
use crate::build::BuildError;
use crate::config::{Config, Job, Layers, bytes, count};
use crate::plan::{Candidate, Forecaster, Found, Freedom, candidates, limit, savings};
use crate::recipe::TrainedModel;

pub use self::shaped::{Shaped, summary};

/// Estimate the memory of a pretraining or fine-tuning run and list cheaper variants.
///
/// All settings left unset are varied: every parameterization and optimizer of `lowrank methods`, every storage of the weights (of the frozen ones below
/// an adapter with --finetune), the three backward modes, the batch at once or accumulated. A value that is given stays; several given values narrow the
/// search to them. Combinations that a run would reject are left out and counted.
///
/// Rows are ordered by what they give up: nothing; time (the batch in parts, then checkpointing); f32 moments; one norm for clipping (per-layer); bits of the
/// weights; the optimizer; the dense layers; and last sequences of a step. Several changes add up. A row is shown only if it needs less memory than all rows
/// before it, for each of the values that were asked for side by side; --all shows the others too. Rows that fit --memory come first. Nothing is trained and
/// nothing of that size is allocated.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank plan --model llama-60m --memory 600MiB
  lowrank plan --model llama-1b --memory 8GiB --set tokenizer.vocab_size=32000
  lowrank plan --model llama-130m --optimizer galore,muon,apollo --batch 8
  lowrank plan --model llama-130m --optimizer galore --set optimizer.options.rank=256 --batch 8 --all
  lowrank plan --finetune --model SmolLM2-135M --memory 400MiB
  lowrank plan --finetune --model SmolLM2-135M --adapter lora,vera,none --base file,nf4 --rank 16
  lowrank plan --model llama-350m --ranks 8 --bandwidth 10Gbit/s
  lowrank plan --model llama-60m --memory 600MiB --json

A row becomes a run by the flags of its columns (`lowrank pretrain --optimizer NAME --backward MODE ...`), or by the `settings` that --json lists for it, each
as --set KEY=VALUE. `lowrank pretrain --memory` and `lowrank finetune --memory` choose by themselves among fewer rows, in the same order: they change backward
mode, batch, 8-bit moments, storage of the weights and, in pretraining, dense layers to SLTrain.

The process is counted as a whole, at its peak; token files that are read are mapped and not counted. On a GPU more is needed.")]
pub struct Args {
    /// Named shape such as llama-9m, or a Hugging Face model folder to go on from
    #[arg(long)]
    model: Option<String>,
    /// Plan a fine-tuning of --model, which is a folder, by an adapter
    #[arg(long)]
    finetune: bool,
    #[command(flatten)]
    lists: Lists,
    /// With --finetune: rank of the adapter; of several adapters, of those that have one
    #[arg(long, requires = "finetune")]
    rank: Option<u32>,
    /// Show all rows, also those that need no less memory than the ones before them
    #[arg(long)]
    all: bool,
    /// Print the rows as JSON, with the settings of each
    #[arg(long, conflicts_with = "ranks")]
    json: bool,
    /// tokenizer.json, or `bytes`; without it the vocabulary has tokenizer.vocab_size ids
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<String>,
    /// Processes under mpirun, up to which the traffic of a step is listed
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1024))]
    ranks: Option<u32>,
    /// Speed of the network between them, such as 10Gbit/s or 1.2GB/s
    #[arg(long, value_name = "SPEED", requires = "ranks")]
    bandwidth: Option<String>,
    #[command(flatten)]
    sizes: SizeArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let job = if args.finetune { Job::Finetune } else { Job::Pretrain };
    let mut layers = args.sizes.layers().map_err(BuildError::from)?;
    layers.optional("--model", "model.name", args.model.as_deref());
    layers.optional("--tokenizer", "tokenizer.path", args.tokenizer.as_deref());
    let freedom = args.lists.add(&mut layers, job)?;
    let mut plans = Vec::new();
    for adapter in args.lists.adapters() {
        let mut layers = layers.clone();
        layers.optional("--adapter", "adapter.name", adapter);
        layers.optional(
            "--rank",
            "adapter.rank",
            args.rank.filter(|_| !args.lists.several_adapters() || has_rank(adapter)),
        );
        plans.push(Plan::of(&layers, job, freedom, &args)?);
    }
    let Some(plan) = Plan::joined(plans) else { return Ok(ExitCode::SUCCESS) };
    let fits = |candidate: &Candidate| plan.limit.map(|limit| candidate.forecast.peak <= limit);
    if args.json {
        let rows = plan.rows.iter().map(|row| json_row(row, fits(row))).collect::<Vec<_>>();
        let all = json!({
            "model": plan.summary,
            "limit_bytes": plan.limit,
            "searched": plan.searched,
            "rejected": plan.rejected,
            "rows": rows,
        });
        print(&format!("{all:#}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![head(job)];
    rows.extend(plan.rows.iter().map(|candidate| row(candidate, fits(candidate))));
    let mut text = format!("{}\n\n{}", plan.summary, table(&rows));
    text.push_str(&format!(
        "\n{} of {} combinations of settings are shown{}\n",
        count(plan.rows.len() as u64),
        count(plan.searched as u64),
        match plan.rejected {
            0 => String::new(),
            rejected => format!("; {} would be rejected", count(rejected as u64)),
        }
    ));
    if let (Some(limit), Some(first)) = (plan.limit, plan.rows.first()) {
        let chosen = plan.chosen.as_ref().map(describe);
        if chosen.as_deref() == Some(&describe(first)) {
            // Said below.
        } else if fits(first) == Some(true) {
            text.push_str(&format!("within {} first: {}\n", bytes(limit), describe(first)));
        } else {
            text.push_str(&format!(
                "nothing fits {}; the least is {} with {}\n",
                bytes(limit),
                bytes(first.forecast.peak),
                describe(first)
            ));
        }
        if let Some(chosen) = chosen {
            text.push_str(&format!("within {} `lowrank {} --memory` uses: {chosen}\n", bytes(limit), job.name()));
        }
    }
    let first = plan.rows.first().map(|first| first.forecast.peak);
    if let Some((_, rows)) = plan.traffic.iter().find(|(peak, _)| Some(*peak) == first) {
        text.push_str(&format!("\n{}", table(rows)));
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Returns true if adapters of this name have a rank.
fn has_rank(adapter: Option<&str>) -> bool {
    adapter.is_some_and(|name| StructureEntry::find(name).is_ok_and(|entry| entry.spec.rank != Rank::None))
}

/// Result of the search for one adapter, or for several.
struct Plan {
    summary: String,
    limit: Option<u64>,
    /// Rows to show, those that fit first.
    rows: Vec<Candidate>,
    /// The row that a run with this limit uses.
    chosen: Option<Candidate>,
    searched: usize,
    rejected: usize,
    /// Traffic of the first row of each adapter, with the peak of that row.
    traffic: Vec<(u64, Vec<Vec<String>>)>,
}

impl Plan {
    fn of(layers: &Layers, job: Job, freedom: Freedom, args: &Args) -> Result<Self, BuildError> {
        let mut requested = layers.resolve(&Config::of(job))?;
        let shaped = Shaped::of(requested.clone(), freedom, job)?;
        requested.train.seq_len = shaped.config.train.seq_len;
        let (llama, shape, tuned) = (shaped.llama(), &shaped.shape, &shaped.tuned);
        let limit = limit(&requested)?;
        let plain = PlainRule {};
        let rule = tuned.as_ref().map_or(&plain as &dyn Rule, |tuned| &*tuned.rule);
        let adapter = tuned.as_ref().and_then(TrainedModel::adapter);
        let allocation = tuned.as_ref().and_then(|tuned| tuned.allocation.as_deref());
        let forecaster = Forecaster::new(&llama, adapter, rule, allocation);
        let forecast = |config: &Config| forecaster.check(config).and_then(|()| forecaster.forecast(config));
        let admitted = |config: &Config| args.lists.admit(config);
        let Found { candidates: found, rejected } = candidates(&requested, freedom, shape, &admitted, &forecast)?;
        let searched = found.len() + rejected;
        let rows = if args.all { found } else { savings(found, |config| args.lists.group(config)) };
        let fits = |row: &Candidate| limit.is_none_or(|limit| row.forecast.peak <= limit);
        // What a run chooses by itself, for which each setting has one value or none.
        let freedom = Freedom { everything: false, ..Freedom::of(layers, job) };
        let of_run = || candidates(&shaped.config, freedom, shape, &admitted, &|config| forecaster.forecast(config));
        let chosen =
            limit.filter(|_| !args.lists.several()).and_then(|_| of_run().ok()?.candidates.into_iter().find(fits));
        let speed = args.bandwidth.as_deref().map(bandwidth).transpose()?;
        let traffic = match (args.ranks, rows.first()) {
            (Some(ranks), Some(first)) => {
                vec![(first.forecast.peak, traffic(&forecaster, first, ranks, speed)?)]
            }
            _ => Vec::new(),
        };
        Ok(Self { summary: summary(shape, &requested), limit, rows, chosen, searched, rejected, traffic })
    }

    /// Joins the plans of several adapters.
    fn joined(plans: Vec<Self>) -> Option<Self> {
        let alone = plans.len() == 1;
        let mut joined = plans.into_iter().reduce(|mut joined, plan| {
            joined.rows.extend(plan.rows);
            joined.traffic.extend(plan.traffic);
            (joined.searched, joined.rejected) = (joined.searched + plan.searched, joined.rejected + plan.rejected);
            joined
        })?;
        joined.chosen.take_if(|_| !alone);
        joined.rows.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.forecast.peak.cmp(&b.forecast.peak)));
        if let Some(limit) = joined.limit {
            // If none fits, the nearest one is the most interesting.
            joined.rows.sort_by_key(|row| match row.forecast.peak {
                peak if peak <= limit => (false, 0),
                peak => (true, peak),
            });
        }
        Some(joined)
    }
}
