//! Tokenizer, chat template and end-of-text tokens of a model folder.

use std::path::Path;

use lowrank_models::hub::{Generation, HubConfig};

use crate::build::BuildError;
use crate::data::{ChatTemplate, Conversation, DataError, Tokenizer};

/// Conversion between texts and the tokens of a model.
pub struct ModelText {
    /// Tokenizer of the model.
    pub tokenizer: Tokenizer,
    /// Chat template of the model, if it has one.
    pub template: Option<ChatTemplate>,
    /// Tokens that end a generated text, as named by `generation_config.json` or `config.json`.
    pub ends: Vec<u32>,
    /// Settings of generation that come with the model.
    pub generation: Generation,
    name: String,
}

/// Maximum number of tokenizer ids beyond the rows of the embedding: padding tokens that were added and never trained.
fn most_beyond(rows: usize) -> usize {
    16.max(rows / 50)
}

/// Rejects a tokenizer with far more ids than the embedding has rows, and warns about one with a few more.
pub fn check_vocabulary(ids: usize, rows: usize, folder: &Path) -> Result<Option<String>, BuildError> {
    match ids.saturating_sub(rows) {
        0 => Ok(None),
        beyond if beyond <= most_beyond(rows) => Ok(Some(format!(
            "the tokenizer has {ids} ids, the model in {} an embedding for {rows}; texts with the last {beyond} are refused",
            folder.display()
        ))),
        _ => Err(BuildError::Settings(format!(
            "the tokenizer has {ids} ids, the model in {} has an embedding for {rows}; use the model's own tokenizer",
            folder.display()
        ))),
    }
}

impl ModelText {
    /// Reads the files of a folder whose configuration is `hub`.
    pub fn read(folder: &Path, hub: &HubConfig) -> Result<Self, BuildError> {
        let generation = Generation::read(folder)?;
        Ok(Self {
            tokenizer: Tokenizer::from_file(&folder.join("tokenizer.json"))?,
            template: ChatTemplate::read(folder)?,
            ends: hub.end_tokens(&generation.ends),
            generation,
            name: folder.display().to_string(),
        })
    }

    /// Token added after each training text: the tokenizer's own end token, if it also ends a generated text.
    pub fn end(&self) -> Result<u32, BuildError> {
        let own = self.tokenizer.eos().filter(|eos| self.ends.is_empty() || self.ends.contains(eos));
        let end = own.or(self.ends.first().copied()).or(self.tokenizer.eos()).or(self.tokenizer.separator());
        end.ok_or_else(|| {
            BuildError::Settings(format!(
                "{} names no token that ends a text; set eos_token_id in its config.json",
                self.name
            ))
        })
    }

    /// Tokens that end a generated text; at least the one that ends training texts.
    pub fn all_ends(&self) -> Result<Vec<u32>, BuildError> {
        if self.ends.is_empty() { Ok(vec![self.end()?]) } else { Ok(self.ends.clone()) }
    }

    /// Ids of a text to continue, including the tokens that the tokenizer adds before it. Special tokens are recognised
    /// if `special` is set.
    pub fn prompt(&self, text: &str, special: bool) -> Result<Vec<u32>, BuildError> {
        let ids = match special {
            true => self.tokenizer.with_special_tokens().encode_whole(text)?,
            false => self.tokenizer.encode_whole(text)?,
        };
        match (ids.is_empty(), self.tokenizer.separator()) {
            (true, Some(separator)) => Ok(vec![separator]),
            _ => Ok(ids),
        }
    }

    /// Ids of a conversation and the start of an answer, as written by the template.
    pub fn chat_prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, BuildError> {
        let Some(template) = &self.template else {
            return Err(BuildError::Settings(format!(
                "the model in {} has no chat template; write the conversation with --prompt",
                self.name
            )));
        };
        let text = template
            .prompt(conversation)
            .map_err(|problem| DataError::Template { path: Path::new(&self.name).to_path_buf(), problem })?;
        Ok(self.tokenizer.with_special_tokens().encode(&text)?)
    }
}
