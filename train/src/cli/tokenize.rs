//! `lowrank tokenize`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::output::print;
use crate::build::{BuildError, Listener, prepare_options};
use crate::config::{Config, Layers, bytes, count};
use crate::data::{Shards, tokenize};
use crate::run::report::Console;

/// Turn text into token files once, to train on them often.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank tokenize --data books/ --out tokens/books
  lowrank tokenize --data stories.jsonl --set data.field=story --tokenizer tokenizer.json --out tokens/stories
  lowrank pretrain --data tokens/books")]
pub struct Args {
    /// Text: a file or folder; may be repeated; without it the sources of the burn crates
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// tokenizer.json, or `bytes`; without it one is trained on the data
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<String>,
    /// Ids of a trained tokenizer
    #[arg(long)]
    vocab_size: Option<u32>,
    /// A setting of the data or tokenizer section, as section.key=value; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// New folder for the token files
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Show warnings and errors only
    #[arg(long)]
    quiet: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = config(&args).map_err(BuildError::from)?;
    let options = prepare_options(&config)?;
    let mut console = Console::new(args.quiet);
    let mut begun = None;
    tokenize(&options, &args.out, &mut |progress| {
        if begun != Some(progress.stage) {
            begun = Some(progress.stage);
            console.begin("tokenizing", progress.total);
        }
        console.advance(progress.done);
    })
    .map_err(BuildError::from)?;
    console.end();
    if !args.quiet {
        for side in ["train", "validation"] {
            let shards = Shards::open(&args.out.join(side)).map_err(BuildError::from)?;
            let (documents, tokens, text) =
                (count(shards.documents()), count(shards.len()), bytes(shards.text_bytes()));
            print(&format!("{side}: {documents} documents, {tokens} tokens, {text} of text\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn config(args: &Args) -> Result<Config, crate::config::ConfigError> {
    let mut layers = Layers::default();
    for setting in &args.set {
        layers.set(setting)?;
    }
    if !args.data.is_empty() {
        let paths = args.data.iter().map(|path| path.to_string_lossy().into_owned()).collect::<Vec<_>>();
        layers.flag("--data", "data.path", paths);
    }
    if let Some(tokenizer) = &args.tokenizer {
        layers.flag("--tokenizer", "tokenizer.path", tokenizer.as_str());
    }
    if let Some(vocab_size) = args.vocab_size {
        layers.flag("--vocab-size", "tokenizer.vocab_size", vocab_size);
    }
    layers.resolve(&Config::default())
}
