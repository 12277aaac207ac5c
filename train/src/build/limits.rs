//! Sizes of a run compared with the memory of the machine, before anything is allocated.

use lowrank_models::{BaseStorage, LlamaConfig};
use lowrank_optim::WeightStorage;

use super::BuildError;
use crate::config::{Config, Job, bytes};

/// Memory that no machine has: larger sizes are a mistake, even if nothing is allocated.
pub const BEYOND_ANY_MACHINE: u64 = 1 << 44;

/// Rejects a model or a micro-batch whose minimum memory exceeds the available memory.
///
/// The minimum counts weights in their storage and the hidden states of one layer. The ranges of the keys keep all products below
/// 2^127.
pub fn check_sizes(config: &Config, llama: &LlamaConfig, memory: u64) -> Result<(), BuildError> {
    let product = |factors: &[usize]| factors.iter().map(|factor| *factor as u128).product::<u128>();
    let weights = least_bytes(config, llama.parameters() as u128);
    if weights > u128::from(memory) {
        return Err(BuildError::Settings(format!(
            "model: hidden_size = {}, num_hidden_layers = {} and a vocabulary of {} make {} of weights, more than the {} there are; use a smaller model",
            llama.hidden_size,
            llama.num_hidden_layers,
            llama.vocab_size,
            shown(weights),
            bytes(memory)
        )));
    }
    let (batch, seq_len) = (config.train.batch, config.train.seq_len);
    let states = 4 * product(&[batch, seq_len, llama.hidden_size]);
    if weights + states > u128::from(memory) {
        return Err(BuildError::Settings(format!(
            "train.batch = {batch} and train.seq_len = {seq_len} make {} of hidden states in each layer of width {}, more than the {} there are; lower one of them",
            shown(states),
            llama.hidden_size,
            bytes(memory)
        )));
    }
    Ok(())
}

/// Shortens rows to the model's positions; returns their length if it changed.
pub fn usual_length(config: &mut Config, llama: &LlamaConfig) -> Option<usize> {
    let positions = llama.longest_sequence();
    let shorter = config.train.seq_len > positions;
    config.train.seq_len = config.train.seq_len.min(positions);
    shorter.then_some(positions)
}

/// Rejects rows that are longer than the model's positions.
pub fn check_length(config: &Config, llama: &LlamaConfig) -> Result<(), BuildError> {
    let (seq_len, positions) = (config.train.seq_len, llama.longest_sequence());
    match seq_len > positions {
        true => Err(BuildError::Settings(format!(
            "train.seq_len = {seq_len} is longer than the model's {positions} positions; shorten it or raise model.max_position_embeddings"
        ))),
        false => Ok(()),
    }
}

/// Bytes that this number of weights takes at least.
fn least_bytes(config: &Config, parameters: u128) -> u128 {
    let adapted = config.run.job == Job::Finetune && config.adapter.name != "none";
    let bits = match (adapted, config.weights.base, config.weights.storage) {
        (true, BaseStorage::F32, _) | (false, _, WeightStorage::F32) => 32,
        (true, BaseStorage::Nf4, _) => 4,
        (true, BaseStorage::Int8 | BaseStorage::Q8_0, _) | (false, _, WeightStorage::Int8) => 8,
        // A file may hold codes of two bits.
        (true, BaseStorage::File | BaseStorage::Blocks(_), _) => 2,
        _ => 16,
    };
    bits * parameters / 8
}

fn shown(count: u128) -> String {
    bytes(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_beyond_the_memory_are_rejected_by_the_keys_that_make_them() {
        let llama = LlamaConfig::named("llama-9m", 4096).unwrap();
        let mut config = Config::default();
        assert!(check_sizes(&config, &llama, 1 << 30).is_ok());
        let refusal =
            |config: &Config, llama: &LlamaConfig| check_sizes(config, llama, 1 << 30).unwrap_err().to_string();
        config.train.batch = 65_536;
        config.train.seq_len = 16_777_216;
        assert!(refusal(&config, &llama).contains("train.batch = 65536 and train.seq_len = 16777216"));
        let wide = LlamaConfig { hidden_size: 131_072, vocab_size: 16_777_216, num_hidden_layers: 1024, ..llama };
        assert!(refusal(&config, &wide).contains("hidden_size = 131072"));
    }
}
