//! Text that the model writes.

use burn::module::Module;
use lowrank_models::{Llama, Sampling, generate};

use super::TrainError;
use crate::data::Tokenizer;

/// Prompt and continuation by the model as it stands, at most `tokens` new tokens and up to one of `ends`.
pub fn sample_text(
    model: &Llama,
    tokenizer: &Tokenizer,
    prompt: &[i32],
    ends: &[i32],
    tokens: usize,
    sampling: &Sampling,
) -> Result<String, TrainError> {
    let room = model.config().max_position_embeddings.saturating_sub(prompt.len());
    let new = generate(&model.valid(), prompt, tokens.min(room), sampling, |id| !ends.contains(&id))?;
    let ids: Vec<u32> = prompt.iter().chain(&new).map(|id| *id as u32).collect();
    Ok(tokenizer.decode(&ids)?)
}
