//! Text that the model writes.

use burn::module::Module;
use lowrank_models::{Llama, Sampling, generate};

use super::TrainError;
use crate::data::Tokenizer;

/// Prompt and continuation by the model as it stands, at most `tokens` new tokens.
pub fn sample_text(
    model: &Llama,
    tokenizer: &Tokenizer,
    prompt: &str,
    tokens: usize,
    sampling: &Sampling,
) -> Result<String, TrainError> {
    let separator = tokenizer.separator();
    let mut ids = vec![separator as i32];
    ids.extend(tokenizer.encode(prompt)?.into_iter().map(|id| id as i32));
    let room = model.config().max_position_embeddings.saturating_sub(ids.len());
    let new = generate(&model.valid(), &ids, tokens.min(room), sampling, |id| id != separator as i32)?;
    ids.extend(new);
    let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    Ok(tokenizer.decode(&ids)?)
}
