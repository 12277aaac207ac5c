//! The commands of the program.

mod adapters;
mod compare;
mod eval;
mod export;
mod finetune;
mod folder;
mod generate;
mod inspect;
mod merge;
mod methods;
mod on_model;
mod plan;
mod pretrain;
mod tokenize;
mod training;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::job::JobError;

/// Low-rank training on Burn: pretrain and fine-tune small LLaMA-style models in little memory.
#[derive(Debug, Parser)]
#[command(name = "lowrank", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Pretrain(pretrain::Args),
    Finetune(finetune::Args),
    Generate(generate::Args),
    Tokenize(tokenize::Args),
    Eval(eval::Args),
    Inspect(inspect::Args),
    Export(export::Args),
    Merge(merge::Args),
    Methods(methods::Args),
    Plan(plan::Args),
    Compare(compare::Args),
    Adapters(adapters::Args),
}

/// Parses the arguments of the process, runs the command and tells what went wrong.
///
/// Exit codes: 0 done, 2 bad input (arguments, configuration, data, files), 1 a failure while working, 130 and 143 stopped by SIGINT and SIGTERM
/// with everything saved.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Pretrain(args) => pretrain::run(args),
        Command::Finetune(args) => finetune::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Export(args) => export::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Methods(args) => methods::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Adapters(args) => adapters::run(args),
    };
    match done {
        Ok(code) => code,
        // Who reads our output has seen enough: that is no failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let input = error.downcast_ref::<JobError>().is_some_and(JobError::is_input);
            ExitCode::from(if input { 2 } else { 1 })
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints a text to the standard output.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Lines with columns as wide as their widest cell; the last column is as wide as it wants.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
