//! LLaMA against Hugging Face's implementation: logits, loss, every gradient, and steps of clipped AdamW.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use lowrank_models::{Choose, Init, Layout, Llama, LlamaConfig, ModelError, WeightSource, ids_tensor};
use lowrank_optim::GlobalNormClip;
use lowrank_optim::{AdamWConfig, ModulePath};

use super::support::case::{Array, Case, Outcome};

/// Logits, loss, gradients and steps of one case.
pub fn run(case: &Case) -> Outcome {
    let device = Device::default().autodiff();
    let config: LlamaConfig = {
        let mut value = case.config.clone();
        value["initializer_range"] = 0.02.into();
        serde_json::from_value(value).map_err(|error| format!("configuration: {error}"))?
    };
    let mut model =
        Llama::build(&config, &mut Weights { case, prefix: "w0." }, &device).map_err(|error| error.to_string())?;
    let ids = case.array("input_ids")?;
    let batch = ids.shape[0];
    let inputs = || ids_tensor(&ids.i32(), batch, &device.clone().inner());
    // The file's labels are those of the inputs; ours are of the tokens that follow.
    let labels = case.array("labels")?.i32();
    let positions = ids.shape[1];
    let targets: Vec<i32> =
        (0..labels.len()).map(|i| if (i + 1) % positions == 0 { -100 } else { labels[i + 1] }).collect();
    let counted = targets.iter().filter(|target| **target != -100).count() as f64;
    let loss_of = |model: &Llama| {
        let targets = ids_tensor(&targets, batch, &device.clone().inner());
        model.loss_sum(inputs(), targets, None).div_scalar(counted)
    };

    let logits = host(model.valid().logits(inputs(), None));
    let worst = case.array("logits")?.near("logits", &logits, 2e-5, 1e-5)?;
    let steps = case.count("steps")?;
    let losses = case.array("losses")?;
    let mut optimizer = AdamWConfig::new().with_weight_decay(case.number("weight_decay")?).init();
    let clip = GlobalNormClip::new(Some(case.number("clip_global_norm")?));
    for step in 0..steps {
        let loss = loss_of(&model);
        let value = host(loss.clone().inner());
        if step == 0 {
            case.array("loss")?.near("loss", &value, 1e-5, 1e-5)?;
        }
        Array { shape: vec![1], values: vec![losses.values[step]] }.near("losses", &value, 1e-5, 1e-5)?;
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        if step == 0 {
            for (name, values) in values_of(&model, Some(&grads)) {
                case.array(&format!("grad.{name}"))?.near(&format!("grad.{name}"), &values, 2e-6, 1e-4)?;
            }
        }
        let clipped = clip.apply(&model, grads).map_err(|error| error.to_string())?;
        if step == 0 {
            case.array("grad_global_norm")?.near("grad_global_norm", &[clipped.norm as f32], 1e-5, 1e-5)?;
        }
        model = optimizer.step(case.number("lr")?, model, clipped.grads);
    }
    for (name, values) in values_of(&model, None) {
        // Adam divides by the size of the gradient: where that is near 0, rounding decides on a part of a step.
        case.array(&format!("w{steps}.{name}"))?.near(&name, &values, 5e-5, 1e-5)?;
    }
    Ok(format!("logits within {worst:.1e}, {steps} steps"))
}

struct Weights<'a> {
    case: &'a Case,
    prefix: &'static str,
}

impl WeightSource for Weights<'_> {
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, init: Init) -> Result<Vec<f32>, ModelError> {
        let values = self.vector(path, shape[0] * shape[1], init)?;
        Ok(match layout {
            Layout::AsStored => values,
            Layout::Transposed => transpose(&values, shape[1], shape[0]),
        })
    }

    fn vector(&mut self, path: &str, len: usize, _: Init) -> Result<Vec<f32>, ModelError> {
        let array = self.case.array(&format!("{}{path}", self.prefix)).map_err(ModelError::Config)?;
        assert_eq!(array.values.len(), len, "{path}");
        Ok(array.f32())
    }

    fn positions(&mut self, _: &str, _: usize, _: usize, _: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        unreachable!("a dense model has no positions")
    }
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("f32")
}

/// Weights, or their gradients, in the order of the files.
fn values_of(model: &Llama, grads: Option<&GradientsParams>) -> BTreeMap<String, Vec<f32>> {
    struct Collector<'a> {
        grads: Option<&'a GradientsParams>,
        path: ModulePath,
        values: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor for Collector<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = match self.grads {
                Some(grads) => grads.get::<D>(param.id).expect("a gradient for every parameter"),
                None => param.val().inner(),
            };
            let dims = tensor.dims();
            let values = host(tensor);
            let linear = self.path.containers().any(|container| container == "Struct:Dense");
            let values = if linear { transpose(&values, dims[0], dims[1]) } else { values };
            self.values.insert(self.path.joined(), values);
        }
    }
    let mut collector = Collector { grads, path: ModulePath::default(), values: BTreeMap::new() };
    model.visit(&mut collector);
    collector.values
}
