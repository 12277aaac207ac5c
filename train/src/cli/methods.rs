//! `lowrank methods`.

use std::process::ExitCode;

use lowrank_optim::registry::{METHODS, find};

use super::{print, table};
use crate::job::JobError;

/// List the optimizers, or the options of one.
#[derive(Debug, clap::Args)]
#[command(after_help = "R x C is the shape of a matrix, n_min and n_max its smaller and larger side, r the rank.")]
pub struct Args {
    /// Optimizer to show with all its options
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
        let paper = format!("arXiv {}", method.paper.arxiv);
        rows.push(vec![method.name.into(), method.state.into(), paper, method.summary.into()]);
    }
    table(&rows)
}

fn one(name: &str) -> Result<String, JobError> {
    let method = find(name)?;
    let mut text = format!(
        "{}: {}\nPaper: {} (arXiv {})\nState of an R x C matrix: {} (values of 4 bytes where nothing else is said)\n\nOptions, as optimizer.NAME:\n",
        method.name, method.summary, method.paper.title, method.paper.arxiv, method.state
    );
    let mut rows = Vec::new();
    for option in method.options() {
        let default = option.default.map_or("required".into(), |value| format!("default {value}"));
        rows.push(vec![format!("  {}", option.name), default, option.help.into()]);
    }
    text.push_str(&table(&rows));
    Ok(text)
}
