//! A comparison: several methods, one table.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::common::Common;
use super::search::{Contender, Search};
use super::table::{self, Column, markdown};
use crate::build::Listener;
use crate::cli::output::print;
use crate::process::Signals;
use crate::run::report::Console;

/// Comparison: the methods that take part, and the columns of the table.
pub struct Comparison<'a> {
    /// Heading of the first column.
    pub what: &'static str,
    /// Name of the folder when none is given.
    pub folder: &'static str,
    pub contenders: Vec<Contender>,
    /// Maximum number of learning rates per method: after the first three, the next one is tried while the best is at
    /// an end. All methods get as many as the one with the most.
    pub most: usize,
    pub columns: Vec<Column<'a>>,
}

impl Comparison<'_> {
    /// Trains all methods, writes the table next to the runs and prints it.
    pub fn run(self, common: &Common) -> anyhow::Result<ExitCode> {
        let out = common.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(self.folder));
        let mut console = Console::new(common.quiet);
        let signals = Signals::install().context("signals cannot be watched")?;
        let mut searches = Vec::new();
        for contender in self.contenders {
            match Search::run(contender, common, self.most, (&out, &console, &signals))? {
                ControlFlow::Continue(search) => searches.push(search),
                ControlFlow::Break(code) => return Ok(code),
            }
        }
        let most = searches.iter().map(Search::tried).max().unwrap_or(0);
        let mut rows = Vec::new();
        for mut search in searches {
            // With given rates all have been tried.
            if common.lr.is_empty()
                && let ControlFlow::Break(code) = search.refine(most)?
            {
                return Ok(code);
            }
            match search.finish(common.first_seed(), common.seeds)? {
                ControlFlow::Continue(row) => rows.push(row),
                ControlFlow::Break(code) => return Ok(code),
            }
        }
        console.end();
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

/// Returns the given names without duplicates, or all that exist.
pub fn chosen<T: Copy>(
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
