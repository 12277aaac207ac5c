//! Gradients of base weights over some samples, before an adapter exists: the input of initialisations such as `lora-sb`.

use std::collections::BTreeMap;

use burn::module::{ModuleMapper, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use crate::segments::{ForwardPass, Rows, Segment, SegmentedModel, Walker, WeightedLoss, walk};
use crate::weights::host;
use lowrank_adapters::{AdapterConfig, AdapterError, BaseGradients, each_adapter, linear_weights};

/// Sums the gradients of the weights that a configuration adapts over the first `samples` rows of the batches; the last batch is cut.
///
/// The loss is the sum over all tokens, so that it does not matter how samples lie in batches. Only one block's gradients exist at a time,
/// in addition to the sums on the host. The model is unchanged, including its frozen parts.
pub fn collect_gradients<M: SegmentedModel>(
    model: &M,
    config: &AdapterConfig,
    samples: usize,
    batches: impl IntoIterator<Item = M::Batch>,
) -> Result<BaseGradients, AdapterError> {
    let found = linear_weights(model)?;
    let names: Vec<_> = found.values().cloned().collect();
    let chosen: Vec<String> = config.places(&names)?.into_iter().map(|place| place.path).collect();
    let mut adapted = Vec::new();
    each_adapter(model, |layer, _| adapted.push(layer.to_string()));
    if let Some(layer) = adapted.first() {
        return Err(AdapterError::Refused(format!(
            "{layer} has an adapter: gradients of the base weights are collected before adapters are attached; merge or remove it first"
        )));
    }
    if samples == 0 {
        return Err(AdapterError::Refused("gradients of the base weights need at least 1 sample, not 0".into()));
    }
    let paths: BTreeMap<ParamId, String> = found
        .into_iter()
        .filter(|(_, layer)| chosen.contains(&layer.path))
        .map(|(id, layer)| (id, layer.path))
        .collect();
    // A copy that shares the memory of the weights.
    let model = model.clone().map(&mut Track { paths: &paths });
    let mut sums = BaseGradients::new();
    let mut left = samples;
    let lowest = Segment::lowest_trained(&model);
    for batch in batches {
        let rows = batch.rows().min(left);
        let batch = batch.narrow(0, rows);
        let sum = |model: &M, x: M::Hidden| model.loss(x, &batch);
        let pass = ForwardPass { batch: &batch, losses: vec![WeightedLoss { sum: &sum, factor: 1.0 }] };
        if let Some(lowest) = lowest {
            let nats = walk(&[pass], lowest, &mut Sums { model: &model, paths: &paths, sums: &mut sums })?;
            if let Some(nats) = nats.into_iter().find(|nats| !nats.is_finite()) {
                return Err(AdapterError::Refused(format!(
                    "the loss of a sample is {nats}: its gradients say nothing"
                )));
            }
        }
        left -= rows;
        if left == 0 {
            return Ok(sums);
        }
    }
    Err(AdapterError::Refused(format!(
        "gradients of the base weights were asked for over {samples} samples; the data has {}",
        samples - left
    )))
}

/// Adds up the gradients that a walk over the model produces.
struct Sums<'a, M> {
    model: &'a M,
    paths: &'a BTreeMap<ParamId, String>,
    sums: &'a mut BaseGradients,
}

impl<M: SegmentedModel> Walker<M> for Sums<'_, M> {
    type Error = AdapterError;

    fn model(&self) -> &M {
        self.model
    }

    fn gradients(&mut self, _: Segment, grads: GradientsParams) -> Result<(), AdapterError> {
        keep(grads, self.paths, self.sums);
        Ok(())
    }
}

/// Moves gradients into the sums.
fn keep(mut grads: GradientsParams, paths: &BTreeMap<ParamId, String>, sums: &mut BaseGradients) {
    for (id, path) in paths {
        let Some(grad) = grads.remove::<2>(*id) else { continue };
        let grad = host(grad);
        match sums.get_mut(path) {
            Some(sum) => sum.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad),
            None => {
                sums.insert(path.clone(), grad);
            }
        }
    }
}

/// Tracks the adapted weights and nothing else.
struct Track<'a> {
    paths: &'a BTreeMap<ParamId, String>,
}

impl ModuleMapper for Track<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let tracked = self.paths.contains_key(&param.id);
        param.map(|tensor| tensor.autodiff().detach()).set_require_grad(tracked)
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::tensor::Device;

    use super::*;
    use crate::linear::Linear;
    use crate::llama::{LanguageBatch, Llama, LlamaConfig, ids_tensor};
    use lowrank_adapters::{Attach, Targets};

    fn model() -> Llama {
        let config = LlamaConfig {
            vocab_size: 32,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 8,
            ..LlamaConfig::named("llama-9m", 32).unwrap()
        };
        Llama::random(&config, 1, &Device::default().autodiff()).unwrap()
    }

    fn batches(rows: &[usize]) -> Vec<LanguageBatch> {
        let ids: Vec<i32> = (0..8 * 7).map(|i| (i * i + 3) % 32).collect();
        let device = Device::default();
        let mut from = 0;
        rows.iter()
            .map(|rows| {
                let part = |shift: usize| -> Vec<i32> {
                    ids[from * 7..(from + rows) * 7].chunks(7).flat_map(|row| row[shift..shift + 6].to_vec()).collect()
                };
                let batch = LanguageBatch {
                    inputs: ids_tensor(&part(0), *rows, &device),
                    targets: ids_tensor(&part(1), *rows, &device),
                    starts: None,
                };
                from += rows;
                batch
            })
            .collect()
    }

    fn config() -> AdapterConfig {
        AdapterConfig { init: "lora-sb".into(), ..AdapterConfig::new("lora-xs") }
            .with_rank(4)
            .with_targets(Targets::parse("q_proj,down_proj,lm_head"))
            .with_option("init_step_size", 1e-3)
    }

    fn largest(x: &[f32]) -> f32 {
        x.iter().fold(0.0, |largest, value| largest.max(value.abs()))
    }

    #[test]
    fn sums_are_those_of_the_whole_backward_pass_however_samples_lie_in_batches() {
        let model = model();
        let sums = collect_gradients(&model, &config(), 5, batches(&[2, 2, 2])).unwrap();
        assert_eq!(sums.len(), 5);
        let LanguageBatch { inputs, targets, .. } = batches(&[5]).remove(0);
        let mut whole = GradientsParams::from_grads(model.loss_sum(inputs, targets, None).backward(), &model);
        for (id, layer) in linear_weights(&model).unwrap() {
            let whole = host(whole.remove::<2>(id).unwrap());
            let Some(sum) = sums.get(&layer.path) else { continue };
            let rest: Vec<f32> = sum.iter().zip(&whole).map(|(a, b)| a - b).collect();
            assert!(largest(&rest) < 1e-5 * largest(&whole), "{}", layer.path);
        }
        let other = collect_gradients(&model, &config(), 5, batches(&[1, 3, 4])).unwrap();
        for (path, sum) in &sums {
            let floor = 1e-4 * largest(sum);
            assert!(sum.iter().zip(&other[path]).all(|(a, b)| a.abs() < floor || a.signum() == b.signum()), "{path}");
        }
    }

    #[test]
    fn a_frozen_model_stays_frozen_and_begins_where_the_first_step_would_end() {
        let model = Module::no_grad(model());
        let gradients = collect_gradients(&model, &config(), 2, batches(&[2])).unwrap();
        assert!(linear_weights(&model).unwrap().len() > gradients.len());
        let Linear::Dense(down) = &model.model.layers[0].mlp.down_proj else { unreachable!() };
        assert!(!down.weight.is_require_grad());
        let error = collect_gradients(&model, &config(), 9, batches(&[2])).unwrap_err().to_string();
        assert!(error.contains("9 samples") && error.contains("has 2"), "{error}");
        let error = Attach::new(config()).to(model.clone()).unwrap_err().to_string();
        assert!(error.contains("collect them"), "{error}");
        let before = gradients["model.layers.1.mlp.down_proj"].clone();
        let (model, _) = model.attach(Attach::new(config()).with_gradients(gradients)).unwrap();
        let mut found = Vec::new();
        each_adapter(&model, |layer, adapter| {
            if layer == "model.layers.1.mlp.down_proj" {
                found.push(host(
                    adapter.stack[0]
                        .structure()
                        .delta_weight(&Tensor::zeros([1, 1], &Device::default()))
                        .unwrap()
                        .inner(),
                ));
            }
        });
        // The part of the first step that lies in four directions points down the gradient.
        let along: f32 = found[0].iter().zip(&before).map(|(update, gradient)| update * gradient).sum();
        assert!(along < 0.0);
        let error = collect_gradients(&model, &config(), 2, batches(&[2])).unwrap_err().to_string();
        assert!(error.contains("before adapters"), "{error}");
    }
}
