//! `lowrank compare`.

mod adapters;
mod common;
mod comparison;
mod optimizers;
mod parameterizations;
mod search;
mod table;
mod trial;

use std::process::ExitCode;

/// Train the same model with several methods and compare them, each at its best learning rate.
///
/// Each run is one of `lowrank pretrain` or `lowrank finetune` in a folder of its own below --out; runs that are finished are not repeated, so a
/// comparison that was stopped continues where it was. A method that the settings do not allow is in the table with the reason.
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

/// Runs the comparison and prints the table.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.kind {
        Kind::Optimizers(args) => optimizers::run(args),
        Kind::Parameterizations(args) => parameterizations::run(args),
        Kind::Adapters(args) => adapters::run(args),
    }
}
