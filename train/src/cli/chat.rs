//! `lowrank chat`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use lowrank_models::hub::ModelFolder;
use lowrank_models::{Llama, Sampling, generate};
use signal_hook::consts::SIGINT;

use super::on_model::{Adapters, Storage};
use super::sampling::{SamplingArgs, Shown};
use crate::build::BuildError;
use crate::data::Conversation;
use crate::process::device;
use crate::recipe::ModelText;

/// Talk with a model, in the format of its chat template.
///
/// Each line of the input is a message; the answer is printed as it is written. The conversation so far is part of every question. Ctrl-C stops an
/// answer, the end of the input (Ctrl-D) ends the program.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank chat --model SmolLM2-135M-Instruct
  lowrank chat --model SmolLM2-135M-Instruct-Q8_0.gguf --system \"Answer in one word\"
  lowrank chat --model SmolLM2-135M --adapter runs/SmolLM2-135M-lora-001/checkpoints/step-000300 --greedy
  echo \"The capital of France?\" | lowrank chat --model SmolLM2-135M-Instruct")]
pub struct Args {
    /// Checkpoint or Hugging Face model folder, or GGUF file
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    adapters: Adapters,
    #[command(flatten)]
    storage: Storage,
    /// Message of the system before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// New tokens of an answer at most
    #[arg(long, default_value_t = 512)]
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
    if text.template.is_none() {
        let problem = format!(
            "the model in {} has no chat template, so that a conversation has no form; continue texts with `lowrank generate --prompt`",
            args.model.display()
        );
        return Err(BuildError::Settings(problem).into());
    }
    let model = args.adapters.on(args.storage.load(&folder, &device)?)?;
    // From here on Ctrl-C ends no more than an answer.
    let stopped = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGINT, stopped.clone()).context("signals cannot be watched")?;
    let ends = text.all_ends()?;
    let mut chat = Chat {
        model,
        text,
        ends,
        sampling,
        tokens: args.tokens,
        conversation: Conversation::new(args.system.as_deref()),
        stopped,
    };
    let mut out = std::io::stdout().lock();
    let by_hand = std::io::stdin().is_terminal() && out.is_terminal();
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    loop {
        if by_hand {
            write!(out, "> ")?;
            out.flush()?;
        }
        line.clear();
        let read = input.read_line(&mut line);
        if read.map_err(|error| BuildError::Settings(format!("the input cannot be read: {error}")))? == 0 {
            break;
        }
        let message = line.trim();
        if !message.is_empty() {
            chat.answer(message, &mut out)?;
        }
    }
    if by_hand {
        writeln!(out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A conversation with a model.
struct Chat {
    model: Llama,
    text: ModelText,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    sampling: Sampling,
    tokens: usize,
    conversation: Conversation,
    /// Set by Ctrl-C.
    stopped: Arc<AtomicBool>,
}

impl Chat {
    /// Shows the answer to a message; both become part of the conversation, the answer as far as it was written.
    fn answer(&mut self, message: &str, out: &mut impl Write) -> anyhow::Result<()> {
        self.conversation.push("user", message);
        let prompt: Vec<i32> = self.text.chat_prompt(&self.conversation)?.into_iter().map(|id| id as i32).collect();
        let positions = self.model.config().longest_sequence();
        let room = positions.saturating_sub(prompt.len());
        if room == 0 {
            let problem = format!(
                "the conversation has {} tokens, and the model has {positions} positions; start a new one",
                prompt.len()
            );
            return Err(BuildError::Settings(problem).into());
        }
        self.stopped.store(false, Ordering::Relaxed);
        let mut shown = Shown::new(&self.text.tokenizer, Vec::new());
        let mut failed = None;
        generate(&self.model, &prompt, self.tokens.min(room), &self.sampling, |id| {
            if self.stopped.load(Ordering::Relaxed) || self.ends.contains(&(id as u32)) {
                return false;
            }
            failed = shown.push(id as u32, out).err();
            failed.is_none()
        })
        .map_err(BuildError::from)?;
        if let Some(error) = failed {
            return Err(error);
        }
        writeln!(out)?;
        out.flush()?;
        self.conversation.push("assistant", &shown.text()?);
        // Another answer to the same words draws other numbers.
        self.sampling.seed = self.sampling.seed.wrapping_add(1);
        Ok(())
    }
}
