//! Adapters as data: the update of a layer as two factors, computed from its tensors alone.

use burn::tensor::{Device, Tensor};
use lowrank_optim::key_of;

use crate::ground::config::AdapterConfig;
use crate::ground::control::Control;
use crate::ground::error::AdapterError;
use crate::ground::site::{GivenTensors, Place, SharedTensors, Site};
use crate::ground::stack::Adapter;
use crate::ground::structure::Factors;
use crate::init::origin::origin;

/// The update `scale A B` of one layer.
#[derive(Clone, Debug)]
pub struct LayerFactors {
    /// Path of the layer.
    pub path: String,
    /// Factors and scale.
    pub factors: Factors,
    /// Name of the basis that the columns of A are taken from, if adapters share one.
    pub basis: Option<String>,
}

/// Returns the factors that a new adapter starts with at one layer, without a model. `shared` is the same for all layers of
/// the adapter.
///
/// Rejects adapters whose start depends on the weight, and updates that are not a product.
pub fn start_of(config: &AdapterConfig, place: &Place, shared: &mut SharedTensors) -> Result<Factors, AdapterError> {
    let entry = config.entry()?;
    let refused = |reason: &str| AdapterError::Refused(format!("{}: {} {reason}", place.path, entry.spec.name));
    if entry.spec.init(&place.init).is_some_and(|init| init.starts_from_weight || init.needs_gradients) {
        return Err(refused(&format!("with init {} starts from the weight; start it on its model", place.init)));
    }
    // A start that depends on the weight differs between two of them.
    let started = [0.0, 1.0].map(|value| {
        let device = Device::default();
        let weight = Tensor::<2>::full(place.shape, value, &device);
        let mut site = Site {
            place,
            name: &config.name,
            spec: entry.spec,
            seed: config.seed,
            device,
            stored: weight.clone(),
            weight,
            gradient: None,
            given: None,
            shared,
        };
        entry.build(&config.options, &mut site)
    });
    let [zero, other] = started;
    let (zero, other) = (zero?, other?);
    let factors = (zero.get().factors(), other.get().factors());
    let (Some(factors), Some(again)) = factors else {
        return Err(refused("has no update that is a product of two factors; start it on its model"));
    };
    let same = |x: &Tensor<2>, y: &Tensor<2>| x.to_data() == y.to_data();
    if zero.get().starts_from_weight() || !same(&factors.a, &again.a) || !same(&factors.b, &again.b) {
        return Err(refused("starts from the weight; start it on its model"));
    }
    Ok(factors)
}

/// Returns the update of one layer's adapter from its tensors, in the layout of files, without a model. `shared` is the
/// same for all layers of the adapter.
///
/// Rejects updates that are not a product or that depend on the base weight.
pub fn factors_of(
    config: &AdapterConfig,
    place: &Place,
    tensors: GivenTensors,
    shared: &mut SharedTensors,
) -> Result<LayerFactors, AdapterError> {
    let entry = config.entry()?;
    let device = Device::default();
    // Product structures need nothing from the weight once their tensors are given: one zero in memory, seen as all of them.
    let weight = Tensor::<2>::zeros([1, 1], &device).expand(place.shape);
    let mut site = Site {
        place,
        name: &config.name,
        spec: entry.spec,
        seed: config.seed,
        device,
        stored: weight.clone(),
        weight,
        gradient: None,
        given: Some(tensors),
        shared,
    };
    let structure = entry.build(&config.options, &mut site)?;
    let origin = origin(&mut site, structure.get())?;
    site.finish()?;
    let basis = structure.get().basis();
    let factors = match (structure.get().factors(), &origin) {
        (Some(factors), None) => Some(factors),
        _ => {
            let control = Control::new(config.clone());
            let attached =
                Adapter { structure, origin, control, layer: key_of(&place.path), place: place.clone().into() };
            attached.change().map(|[a, b]| Factors { a, b, scale: 1.0 })
        }
    };
    match factors {
        Some(factors) => Ok(LayerFactors { path: place.path.clone(), factors, basis }),
        None => Err(AdapterError::Refused(format!(
            "{}: the update of {} is no product of two factors, or depends on the base weight; merge the adapter into its model instead",
            place.path, entry.spec.name
        ))),
    }
}
