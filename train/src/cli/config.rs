//! `lowrank config`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use super::output::print;
use crate::build::BuildError;
use crate::config::{Config, Job, Layers, documentation, schema};

/// Show the configuration of a run, or its JSON schema.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank config schema > lowrank.schema.json
  lowrank config show --set optimizer.name=galore --set optimizer.options.rank=64
  lowrank config show finetune --config run.toml

With `#:schema lowrank.schema.json` as the first line of a TOML file, editors complete its keys and show their documentation.
docs/configuration.md lists all keys, `lowrank methods NAME` the options of a method.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the JSON schema of configuration files
    Schema,
    /// Print all keys with defaults, allowed values and meaning, as the page docs/configuration.md
    Keys,
    /// Print the whole configuration that settings lead to, as a file for --config
    Show {
        /// Command that the configuration is for: pretrain or finetune
        #[arg(default_value = "pretrain", value_parser = ["pretrain", "finetune"])]
        job: String,
        /// File with settings (TOML)
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// A setting, as section.key=value; may be repeated
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Schema => print(&format!("{:#}\n", schema()))?,
        Command::Keys => print(&documentation())?,
        Command::Show { job, config, set } => {
            let job = if job == "finetune" { Job::Finetune } else { Job::Pretrain };
            print(&resolved(job, config, &set).map_err(BuildError::from)?.to_toml())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn resolved(job: Job, file: Option<PathBuf>, settings: &[String]) -> Result<Config, crate::config::ConfigError> {
    let mut layers = Layers::default();
    if let Some(path) = file {
        layers.file(&path)?;
    }
    settings.iter().try_for_each(|setting| layers.set(setting))?;
    layers.resolve(&Config::of(job))
}
