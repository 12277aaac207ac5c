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
    // Product structures need nothing from the weight once their tensors are given.
    let weight = Tensor::zeros(place.shape, &device);
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
        Some(factors) => Ok(LayerFactors { path: place.path.clone(), factors }),
        None => Err(AdapterError::Refused(format!(
            "{}: the update of {} is no product of two factors, or depends on the base weight; merge the adapter into its model instead",
            place.path, entry.spec.name
        ))),
    }
}
