//! `lowrank methods`.

use std::process::ExitCode;

use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationMethod};
use lowrank_optim::registry::{METHODS, find};

use super::{print, table};
use crate::job::JobError;

/// List the optimizers and parameterizations, or the options of one.
#[derive(Debug, clap::Args)]
#[command(after_help = "R x C is the shape of a matrix, n_min and n_max its smaller and larger side, r the rank.")]
pub struct Args {
    /// Optimizer or parameterization to show with all its options
    name: Option<String>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.name {
        Some(name) => print(&one(&name)?)?,
        None => print(&all())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn all() -> String {
    let mut rows = vec![["NAME", "STATE", "PAPER", "WHAT IT DOES"].map(String::from).to_vec()];
    for method in METHODS {
        let paper = found(method.paper.arxiv);
        rows.push(vec![method.name.into(), method.state.into(), paper, method.summary.into()]);
    }
    let mut text = format!("Optimizers (--optimizer NAME)\n\n{}", table(&rows));
    let mut rows = vec![["NAME", "VALUES", "PAPER", "TITLE"].map(String::from).to_vec()];
    for method in PARAMETERIZATIONS {
        let paper = found(method.arxiv);
        rows.push(vec![method.name.into(), method.values.into(), paper, method.title.into()]);
    }
    text.push_str(&format!(
        "\nParameterizations of the linear layers (--parameterization NAME), in place of a d_in x d_out weight\n\n{}",
        table(&rows)
    ));
    text
}

/// An arXiv id, or another place.
fn found(place: &str) -> String {
    match place.starts_with(|first: char| first.is_ascii_digit()) {
        true => format!("arXiv {place}"),
        false => place.to_string(),
    }
}

fn parameterization(method: &ParameterizationMethod) -> String {
    let mut text = format!(
        "{}\nPaper: {} ({})\nIn place of a d_in x d_out weight: {}\n\nOptions, as model.NAME:\n",
        method.name,
        method.title,
        found(method.arxiv),
        method.values
    );
    let row = |(name, default, help): &(&str, &str, &str)| {
        vec![format!("  {name}"), format!("default {default}"), help.to_string()]
    };
    text.push_str(&table(&method.options.iter().map(row).collect::<Vec<_>>()));
    text
}

fn one(name: &str) -> Result<String, JobError> {
    if let Some(method) = PARAMETERIZATIONS.iter().find(|method| method.name == name) {
        return Ok(parameterization(method));
    }
    let method = find(name)?;
    let mut text = format!(
        "{}: {}\nPaper: {} ({})\nState of an R x C matrix: {} (values of 4 bytes where nothing else is said)\n\nOptions, as optimizer.NAME:\n",
        method.name,
        method.summary,
        method.paper.title,
        found(method.paper.arxiv),
        method.state
    );
    let mut rows = Vec::new();
    for option in method.options() {
        let default = option.default.map_or("required".into(), |value| format!("default {value}"));
        rows.push(vec![format!("  {}", option.name), default, option.help.into()]);
    }
    text.push_str(&table(&rows));
    Ok(text)
}
