//! `lowrank methods`.

use std::process::ExitCode;

use lowrank_models::adapter::{Alpha, RULES, Rank, STRUCTURES, StructureEntry};
use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationEntry};
use lowrank_optim::registry::{Entry, METHODS, OptionSpec, optimizer as find_optimizer};

use super::output::{print, table};
use crate::build::BuildError;

/// List optimizers, parameterizations, adapters and their training rules, or the options of one.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "R x C is the shape of a matrix, n_min and n_max its smaller and larger side, r the rank; d_in and d_out are inputs and outputs of a layer."
)]
pub struct Args {
    /// Optimizer, parameterization, adapter or rule to show with all its options
    name: Option<String>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.name {
        Some(name) => print(&one(&name)?)?,
        None => print(&all())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A title and a table whose first row is the heading.
fn listed<const N: usize>(title: &str, heading: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<Vec<String>> = std::iter::once(heading.map(String::from)).chain(rows).map(Vec::from).collect();
    format!("{title}\n\n{}", table(&rows))
}

fn all() -> String {
    let paper = found;
    let optimizers = METHODS
        .iter()
        .map(|method| [method.name.into(), method.memory.into(), paper(method.papers[0].place), method.summary.into()]);
    let parameterizations = PARAMETERIZATIONS
        .iter()
        .map(|entry| entry.spec())
        .map(|spec| [spec.name.into(), spec.memory.into(), paper(spec.papers[0].place), spec.summary.into()]);
    let adapters = STRUCTURES.iter().map(|StructureEntry { spec, .. }| {
        let stores = if spec.stores.is_empty() { "-" } else { spec.stores };
        let merges = if spec.merges.is_ok() { "yes" } else { "no" };
        [spec.name, spec.trains, stores, merges, &paper(spec.arxiv), spec.title].map(String::from)
    });
    let rules = RULES.iter().map(|rule| [rule.name.into(), paper(rule.papers[0].place), rule.summary.into()]);
    [
        listed("Optimizers (--optimizer NAME)", ["NAME", "STATE", "PAPER", "WHAT IT DOES"], optimizers),
        listed(
            "Parameterizations of the linear layers (--parameterization NAME), in place of a d_in x d_out weight",
            ["NAME", "VALUES", "PAPER", "WHAT IT IS"],
            parameterizations,
        ),
        listed(
            "Adapters (--adapter NAME), beside a frozen d_in x d_out weight",
            ["NAME", "TRAINS", "STORES BESIDE", "MERGES", "PAPER", "TITLE"],
            adapters,
        ),
        listed("Training rules of adapters (--rule NAME)", ["NAME", "PAPER", "WHAT IT DOES"], rules),
    ]
    .join("\n")
}

fn one(name: &str) -> Result<String, BuildError> {
    if let Ok(entry) = ParameterizationEntry::find(name) {
        return Ok(parameterization(entry));
    }
    if let Some(entry) = STRUCTURES.iter().find(|entry| entry.spec.name == name) {
        return Ok(adapter(entry));
    }
    if let Some(known) = RULES.iter().find(|known| known.entry.name == name) {
        return Ok(rule(&known.entry));
    }
    optimizer(name)
}

/// An arXiv id, or another place.
fn found(place: &str) -> String {
    match place.starts_with(|first: char| first.is_ascii_digit()) {
        true => format!("arXiv {place}"),
        false => place.to_string(),
    }
}

fn parameterization(entry: &ParameterizationEntry) -> String {
    let spec = entry.spec();
    let paper = spec.papers[0];
    let memory = format!("In place of a d_in x d_out weight: {}\n", spec.memory);
    format!("{}: {}\nPaper: {} ({})\n{memory}", spec.name, spec.summary, paper.title, paper.cited())
        + &stated("model.parameterization.options", spec)
}

fn adapter(entry: &StructureEntry) -> String {
    let spec = entry.spec;
    let or_nothing = |text: &'static str| if text.is_empty() { "nothing" } else { text };
    let rank = match spec.rank {
        Rank::Fixed(rank) => rank.to_string(),
        Rank::SmallerSide(most) => format!("the smaller side of the layer, at most {most}"),
        Rank::None => "it has none".into(),
    };
    let alpha = match spec.alpha {
        Alpha::Ranks(times) => format!("{times} times the rank"),
        Alpha::Fixed(alpha) => alpha.to_string(),
        Alpha::None => "it has none".into(),
    };
    let mut text = format!("{}\nPaper: {} ({})\n\n", spec.name, spec.title, found(spec.arxiv));
    let row = |name: &str, value: String| vec![format!("  {name}"), value];
    text.push_str(&table(&[
        row("trains beside a d_in x d_out weight", or_nothing(spec.trains).into()),
        row("stores beside that", or_nothing(spec.stores).into()),
        row("adapter.rank, unset", rank),
        row("adapter.alpha, unset", alpha),
        row("adapter.dropout", if spec.dropout { "from 0 to below 1" } else { "it has none" }.into()),
        row(
            "adapter.init",
            std::iter::once("default").chain(spec.inits.iter().copied()).collect::<Vec<_>>().join(", "),
        ),
        row("merges into the weight", spec.merges.map_or_else(|reason| format!("no: {reason}"), |()| "yes".into())),
    ]));
    text.push_str(&stated("adapter.options", &entry.entry));
    text
}

fn rule(entry: &Entry) -> String {
    let paper = entry.papers[0];
    format!("{}: {}\nPaper: {} ({})\n", entry.name, entry.summary, paper.title, paper.cited())
        + &stated("rule.options", entry)
}

/// Options of a method under a section, with defaults, allowed values and help.
fn stated(section: &str, entry: &Entry) -> String {
    let list = entry.options();
    let row = |option: &OptionSpec| {
        vec![format!("  {}", option.name), option.default_text(), option.allowed.to_string(), option.help.clone()]
    };
    match list.is_empty() {
        true => String::new(),
        false => format!("\nOptions, as {section}.NAME:\n{}", table(&list.iter().map(row).collect::<Vec<_>>())),
    }
}

fn optimizer(name: &str) -> Result<String, BuildError> {
    let method = find_optimizer(name)?;
    let text = format!(
        "{}: {}\nPaper: {} ({})\nState of an R x C matrix: {} (in f32 values unless stated otherwise)\n",
        method.name,
        method.summary,
        method.papers[0].title,
        method.papers[0].cited(),
        method.memory
    );
    Ok(text + &stated("optimizer.options", method))
}
