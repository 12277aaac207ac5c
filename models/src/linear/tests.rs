//! Conformance of every parameterization of the list.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lowrank_optim::registry::{Options, optimizer};
use lowrank_optim::{ModulePath, ParameterRoles, StateMeter};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::Value;

use super::{Linear, OptimizerRequest, PARAMETERIZATIONS, Parameterization, ParameterizationEntry, RunFacts};
use crate::weights::{Builder, RandomWeights, host, uniform_values};
use crate::{Features, Llama, LlamaConfig, ids_tensor};

/// The parameterization with a rank of its own and other options as they are.
fn small(entry: &ParameterizationEntry) -> Parameterization {
    let rank = entry.spec().options().get("rank").is_some().then(|| ("rank".to_string(), Value::from(3)));
    entry.parse(&Options::from_iter(rank)).unwrap()
}

fn layer(parameterization: &Parameterization, shape: [usize; 2]) -> Linear {
    let mut source = RandomWeights { seed: 5, std: 0.3 };
    let device = Device::default().autodiff();
    Linear::build(&mut Builder::new(&mut source, &device), "layer", shape, false, parameterization).unwrap()
}

/// Elements of the trained tensors, the frozen ones and the positions, and the values by path.
#[derive(Default)]
struct Tensors {
    path: ModulePath,
    trained: BTreeMap<String, Vec<f32>>,
    frozen: BTreeMap<String, Vec<f32>>,
    positions: usize,
}

impl Tensors {
    fn of<M: Module>(module: &M) -> Self {
        let mut tensors = Self::default();
        module.visit(&mut tensors);
        tensors
    }
}

impl ModuleVisitor for Tensors {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensors = if param.is_require_grad() { &mut self.trained } else { &mut self.frozen };
        tensors.insert(self.path.joined(), host(param.val().inner()));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.positions += param.val().shape().num_elements();
    }
}

#[test]
fn layers_have_as_many_elements_as_their_parameterization_says() {
    for entry in PARAMETERIZATIONS {
        let parameterization = small(entry);
        for shape in [[12, 20], [20, 12], [9, 9]] {
            let tensors = Tensors::of(&layer(&parameterization, shape));
            let count = tensors.trained.values().map(Vec::len).sum::<usize>();
            let method = parameterization.method();
            let name = entry.spec().name;
            assert_eq!([count, tensors.positions], [method.values(shape), method.positions(shape)], "{name} {shape:?}");
        }
    }
}

#[test]
fn layers_give_the_outputs_of_their_dense_weight_or_have_none() {
    let values = uniform_values(&mut StdRng::seed_from_u64(1), 5 * 12, 1.0);
    let x = Tensor::<2>::from_data(TensorData::new(values, [5, 12]), &Device::default());
    for entry in PARAMETERIZATIONS {
        let layer = layer(&small(entry), [12, 20]);
        let Some(dense) = layer.to_dense() else {
            assert!(entry.spec().exports.is_err(), "{}", entry.spec().name);
            continue;
        };
        assert!(entry.spec().exports.is_ok(), "{}", entry.spec().name);
        let far = layer.forward(x.clone().autodiff()).inner() - x.clone().matmul(dense);
        assert!(far.abs().max().into_scalar::<f32>() < 1e-5, "{}", entry.spec().name);
    }
}

/// Uses the optimizer and the steps of each parameterization.
#[test]
fn trained_tensors_move_and_frozen_ones_do_not() {
    for entry in PARAMETERIZATIONS {
        let (name, parameterization) = (entry.spec().name, small(entry));
        let steps = parameterization.method().steps(RunFacts { seed: 1, width: 16 });
        let config = LlamaConfig {
            hidden_size: 16,
            intermediate_size: 24,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 8,
            num_hidden_layers: 1,
            features: Features { qkv_bias: true, output_bias: true, mlp_bias: true, ..Features::default() },
            parameterization,
            ..LlamaConfig::named("llama-9m", 40).unwrap()
        };
        let mut model = Llama::random(&config, 3, &Device::default().autodiff()).unwrap();
        let before = Tensors::of(&model);
        let (options, parameters, meter) = (Options::new(), ParameterRoles::of(&model), StateMeter::new());
        let request = OptimizerRequest {
            method: optimizer("adamw").unwrap(),
            options: &options,
            include: "",
            exclude: "",
            parameters: &parameters,
            meter: &meter,
        };
        let (mut adamw, _) = match &steps {
            Some(steps) => steps.optimizer(&request),
            None => request.method.init(&options, &parameters, &meter),
        }
        .unwrap();
        let ids = ids_tensor(&(0..24).collect::<Vec<i32>>(), 2, &Device::default());
        for step in 1..=3 {
            steps.iter().for_each(|steps| steps.begin_step(step));
            let grads = model.loss_sum(ids.clone(), ids.clone(), None).backward();
            let grads = GradientsParams::from_grads(grads, &model);
            model = adamw.step(0.01, model, grads);
            if let Some(steps) = &steps {
                steps.after_update(model.linears_mut()).unwrap();
                let change = steps.end_step(step, model.linears_mut());
                model = change.apply(model, &mut adamw);
            }
        }
        let after = Tensors::of(&model);
        for (path, values) in &before.trained {
            assert_ne!(after.trained[path], *values, "{name}: {path}");
        }
        assert_eq!(after.frozen, before.frozen, "{name}");
    }
}
