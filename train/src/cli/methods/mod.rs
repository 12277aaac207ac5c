//! `lowrank methods`.

mod page;
mod structure;

use std::process::ExitCode;

use lowrank_models::adapter::initialisations;
use lowrank_optim::OptimError;
use lowrank_optim::registry::{Entry, Kind, find_any};

use super::output::{print, table};
use crate::build::BuildError;
use crate::config::SLOTS;

/// List optimizers, parameterizations, adapters, training rules, allocations and compositions, or the options of one.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank methods
  lowrank methods galore

R x C is the shape of a matrix, n_min and n_max its smaller and larger side, r the rank; d_in and d_out are inputs and outputs of a layer.
Memory is counted in f32 values unless stated otherwise.")]
pub struct Args {
    /// Method of any kind, to show with all its options
    name: Option<String>,
    /// Print all methods with their options as the page docs/methods.md
    #[arg(long, conflicts_with = "name")]
    markdown: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.name {
        Some(name) => print(&one(&name)?)?,
        None if args.markdown => print(&page::page())?,
        None => print(&all())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Methods of one kind, and how a user selects one.
struct Listing {
    kind: Kind,
    /// Flag or setting in front of the name.
    place: &'static str,
    /// Key of an option up to its name; none if there are no options.
    options: Option<String>,
    methods: Vec<Entry>,
}

/// All methods of the program.
fn listings() -> Vec<Listing> {
    let slots = SLOTS.into_iter().map(|slot| Listing {
        kind: slot.kind,
        place: flag(slot.kind),
        options: Some(format!("{}.options.", slot.section)),
        methods: slot.methods(),
    });
    let inits = initialisations().into_iter().map(|init| init.entry).collect();
    let inits = Listing { kind: Kind::Initialisation, place: "--set adapter.init=", options: None, methods: inits };
    let compositions = Listing {
        kind: Kind::Composition,
        place: "lowrank compose --method",
        options: Some(String::new()),
        methods: page::compositions(),
    };
    slots.chain([inits, compositions]).collect()
}

fn all() -> String {
    listings().iter().map(listed).collect::<Vec<_>>().join("\n")
}

/// Title and table, whose first row is the heading.
fn listed(listing: &Listing) -> String {
    let heading = ["NAME", "MEMORY", "PAPER", "WHAT IT IS"].map(String::from).to_vec();
    let row = |entry: &Entry| {
        let paper = entry.papers.first().map(|paper| paper.cited()).unwrap_or_default();
        vec![entry.name.into(), entry.memory.into(), paper, entry.summary.into()]
    };
    let rows: Vec<Vec<String>> = std::iter::once(heading).chain(listing.methods.iter().map(row)).collect();
    let selected = if listing.place.ends_with('=') { "NAME" } else { " NAME" };
    format!("{} ({}{selected})\n\n{}", page::title(listing.kind), listing.place, table(&rows))
}

/// Flag that selects a method of this kind.
fn flag(kind: Kind) -> &'static str {
    match kind {
        Kind::Optimizer => "--optimizer",
        Kind::Parameterization => "--parameterization",
        Kind::Structure => "--adapter",
        Kind::Allocation => "--allocation",
        Kind::Penalty => "--set penalty.name=",
        _ => "--rule",
    }
}

/// All methods with this name; methods of different kinds may share one.
fn one(name: &str) -> Result<String, BuildError> {
    let all = listings();
    find_any(all.iter().flat_map(|listing| &listing.methods), name).map_err(OptimError::from)?;
    let found = all.iter().flat_map(|listing| {
        listing
            .methods
            .iter()
            .filter(|entry| entry.name == name)
            .map(|entry| described(listing.options.as_deref(), entry))
    });
    Ok(found.collect::<Vec<_>>().join("\n"))
}

fn described(key: Option<&str>, entry: &Entry) -> String {
    let mut text = format!("{} ({}): {}\n", entry.name, entry.kind, entry.summary);
    for paper in entry.papers {
        text.push_str(&format!("Paper: {} ({})\n", paper.title, paper.cited()));
    }
    let mut facts: Vec<(String, String)> = Vec::new();
    if !entry.memory.is_empty() {
        facts.push((page::counted(entry.kind).into(), entry.memory.into()));
    }
    if entry.kind == Kind::Structure {
        facts.extend(structure::facts(entry.name));
    }
    if let Some(lr) = entry.lr {
        facts.push(("usual learning rate".into(), format!("{lr}")));
    }
    facts.extend(entry.needs.iter().map(|need| ("needs".to_string(), need.to_string())));
    facts.extend(entry.refuses.iter().map(|refused| ("does not combine with".to_string(), refused.to_string())));
    if !facts.is_empty() {
        let rows: Vec<Vec<String>> = facts.into_iter().map(|(name, fact)| vec![format!("  {name}"), fact]).collect();
        text.push_str(&format!("\n{}", table(&rows)));
    }
    let options = entry.options();
    if let Some(key) = key.filter(|_| !options.is_empty()) {
        let mut rows = vec![["  NAME", "DEFAULT", "ALLOWED", "MEANING"].map(String::from).to_vec()];
        for option in options.iter() {
            rows.push(vec![
                format!("  {}", option.name),
                option.default_text(),
                option.allowed.to_string(),
                option.help.clone(),
            ]);
        }
        text.push_str(&format!("\nOptions, as --set {key}NAME=VALUE:\n{}", table(&rows)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_described_and_slips_get_the_nearest_of_any_kind() {
        for listing in listings() {
            for entry in listing.methods {
                let text = one(entry.name).unwrap();
                assert!(text.contains(entry.summary) && !entry.summary.is_empty(), "{}", entry.name);
                let variant = entry.kind == Kind::Initialisation;
                assert!(variant || !entry.papers.is_empty(), "{} cites no paper", entry.name);
            }
        }
        assert!(all().contains("q-galore"));
        let slip = one("lora-por").unwrap_err().to_string();
        assert!(slip.contains("did you mean the training rule \"lora-pro\"?"), "{slip}");
    }
}
