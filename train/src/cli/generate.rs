//! `lowrank generate`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use lowrank_models::generate;
use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::peft::XLora;

use super::on_model::{Adapters, Storage};
use super::sampling::{SamplingArgs, Shown};
use crate::build::BuildError;
use crate::data::{Conversation, DataError, Json};
use crate::process::device;
use crate::recipe::ModelText;

/// Let a model continue a text.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank generate --model runs/pretrain-001/checkpoints/step-001500 --prompt \"fn main() {\"
  lowrank generate --model SmolLM2-135M --prompt \"The capital of France is\" --greedy --tokens 32
  lowrank generate --model SmolLM2-135M --adapter runs/SmolLM2-135M-lora-001/checkpoints/step-000300 --chat \"Who are you?\"
  lowrank generate --model SmolLM2-135M-Instruct --system \"Answer in one word\" --chat \"The capital of France?\"

Special tokens in a prompt mean themselves, and the tokenizer puts before it what it puts before every text.")]
pub struct Args {
    /// Checkpoint or Hugging Face model folder, or GGUF file
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    adapters: Adapters,
    #[command(flatten)]
    storage: Storage,
    /// Text to continue
    #[arg(long, default_value = "", conflicts_with_all = ["chat", "messages"])]
    prompt: String,
    /// Message to answer, written as the model's chat template has it
    #[arg(long, value_name = "MESSAGE", conflicts_with = "messages")]
    chat: Option<String>,
    /// JSON file with a conversation to answer: a list of turns, or an object with messages and tools
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
    /// Message of the system before that of --chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Special tokens in --prompt are text
    #[arg(long, conflicts_with_all = ["chat", "messages"])]
    no_special: bool,
    /// New tokens at most
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// cpu, or a GPU of a build with that feature
    #[arg(long, default_value = "cpu")]
    device: String,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let device = device(&args.device).map_err(BuildError::from)?;
    let folder = ModelFolder::open(&args.model).map_err(BuildError::from)?;
    let text = ModelText::read(&args.model, &folder.config)?;
    let sampling = args.sampling.settings(&text.generation)?;
    let model = args.storage.load(&folder, &device)?;
    let mixture = match args.adapters.paths() {
        [dir] if XLora::is_in(dir) => Some(XLora::open(dir, model.clone()).map_err(BuildError::from)?),
        _ => None,
    };
    let model = if mixture.is_some() { model } else { args.adapters.on(model)? };

    let asked = match (&args.chat, &args.messages) {
        (Some(message), _) => Some(Conversation::asking(args.system.as_deref(), message)),
        (None, Some(path)) => Some(conversation(path)?),
        (None, None) => None,
    };
    let ids = match &asked {
        Some(asked) => text.chat_prompt(asked)?,
        None => text.prompt(&args.prompt, !args.no_special)?,
    };
    let prompt: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    // The question is not part of the answer.
    let mut shown = Shown::new(&text.tokenizer, if asked.is_some() { Vec::new() } else { ids });
    let mut out = std::io::stdout().lock();
    let mut failed = None;
    let each = |id: i32| {
        failed = shown.push(id as u32, &mut out).err();
        failed.is_none() && !text.ends.contains(&(id as u32))
    };
    match &mixture {
        Some(mixture) => mixture.generate(&prompt, args.tokens, &sampling, each),
        None => generate(&model, &prompt, args.tokens, &sampling, each),
    }
    .map_err(BuildError::from)?;
    match failed {
        Some(error) => Err(error),
        None => {
            writeln!(out).context("writing the text")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Reads the conversation in a file.
fn conversation(path: &Path) -> Result<Conversation, BuildError> {
    let bytes = std::fs::read(path).map_err(DataError::read(path))?;
    let bad = |problem: String| DataError::Template { path: path.to_path_buf(), problem };
    let json: Json = serde_json::from_slice(&bytes).map_err(|error| bad(format!("not JSON: {error}")))?;
    Ok(Conversation::of_file(&json).map_err(bad)?)
}
