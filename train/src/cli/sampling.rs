//! Choice of tokens, and text that is shown while it is written.

use std::io::Write;

use lowrank_models::Sampling;

use crate::build::BuildError;
use crate::data::Tokenizer;

/// How the next token is chosen.
#[derive(Debug, clap::Args)]
pub struct SamplingArgs {
    /// Divides the logits; 0 is greedy
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f64,
    /// Keep the k most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 50)]
    top_k: usize,
    /// Keep the most likely tokens whose probabilities reach this sum
    #[arg(long, default_value_t = 0.95, allow_negative_numbers = true)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Always take the most likely token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    greedy: bool,
}

impl SamplingArgs {
    /// Returns the checked settings.
    pub fn settings(&self) -> Result<Sampling, BuildError> {
        let sampling = match self.greedy {
            true => Sampling::greedy(),
            false => Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed },
        };
        sampling.validate()?;
        Ok(sampling)
    }
}

/// Text of ids, shown as far as further ids cannot change it.
pub struct Shown<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Bytes of the text that have been shown.
    shown: usize,
}

impl<'a> Shown<'a> {
    /// Starts with ids whose text is shown with the first new one.
    pub fn new(tokenizer: &'a Tokenizer, ids: Vec<u32>) -> Self {
        Self { tokenizer, ids, shown: 0 }
    }

    /// Adds an id and shows the text that it completes. A character may need several: text that may still change is held
    /// back.
    pub fn push(&mut self, id: u32, out: &mut impl Write) -> anyhow::Result<()> {
        self.ids.push(id);
        let text = self.text()?;
        let ready = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        out.write_all(&text.as_bytes()[self.shown.min(ready)..ready])?;
        self.shown = ready.max(self.shown);
        Ok(out.flush()?)
    }

    /// Returns the whole text, without special tokens.
    pub fn text(&self) -> Result<String, BuildError> {
        Ok(self.tokenizer.decode(&self.ids)?)
    }
}
