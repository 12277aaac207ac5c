//! `lowrank revert`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::adapter::compose::Source;
use lowrank_models::hub::compose::PoolFolder;
use lowrank_models::hub::peft::PlainLora;

use super::folder;
use super::output::print;
use crate::build::BuildError;

/// Rebuild an adapter from a pool that `lowrank compose --method rmm` wrote, as a plain LoRA folder.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  lowrank revert --pool pool --name french --out french")]
pub struct Args {
    /// Folder of the pool
    #[arg(long, value_name = "DIR")]
    pool: PathBuf,
    /// Name of the adapter in the pool; `lowrank inspect` lists them
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Folder to write; it must not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    folder::refuse_existing(&args.out)?;
    let mut pool = PoolFolder::open(&args.pool).map_err(BuildError::from)?;
    let number = pool.number(&args.name).map_err(BuildError::from)?;
    let paths: Vec<String> = pool.layers().map(|(path, ..)| path.to_string()).collect();
    folder::whole(&args.out, |dir| {
        let settings = pool.settings().plain;
        let plain = PlainLora::create(dir).map_err(BuildError::from)?;
        let mut plain = plain.with_embeddings(settings.embeddings.clone());
        for path in &paths {
            let (a, b, scale) = pool.take(path).map_err(BuildError::from)?.revert(number);
            let source = Source { adapter: args.name.clone(), a, b, scale, weight: None, basis: None };
            plain.push(path, &source.factors()).map_err(BuildError::from)?;
        }
        Ok(plain.finish(settings).map_err(BuildError::from)?)
    })?;
    print(&format!("{}\n", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
