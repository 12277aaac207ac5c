//! Scores of single examples, for evaluation.

use burn::tensor::Device;
use lowrank_models::{Llama, ModelError, Sampling, generate, ids_tensor};

use super::Evaluation;
use crate::data::{Example, IGNORE};

/// Loss of one example. It is a batch of its own, so that the result does not depend on others.
pub fn example_loss(model: &Llama, example: &Example, device: &Device) -> Evaluation {
    let (inputs, targets) = (ids_tensor(&example.inputs, 1, device), ids_tensor(&example.targets, 1, device));
    let nats = f64::from(model.loss_sum(inputs, targets, None).into_scalar::<f32>());
    Evaluation { nats, tokens: example.learned() as u64 }
}

/// Tokens of examples that are scored together.
const TOGETHER: usize = 2048;

/// Losses of examples, several of which make a batch: weights are read once for all of them.
pub fn example_losses(model: &Llama, examples: &[Example], device: &Device) -> Vec<Evaluation> {
    let longest = examples.iter().map(|example| example.inputs.len()).max().unwrap_or_default().max(1);
    let mut losses = Vec::with_capacity(examples.len());
    for examples in examples.chunks((TOGETHER / longest).max(1)) {
        let padded = |ids: fn(&Example) -> &Vec<i32>, by: i32| {
            let mut rows = Vec::with_capacity(examples.len() * longest);
            for (number, example) in examples.iter().enumerate() {
                rows.extend(ids(example));
                rows.resize((number + 1) * longest, by);
            }
            ids_tensor(&rows, examples.len(), device)
        };
        let (inputs, targets) = (padded(|example| &example.inputs, 0), padded(|example| &example.targets, IGNORE));
        for (example, nats) in examples.iter().zip(model.row_losses(inputs, targets)) {
            losses.push(Evaluation { nats: nats.into_scalar::<f32>().into(), tokens: example.learned() as u64 });
        }
    }
    losses
}

/// The last answer of an example: the tokens before it, and its own.
pub fn last_answer(example: &Example) -> (&[i32], &[i32]) {
    let end = example.targets.iter().rposition(|target| *target != IGNORE).map_or(0, |last| last + 1);
    let begin = example.targets[..end].iter().rposition(|target| *target == IGNORE).map_or(0, |before| before + 1);
    (&example.inputs[..(begin + 1).min(example.inputs.len())], &example.targets[begin..end])
}

/// The most likely continuation of a prompt, without the token that ends it.
pub fn greedy_answer(model: &Llama, prompt: &[i32], most: usize, ends: &[u32]) -> Result<Vec<u32>, ModelError> {
    let mut answer = Vec::new();
    generate(model, prompt, most, &Sampling::greedy(), |id| {
        let ended = ends.contains(&(id as u32));
        if !ended {
            answer.push(id as u32);
        }
        !ended
    })?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_models::LlamaConfig;

    #[test]
    fn examples_of_a_batch_have_the_losses_of_each_alone() {
        let device = Device::default();
        let config = LlamaConfig::named("llama-9m", 40).unwrap();
        let config = LlamaConfig { num_hidden_layers: 2, ..config };
        let model = Llama::random(&config, 3, &device).unwrap();
        let example = |length: usize| {
            let ids: Vec<i32> = (0..=length).map(|i| ((i * 7 + length) % 40) as i32).collect();
            let targets = ids[1..].iter().enumerate().map(|(i, id)| if i < length / 2 { IGNORE } else { *id });
            Example { inputs: ids[..length].to_vec(), targets: targets.collect(), fields: None }
        };
        // Too long for one batch, of one length, and of several.
        for lengths in [vec![900, 3, 1000, 70], vec![12; 4], vec![5, 9, 1]] {
            let examples: Vec<Example> = lengths.into_iter().map(example).collect();
            let together = example_losses(&model, &examples, &device);
            assert_eq!(together.len(), examples.len());
            for (together, example) in together.iter().zip(&examples) {
                let alone = example_loss(&model, example, &device);
                assert_eq!(together.tokens, alone.tokens);
                assert!((together.nats - alone.nats).abs() <= 1e-5 * alone.nats, "{together:?} {alone:?}");
            }
        }
        assert!(example_losses(&model, &[], &device).is_empty());
    }

    #[test]
    fn the_last_answer_follows_all_that_stands_before_it() {
        let example = Example { inputs: vec![1, 2, 3, 4, 5], targets: vec![2, IGNORE, IGNORE, 5, 6], fields: None };
        assert_eq!(last_answer(&example), (&[1, 2, 3, 4][..], &[5, 6][..]));
        let whole = Example { inputs: vec![1, 2], targets: vec![2, 3], fields: None };
        assert_eq!(last_answer(&whole), (&[1][..], &[2, 3][..]));
    }
}
