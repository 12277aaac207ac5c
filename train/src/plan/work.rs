//! Work of a step: floating-point operations of its products, and how many of them this machine does in a second.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use lowrank_models::{LlamaConfig, ops};

use crate::config::Config;
use crate::engine::BackwardMode;

/// Floating-point operations of the products in a step; a multiplication and an addition count as two.
pub fn operations(config: &Config, llama: &LlamaConfig) -> u64 {
    let train = &config.train;
    let (batch, length) = (train.batch, train.seq_len);
    let rows = batch * length;
    let method = llama.parameterization.method();
    let sum = |all: [u64; 2], one: [u64; 2]| [all[0] + one[0], all[1] + one[1]];
    let layers = llama.block_shapes().map(|shape| method.operations(shape, rows)).fold([0; 2], sum);
    // Scores and their product with the values, below the diagonal; the backward pass has five such products.
    let scores = (batch * length * length * llama.num_attention_heads * llama.head_dim) as u64;
    let [forward, backward] = sum(layers, [2 * scores, 5 * scores]);
    // All modes but the first run the blocks forward again.
    let passes = if train.backward == BackwardMode::Whole { 1 } else { 2 };
    let blocks = llama.num_hidden_layers as u64 * (passes * forward + backward);
    let head = 6 * (rows * llama.hidden_size * llama.vocab_size) as u64;
    train.accumulation as u64 * (blocks + head)
}

/// Floating-point operations a second of the products of a step, measured for `time` on the widest layers of a block.
pub fn speed(config: &Config, llama: &LlamaConfig, time: Duration) -> f64 {
    let device = Device::default();
    let (rows, shape) = (config.train.batch * config.train.seq_len, [llama.hidden_size, llama.intermediate_size]);
    let x = Tensor::<2>::ones([rows, shape[0]], &device);
    let weight = Tensor::<2>::ones(shape, &device);
    let multiply = || drop(ops::linear(x.clone(), weight.clone()).into_data());
    multiply();
    let (begin, mut count) = (Instant::now(), 0u64);
    while begin.elapsed() < time {
        multiply();
        count += 1;
    }
    (count * 2 * (rows * shape[0] * shape[1]) as u64) as f64 / begin.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use lowrank_models::linear::ParameterizationEntry;
    use lowrank_optim::registry::Options;

    use super::*;

    #[test]
    fn operations_are_six_for_a_weight_and_token_and_fewer_with_factors() {
        let mut config = Config::default();
        (config.train.batch, config.train.seq_len, config.train.accumulation) = (1, 2, 3);
        let llama = LlamaConfig::named("llama-9m", 100).expect("a known shape");
        let dense: usize = llama.block_shapes().map(|[d_in, d_out]| d_in * d_out).sum();
        let weights = (llama.num_hidden_layers * dense + llama.hidden_size * llama.vocab_size) as u64;
        let scores = llama.num_hidden_layers as u64 * 7 * (2 * 2 * llama.hidden_size) as u64;
        assert_eq!(operations(&config, &llama), 3 * (6 * 2 * weights + scores));

        config.train.backward = BackwardMode::Checkpointed;
        let again = llama.num_hidden_layers as u64 * (2 * 2 * dense as u64 + 2 * (2 * 2 * llama.hidden_size) as u64);
        assert_eq!(operations(&config, &llama), 3 * (6 * 2 * weights + scores + again));

        config.train.seq_len = 256;
        let of = |name: &str| {
            let options = Options::from_iter([("rank".to_string(), 8.into())]);
            let entry = ParameterizationEntry::find(name).expect("a parameterization");
            let parameterization = entry.parse(&options).expect("its options");
            operations(&config, &LlamaConfig { parameterization, ..llama.clone() })
        };
        let dense = operations(&config, &llama);
        assert!(of("low-rank") < dense / 2 && of("sltrain") > dense && of("relora") < dense);
    }
}
