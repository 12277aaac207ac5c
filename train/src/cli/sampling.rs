//! Choice of tokens, and text that is shown while it is written.

use std::io::Write;

use lowrank_models::Sampling;
use lowrank_models::hub::Generation;

use crate::build::BuildError;
use crate::data::Tokenizer;

/// How the next token is chosen. What is not given follows the model's `generation_config.json`.
#[derive(Debug, clap::Args)]
pub struct SamplingArgs {
    /// Divides the logits; 0 is greedy. Not given: what the model's generation_config.json says, or 0.8
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Keep the k most likely tokens; 0 keeps all. Not given: what generation_config.json says, or 50
    #[arg(long)]
    top_k: Option<usize>,
    /// Keep the most likely tokens whose probabilities reach this sum. Not given: what generation_config.json says, or 0.95
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Divides the logits of tokens that have occurred; 1 changes nothing. Not given: what generation_config.json says, or 1
    #[arg(long, allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Always take the most likely token, whatever generation_config.json says
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    greedy: bool,
}

impl SamplingArgs {
    /// Returns the checked settings for a model with these recommended ones. Reports those of them that are not followed.
    pub fn settings(&self, recommended: &Generation) -> Result<Sampling, BuildError> {
        let greedy = self.greedy || self.temperature == Some(0.0);
        let usual = match greedy {
            true => Sampling::greedy(),
            false => recommended.over(Sampling::default()),
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(usual.temperature),
            top_k: self.top_k.unwrap_or(usual.top_k),
            top_p: self.top_p.unwrap_or(usual.top_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(usual.repetition_penalty),
            seed: self.seed,
        };
        sampling.validate()?;
        if !greedy && !recommended.others.is_empty() {
            eprintln!("warning: generation_config.json: {} not followed", recommended.others.join(", "));
        }
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
