//! Continuing a text, token by token.

use burn::tensor::Tensor;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::cache::KvCache;
use super::model::{Llama, ids_tensor};
use crate::error::ModelError;
use crate::weights::host;

/// Choice of the next token from the logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most likely token.
    pub temperature: f64,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f64,
    /// Divides the positive logits of tokens that have occurred and multiplies their negative ones; 1 changes nothing ("CTRL: A Conditional
    /// Transformer Language Model for Controllable Generation", arXiv 1909.05858).
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 50, top_p: 0.95, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Always the most likely token; of equal ones the lowest id.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }

    /// Rejects settings outside their range.
    pub fn validate(&self) -> Result<(), ModelError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let message = format!("temperature is {}; it must be 0 (greedy) or greater", self.temperature);
            return Err(ModelError::Sampling(message));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let message = format!("top_p is {}; it must be greater than 0 and at most 1", self.top_p);
            return Err(ModelError::Sampling(message));
        }
        let penalty = self.repetition_penalty;
        if !(penalty.is_finite() && penalty > 0.0) {
            let message = format!("repetition_penalty is {penalty}; it must be greater than 0, and 1 for none");
            return Err(ModelError::Sampling(message));
        }
        Ok(())
    }

    /// Makes tokens that have occurred less likely.
    fn penalise(&self, logits: &mut [f32], occurred: &[bool]) {
        let penalty = self.repetition_penalty as f32;
        for (logit, _) in logits.iter_mut().zip(occurred).filter(|(_, occurred)| **occurred) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }

    fn pick(&self, logits: &[f32], random: &mut StdRng) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        if self.temperature == 0.0 {
            return order.into_iter().min_by(by_logit).unwrap_or_default();
        }
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, by_logit);
            order.truncate(self.top_k);
        }
        order.sort_unstable_by(by_logit);
        let top = f64::from(logits[order[0]]);
        let mut weights: Vec<f64> =
            order.iter().map(|id| ((f64::from(logits[*id]) - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let kept = weights.iter().position(|weight| {
            reached += weight;
            reached >= self.top_p * total
        });
        weights.truncate(kept.map_or(weights.len(), |last| last + 1));
        let mut draw = random.random::<f64>() * weights.iter().sum::<f64>();
        for (id, weight) in order.iter().zip(&weights) {
            draw -= weight;
            if draw < 0.0 {
                return *id;
            }
        }
        order[weights.len() - 1]
    }
}

/// Continues `prompt` by at most `tokens` tokens and passes each to `each`, which returns false to stop.
///
/// The model must be one for inference ([`Module::valid`](burn::module::Module::valid)): nothing is recorded for a backward pass.
/// Rejects a prompt that is empty or has ids outside the vocabulary, and a sum of tokens beyond the model's positions.
pub fn generate(
    model: &Llama,
    prompt: &[i32],
    tokens: usize,
    sampling: &Sampling,
    each: impl FnMut(i32) -> bool,
) -> Result<Vec<i32>, ModelError> {
    let device = model.model.embed_tokens.weight.val().device();
    let mut cache = KvCache::new();
    generate_by(
        model,
        prompt,
        tokens,
        sampling,
        // On a thread of the pool: between the many short products of one token, no other thread falls asleep and is woken up.
        |input| rayon::scope(|_| model.next_logits(ids_tensor(input, 1, &device), &mut cache)),
        each,
    )
}

/// As [`generate`], with another way to the logits `[1, vocab_size]` that follow the new tokens.
pub(crate) fn generate_by(
    model: &Llama,
    prompt: &[i32],
    tokens: usize,
    sampling: &Sampling,
    mut next_logits: impl FnMut(&[i32]) -> Tensor<2>,
    mut each: impl FnMut(i32) -> bool,
) -> Result<Vec<i32>, ModelError> {
    sampling.validate()?;
    model.check_ids(prompt)?;
    if prompt.is_empty() {
        return Err(ModelError::Sampling("the prompt has no token; start with the separator".into()));
    }
    let positions = model.config().longest_sequence();
    if prompt.len().saturating_add(tokens) > positions {
        return Err(ModelError::Sampling(format!(
            "{} tokens of prompt and {tokens} new ones are more than the model's {positions} positions; ask for fewer",
            prompt.len()
        )));
    }
    let mut random = StdRng::seed_from_u64(sampling.seed);
    let mut input = prompt.to_vec();
    let mut output = Vec::new();
    // None, where nothing is made less likely.
    let mut occurred = vec![false; if sampling.repetition_penalty == 1.0 { 0 } else { model.config().vocab_size }];
    for _ in 0..tokens {
        let mut logits = host(next_logits(&input));
        if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(ModelError::NotFinite { token: output.len() + 1, id, value: logits[id] });
        }
        if !occurred.is_empty() {
            input.iter().for_each(|id| occurred[*id as usize] = true);
            sampling.penalise(&mut logits, &occurred);
        }
        let next = sampling.pick(&logits, &mut random) as i32;
        output.push(next);
        if !each(next) {
            break;
        }
        input = vec![next];
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::LlamaConfig;
    use burn::tensor::Device;

    fn draws(sampling: &Sampling, logits: &[f32]) -> Vec<usize> {
        let mut random = StdRng::seed_from_u64(sampling.seed);
        let mut counts = vec![0; logits.len()];
        for _ in 0..4000 {
            counts[sampling.pick(logits, &mut random)] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equal_ones() {
        let mut random = StdRng::seed_from_u64(0);
        assert_eq!(Sampling::greedy().pick(&[0.0, 3.0, 1.0, 3.0], &mut random), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 0.5, top_k: 0, top_p: 1.0, seed: 3, ..Sampling::greedy() };
        let counts = draws(&sampling, &[0.0, 0.5, 1.0]);
        let weights = [1.0, 1f64.exp(), 2f64.exp()];
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            assert!((*count as f64 / 4000.0 - weight / total).abs() < 0.03, "{counts:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [2.0, 1.0, 0.0, -1.0];
        let counts =
            draws(&Sampling { temperature: 1.0, top_k: 2, top_p: 1.0, seed: 1, ..Sampling::greedy() }, &logits);
        assert!(counts[0] > 0 && counts[1] > 0 && counts[2..] == [0, 0], "{counts:?}");
        // softmax of the logits: 0.64, 0.24, 0.09, 0.03
        let counts =
            draws(&Sampling { temperature: 1.0, top_k: 0, top_p: 0.7, seed: 1, ..Sampling::greedy() }, &logits);
        assert!(counts[0] > 0 && counts[1] > 0 && counts[2..] == [0, 0], "{counts:?}");
        let counts =
            draws(&Sampling { temperature: 1.0, top_k: 0, top_p: 0.6, seed: 1, ..Sampling::greedy() }, &logits);
        assert_eq!(counts[1..], [0, 0, 0]);
    }

    #[test]
    fn tokens_that_have_occurred_become_less_likely() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        let mut logits = [3.0, 2.0, -1.0, -1.0];
        sampling.penalise(&mut logits, &[true, false, true, false]);
        assert_eq!(logits, [1.5, 2.0, -2.0, -1.0]);
        let model = Llama::random(&LlamaConfig::named("llama-9m", 40).unwrap(), 5, &Device::default()).unwrap();
        let strict = Sampling { repetition_penalty: 1e9, ..Sampling::greedy() };
        let mut ids = generate(&model, &[3, 17], 4, &strict, |_| true).unwrap();
        ids.extend([3, 17]);
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 6, "no token occurs twice while others are left");
    }

    #[test]
    fn cached_generation_equals_full_passes() {
        let device = Device::default();
        let mut config = LlamaConfig::named("llama-9m", 40).unwrap();
        (config.num_hidden_layers, config.num_key_value_heads, config.initializer_range) = (2, 2, 0.3);
        let model = Llama::random(&config, 5, &device).unwrap();
        let prompt = [3, 17, 29];
        let output = generate(&model, &prompt, 12, &Sampling::greedy(), |_| true).unwrap();
        let mut ids = prompt.to_vec();
        for token in output {
            let [_, positions, vocabulary] = model.logits(ids_tensor(&ids, 1, &device), None).dims();
            let logits = model.logits(ids_tensor(&ids, 1, &device), None);
            let last = logits.slice([0..1, positions - 1..positions]).reshape([1, vocabulary]);
            let mut random = StdRng::seed_from_u64(0);
            assert_eq!(Sampling::greedy().pick(&host(last), &mut random) as i32, token);
            ids.push(token);
        }
    }

    #[test]
    fn refusals_say_why() {
        let device = Device::default();
        let model = Llama::random(&LlamaConfig::named("llama-9m", 40).unwrap(), 5, &device).unwrap();
        let fail = |prompt: &[i32], tokens, sampling: Sampling| {
            generate(&model, prompt, tokens, &sampling, |_| true).unwrap_err().to_string()
        };
        assert!(fail(&[], 1, Sampling::greedy()).contains("no token"));
        assert!(fail(&[1, 40], 1, Sampling::greedy()).contains("token id 40 at position 1"));
        assert!(fail(&[1], 1024, Sampling::greedy()).contains("1024 positions"));
        assert!(fail(&[1], 1, Sampling { temperature: -1.0, ..Sampling::default() }).contains("temperature"));
        assert!(fail(&[1], 1, Sampling { top_p: 0.0, ..Sampling::default() }).contains("top_p"));
        let endless = Sampling { repetition_penalty: f64::INFINITY, ..Sampling::default() };
        assert!(fail(&[1], 1, endless).contains("repetition_penalty"));
    }
}
