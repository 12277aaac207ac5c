//! `lowrank compare`.

mod adapters;
mod optimizers;
mod parameterizations;
mod search;
mod table;
mod trial;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use self::search::{Contender, search};
use self::table::{Column, markdown};
use super::print;
use crate::run::Screen;

/// Train the same model with several methods and compare them, each at its best learning rate.
///
/// Each run is one of `lowrank pretrain` or `lowrank finetune` in a folder of its own below --out; runs that are finished are not repeated, so a
/// comparison that was stopped goes on where it was. A method that the settings do not allow stands in the table with the reason.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, clap::Subcommand)]
enum Kind {
    Optimizers(optimizers::Args),
    Parameterizations(parameterizations::Args),
    Adapters(adapters::Args),
}

/// Flags of all comparisons.
#[derive(Debug, clap::Args)]
struct Common {
    /// Learning rates to try; none: three about the usual one of each method
    #[arg(long, value_delimiter = ',')]
    lr: Vec<f64>,
    /// Further settings of all runs, as in `lowrank pretrain` and `lowrank finetune`
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Folder of the runs; without it runs/compare-optimizers and so on
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
}

/// A comparison: who takes part, and what the table tells of each.
struct Comparison<'a> {
    /// Heading of the first column.
    what: &'static str,
    /// Name of the folder when none is given.
    folder: &'static str,
    contenders: Vec<Contender>,
    /// Most learning rates of each: beyond the first three the next one is tried on the side where the best is the last.
    most: usize,
    columns: Vec<Column<'a>>,
}

/// Runs, and prints the table.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.kind {
        Kind::Optimizers(args) => optimizers::run(args),
        Kind::Parameterizations(args) => parameterizations::run(args),
        Kind::Adapters(args) => adapters::run(args),
    }
}

impl Comparison<'_> {
    /// Trains all, writes the table beside the runs and prints it.
    fn run(self, common: &Common) -> anyhow::Result<ExitCode> {
        let out = common.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(self.folder));
        let mut screen = Screen::new(common.quiet);
        let mut rows = Vec::new();
        for contender in self.contenders {
            match search(contender, common, self.most, &out, &screen)? {
                ControlFlow::Continue(row) => rows.push(row),
                ControlFlow::Break(code) => return Ok(code),
            }
        }
        screen.end();
        if let Some(error) = table::all_failed(&rows) {
            return Err(error);
        }
        let text = markdown(self.what, &rows, &self.columns);
        let path = out.join("compare.md");
        std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
        print(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The names that were given, each once, or all that there are.
fn chosen<T: Copy>(
    given: &[String],
    all: impl Iterator<Item = T>,
    find: impl Fn(&str) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<T>> {
    let mut names: Vec<&String> = Vec::new();
    for name in given {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    match names.is_empty() {
        true => Ok(all.collect()),
        false => names.into_iter().map(|name| find(name)).collect(),
    }
}
