//! What two parameterizations do with the layers of a whole model: the restarts of ReLoRA and the exact steps of LORO.

use burn::module::ParamId;
use burn::tensor::Tensor;
use lowrank_optim::OptimError;
use lowrank_optim::loro::{Factors, LoroSteps, exact_step};
use lowrank_optim::registry::OptionError;
use rayon::prelude::*;

use super::model::Llama;
use crate::linear::{Linear, LowRank, trained};

impl Llama {
    /// Restarts every ReLoRA layer; `number` counts restarts from 1. Returns the factors, whose moments are to be set back.
    pub fn restart(&mut self, seed: u64, number: u64) -> Vec<ParamId> {
        let mut factors = Vec::new();
        for (_, linear) in self.model.layers.iter_mut().flat_map(|block| block.linears_mut()) {
            if let Linear::ReLora(layer) = linear {
                layer.restart(layer.fresh(seed, number));
                factors.extend([layer.a.id, layer.b.id]);
            }
        }
        factors
    }

    /// Takes the exact steps whose directions the factors' optimizers have left behind. When one fails, none is taken.
    pub fn exact_steps(&mut self, steps: &LoroSteps) -> Result<(), OptimError> {
        let mut pairs = Vec::new();
        for (number, block) in self.model.layers.iter_mut().enumerate() {
            for (name, linear) in block.linears_mut() {
                let Linear::LowRank(layer) = linear else { continue };
                let first = steps.take(layer.a.id.val());
                let second = steps.take(layer.b.id.val());
                if let (Some((n, step)), Some((m, _))) = (first, second) {
                    let directions = Factors { m: m.transpose(), n };
                    pairs.push(Pair { path: format!("model.layers.{number}.{name}"), layer, directions, step });
                }
            }
        }
        let stepped = pairs.par_iter().map(Pair::stepped).collect::<Result<Vec<Factors>, _>>()?;
        for (pair, Factors { m, n }) in pairs.into_iter().zip(stepped) {
            pair.layer.a = trained(pair.layer.a.id, n);
            pair.layer.b = trained(pair.layer.b.id, contiguous(m.transpose()));
        }
        Ok(())
    }
}

/// A layer whose pair of factors has directions: `W = M N^T` is the transposed weight, so that `N` is the first factor and `M` the second, turned.
struct Pair<'a> {
    path: String,
    layer: &'a mut LowRank,
    directions: Factors,
    step: f64,
}

impl Pair<'_> {
    fn stepped(&self) -> Result<Factors, OptimError> {
        let factors = Factors { m: self.layer.b.val().inner().transpose(), n: self.layer.a.val().inner() };
        exact_step(&factors, &self.directions, self.step).map_err(|error| match error {
            OptimError::Option(OptionError::Value { key, value, reason }) => {
                OptionError::value(key, value, format!("in {} {reason}", self.path)).into()
            }
            other => other,
        })
    }
}

/// A turned matrix written out: a view would be copied at each product.
fn contiguous(x: Tensor<2>) -> Tensor<2> {
    let (data, device) = (x.to_data(), x.device());
    Tensor::from_data(data, &device)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::weights::uniform_values;
    use crate::{LlamaConfig, Parameterization};
    use burn::tensor::{Device, TensorData};
    use lowrank_optim::Keep;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn draw(shape: [usize; 2], seed: u64) -> Tensor<2> {
        let values = uniform_values(&mut StdRng::seed_from_u64(seed), shape[0] * shape[1], 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Device::default()).autodiff()
    }

    #[test]
    fn a_restart_of_the_model_keeps_its_loss_and_names_the_factors() {
        let config = LlamaConfig {
            hidden_size: 16,
            intermediate_size: 24,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 8,
            num_hidden_layers: 2,
            parameterization: Parameterization::ReLora {
                rank: 4,
                alpha: 8.0,
                reset_every: 5,
                restart_warmup: 1,
                reset: Keep::Nothing,
                trained_scale: false,
            },
            ..LlamaConfig::named("llama-9m", 40).unwrap()
        };
        let mut model = Llama::random(&config, 3, &Device::default().autodiff()).unwrap();
        for linear in model.model.layers.iter_mut().flat_map(|block| block.linears_mut().map(|(_, linear)| linear)) {
            let Linear::ReLora(layer) = linear else { panic!("all layers are ReLoRA's") };
            layer.b = trained(layer.b.id, draw(layer.b.dims(), 5).inner().mul_scalar(0.1));
        }
        let ids = crate::ids_tensor(&(0..24).collect::<Vec<i32>>(), 2, &Device::default());
        let loss = |model: &Llama| model.loss_sum(ids.clone(), ids.clone(), None).into_scalar::<f32>() / 24.0;
        let before = loss(&model);
        let factors = model.restart(9, 1);
        assert_eq!(factors.len(), 2 * 2 * 7);
        assert!((loss(&model) - before).abs() <= 1e-5, "{before} and {}", loss(&model));
    }
}
