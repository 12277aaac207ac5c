//! State that an optimizer keeps for a model, to check a file before it is loaded.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Bytes, Device, Tensor, TensorData};
use burn_pack::{Reader as Pack, Scalar};
use lowrank_optim::{Assignment, StateMeter};
use safetensors::Dtype;

use super::CheckpointError;
use super::optimizer::{optimizer_files, through};
use super::state_file::{Listing, Reader, stored};

/// Tensors and counters of each parameter's state, by their names after the parameter's id.
#[derive(Clone, Debug, Default)]
struct Fields {
    tensors: BTreeMap<String, (Dtype, Vec<usize>)>,
    scalars: BTreeMap<String, std::mem::Discriminant<Scalar>>,
}

/// Parameter and its state.
#[derive(Clone, Debug)]
struct Expected {
    path: String,
    shape: Vec<usize>,
    fields: Fields,
}

/// State that an optimizer keeps for a model.
///
/// It is determined by one trial step for one parameter of each shape. State that is created later in a run is not
/// included, and may be at most twice as large as its parameter.
#[derive(Clone, Debug)]
pub struct ExpectedState(BTreeMap<String, Expected>);

/// Counter with the number of dimensions of a parameter, used by every optimizer.
const RANK: &str = "__rank";

impl ExpectedState {
    /// Returns the state of a new optimizer that reports to this meter and is not used elsewhere.
    pub fn of<M: Module>(
        optimizer: &ModuleOptimizer,
        meter: &StateMeter,
        model: &M,
        parameters: &[Assignment],
    ) -> Result<Self, CheckpointError> {
        let device = model.devices().into_iter().next().map_or_else(Device::default, Device::inner);
        let mut known: BTreeMap<(String, Vec<usize>), Fields> = BTreeMap::new();
        let mut expected = BTreeMap::new();
        for Assignment { parameter, optimizer: assigned } in parameters {
            let kind = (format!("{assigned:?}"), parameter.shape.clone());
            let fields = match known.get(&kind) {
                Some(fields) => fields.clone(),
                None => {
                    let fields = try_step(optimizer, meter, model, parameter.id, &parameter.shape, &device)?;
                    known.insert(kind, fields.clone());
                    fields
                }
            };
            let (path, shape) = (parameter.path.clone(), parameter.shape.clone());
            expected.insert(parameter.id.val().to_string(), Expected { path, shape, fields });
        }
        Ok(Self(expected))
    }

    /// Rejects a checkpoint whose optimizer files hold a different state.
    pub fn check(&self, checkpoint: &Path) -> Result<(), CheckpointError> {
        let [tensors, counters] = optimizer_files(checkpoint);
        let refuse = |path: &Path, reason: String| CheckpointError::Optimizer { path: path.to_path_buf(), reason };
        for (name, info) in Reader::open(&tensors)?.tensors() {
            let (parameter, field) = self.find(name).map_err(|reason| refuse(&tensors, reason))?;
            parameter.check_tensor(field, info.dtype, &info.shape).map_err(|reason| refuse(&tensors, reason))?;
        }
        let bytes = std::fs::read(&counters).map_err(CheckpointError::io(&counters))?;
        let pack =
            Pack::from_bytes(Bytes::from_bytes_vec(bytes)).map_err(|error| refuse(&counters, error.to_string()))?;
        for (name, value) in pack.scalars() {
            let (parameter, field) = self.find(name).map_err(|reason| refuse(&counters, reason))?;
            parameter.check_scalar(field, *value).map_err(|reason| refuse(&counters, reason))?;
        }
        Ok(())
    }

    fn find<'a>(&self, name: &'a str) -> Result<(&Expected, &'a str), String> {
        let found = name.split_once('.').and_then(|(id, field)| Some((self.0.get(id)?, field)));
        found.ok_or_else(|| format!("{name} belongs to no parameter that this run trains"))
    }
}

impl Expected {
    fn check_tensor(&self, field: &str, dtype: Dtype, shape: &[usize]) -> Result<(), String> {
        let Self { path, shape: own, fields } = self;
        let values = |shape: &[usize]| shape.iter().try_fold(1usize, |product, side| product.checked_mul(*side));
        match fields.tensors.get(field) {
            Some((kept, sides)) if *kept != dtype || sides != shape => Err(format!(
                "{field} of {path} has type {dtype:?} and shape {shape:?}; the optimizer of this run keeps {kept:?} and {sides:?}"
            )),
            Some(_) => Ok(()),
            None => match (values(shape), values(own)) {
                (Some(held), Some(values)) if held <= 2 * values.max(64) && shape.len() <= own.len().max(1) => Ok(()),
                _ => Err(format!(
                    "{field} of {path} has shape {shape:?}, which no state of a parameter of shape {own:?} has"
                )),
            },
        }
    }

    fn check_scalar(&self, field: &str, value: Scalar) -> Result<(), String> {
        let Self { path, shape, fields } = self;
        if field == RANK && usize::try_from(value) != Ok(shape.len()) {
            return Err(format!("the state of {path} is for {value:?} dimensions; it has {}", shape.len()));
        }
        match fields.scalars.get(field) {
            Some(kind) if *kind != std::mem::discriminant(&value) => {
                Err(format!("{field} of {path} is {value:?}, a number of another kind than the optimizer keeps"))
            }
            _ => Ok(()),
        }
    }
}

/// Gradient in which no two rows or columns are alike.
fn gradient<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|i: usize| ((i * i + 7 * i) % 1009) as f32 / 1009.0 - 0.5).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Fields of the state after a step for one parameter.
fn try_step<M: Module>(
    optimizer: &ModuleOptimizer,
    meter: &StateMeter,
    model: &M,
    id: ParamId,
    shape: &[usize],
    device: &Device,
) -> Result<Fields, CheckpointError> {
    let mut grads = GradientsParams::new();
    match *shape {
        [a] => grads.register(id, gradient([a], device)),
        [a, b] => grads.register(id, gradient([a, b], device)),
        [a, b, c] => grads.register(id, gradient([a, b, c], device)),
        [a, b, c, d] => grads.register(id, gradient([a, b, c, d], device)),
        // No state is known for other dimensions.
        _ => return Ok(Fields::default()),
    }
    let mut optimizer = optimizer.clone();
    optimizer.step(0.0, model.clone(), grads);
    let (listing, record) = through(meter, Listing::default(), || optimizer.to_record());
    let prefix = format!("{}.", id.val());
    let mut fields = Fields::default();
    let place = || Path::new("optimizer");
    for (name, dtype, sides) in listing.entries() {
        let Some(field) = name.strip_prefix(&prefix) else { continue };
        let dtype = stored(dtype).map_err(CheckpointError::io(place()))?;
        fields.tensors.insert(field.to_string(), (dtype, sides.to_vec()));
    }
    let error = |error: String| CheckpointError::Optimizer { path: place().to_path_buf(), reason: error };
    let bytes = record.into_bytes().map_err(|failed| error(failed.to_string()))?;
    let pack = Pack::from_bytes(bytes).map_err(|failed| error(failed.to_string()))?;
    for (name, value) in pack.scalars() {
        if let Some(field) = name.strip_prefix(&prefix) {
            fields.scalars.insert(field.to_string(), std::mem::discriminant(value));
        }
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::checkpoint::{load_optimizer, save_optimizer};
    use burn::nn::LinearConfig;
    use lowrank_optim::ParameterRoles;
    use lowrank_optim::registry::{self, Options};
    use safetensors::SafeTensors;
    use safetensors::tensor::TensorView;

    /// Checkpoint whose tensors are passed to `change` one by one.
    fn checked(change: impl Fn(&str, &mut Dtype, &mut Vec<usize>)) -> Result<(), String> {
        let device = Device::default().autodiff();
        let model = LinearConfig::new(6, 4).init(&device);
        let meter = StateMeter::new();
        let hidden = ParameterRoles::of(&model);
        let (mut optimizer, parameters) =
            registry::optimizer("adamw").unwrap().init(&Options::new(), &hidden, &meter).unwrap();
        let expected = ExpectedState::of(&optimizer, &meter, &model, &parameters).unwrap();
        let loss = model.forward(Tensor::<2>::ones([2, 6], &device)).square().sum();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        optimizer.step(0.1, model, grads);
        let dir = tempfile::tempdir().unwrap();
        save_optimizer(&optimizer, &meter, dir.path()).unwrap();
        let path = &optimizer_files(dir.path())[0];
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let changed = tensors.tensors().into_iter().map(|(name, view)| {
            let (mut dtype, mut shape) = (view.dtype(), view.shape().to_vec());
            change(&name, &mut dtype, &mut shape);
            let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, dtype, shape, vec![0u8; len])
        });
        let changed: Vec<_> = changed.collect();
        let views = changed
            .iter()
            .map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
        expected.check(dir.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_tensor_is_held_against_what_the_optimizer_keeps() {
        checked(|_, _, _| ()).unwrap();
        let wrong = |change: &dyn Fn(&str, &mut Dtype, &mut Vec<usize>)| checked(change).unwrap_err();
        let is_matrix = |shape: &Vec<usize>| shape.len() == 2;
        let text = wrong(&|_, _, shape| {
            if is_matrix(shape) {
                shape.swap(0, 1)
            }
        });
        assert!(text.contains("weight") && text.contains("[4, 6]") && text.contains("[6, 4]"), "{text}");
        assert!(
            wrong(&|_, _, shape| if is_matrix(shape) {
                *shape = vec![24]
            })
            .contains("[24]")
        );
        assert!(
            wrong(&|_, _, shape| if is_matrix(shape) {
                shape.push(1)
            })
            .contains("[6, 4, 1]")
        );
        assert!(wrong(&|_, dtype, _| *dtype = Dtype::BF16).contains("BF16"));
        assert!(wrong(&|_, dtype, _| *dtype = Dtype::I32).contains("I32"));
        assert!(
            wrong(&|_, _, shape| if shape.len() == 1 {
                shape[0] += 1
            })
            .contains("bias")
        );
    }

    /// Files of the state with bytes changed at random, from a fixed seed: rejected or unchanged, in bounded memory,
    /// and without a panic.
    #[test]
    fn changed_headers_and_counters_are_refused_without_a_panic() {
        let device = Device::default().autodiff();
        let model = LinearConfig::new(6, 4).init(&device);
        let meter = StateMeter::new();
        let hidden = ParameterRoles::of(&model);
        let (mut optimizer, parameters) =
            registry::optimizer("adamw").unwrap().init(&Options::new(), &hidden, &meter).unwrap();
        let expected = ExpectedState::of(&optimizer, &meter, &model, &parameters).unwrap();
        let fresh = optimizer.clone();
        let loss = model.forward(Tensor::<2>::ones([2, 6], &device)).square().sum();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        optimizer.step(0.1, model, grads);
        let dir = tempfile::tempdir().unwrap();
        let saved = save_optimizer(&optimizer, &meter, dir.path()).unwrap();
        let mut random = 7u64;
        let mut draw = |below: usize| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) as usize % below
        };
        for path in optimizer_files(dir.path()) {
            let whole = std::fs::read(&path).unwrap();
            // The header of the tensors, and all of the counters.
            let end = whole.len().min(700);
            for _ in 0..400 {
                let mut changed = whole.clone();
                for _ in 0..1 + draw(3) {
                    match draw(3) {
                        0 => changed[draw(end)] = draw(256) as u8,
                        1 => changed[draw(end)] ^= 1 << draw(8),
                        _ => changed.truncate(draw(whole.len()).max(1)),
                    }
                    changed.resize(changed.len().max(end), 0);
                }
                std::fs::write(&path, &changed).unwrap();
                let loaded = expected
                    .check(dir.path())
                    .and_then(|()| load_optimizer(fresh.clone(), &meter, dir.path(), saved).map(drop));
                if let Err(error) = loaded {
                    assert!(!error.to_string().is_empty());
                }
            }
            std::fs::write(&path, &whole).unwrap();
        }
        expected.check(dir.path()).unwrap();
    }
}
