//! Adding and removing components of an adapter during a run.
//!
//! The tensors of the layer change their shape and keep their ids: call [`resize`] between two steps, then reset the
//! optimizer state of the tensors that it returns. All others keep their state.
//!
//! ```no_run
//! # use burn::module::{Module, ParamGroup};
//! # use burn::optim::ModuleOptimizer;
//! # use lowrank_adapters::{AdapterError, Resize, resize};
//! # use lowrank_optim::AdamW;
//! # fn example<M: Module>(model: M, optimizer: ModuleOptimizer, adamw: AdamW) -> Result<(M, ModuleOptimizer), AdapterError> {
//! // Every layer of rank 8 loses its last component.
//! let (model, changed) = resize(model, "default", |_, adapter| {
//!     (adapter.place().rank == 8).then(|| Resize { keep: (0..7).collect(), append: 0 })
//! })?;
//! let optimizer = optimizer.with_group(ParamGroup::from_ids(changed), adamw, None);
//! # Ok((model, optimizer)) }
//! ```

use std::collections::BTreeMap;

use burn::module::{Module, ParamId};
use burn::tensor::{DType, Tensor};

use super::attach::joined;
use super::detach::{put_back, stacks};
use crate::ground::any::AnyStructure;
use crate::ground::entry::StructureEntry;
use crate::ground::error::AdapterError;
use crate::ground::layers::adaptable_weights;
use crate::ground::site::{SharedTensors, Site, Size};
use crate::ground::spec::TensorRole;
use crate::ground::stack::{Adapter, AdapterStack, each_adapted};
use crate::ground::structure::Totals;

/// Change to the components of one layer's adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resize {
    /// Indices of the components to keep, in their new order.
    pub keep: Vec<usize>,
    /// Number of new components appended to them.
    pub append: usize,
}

/// Changes the components of an adapter on the layers for which `ask` returns a change. Returns the module and the ids
/// of the trained tensors whose shape or order changed.
///
/// The scale of a layer does not change with its rank unless the structure says so. Rejects structures of a fixed size and components that do not
/// exist.
pub fn resize<M: Module>(
    module: M,
    name: &str,
    mut ask: impl FnMut(&str, &Adapter) -> Option<Resize>,
) -> Result<(M, Vec<ParamId>), AdapterError> {
    let mut refused = None;
    let ask = |path: &str, attached: &Adapter| {
        let Resize { keep, append } = ask(path, attached)?;
        let size = attached.place().size();
        let distinct = (0..keep.len()).all(|i| keep[i] < size.rank && !keep[..i].contains(&keep[i]));
        if !distinct {
            refused = Some(format!(
                "{path}: the components {keep:?} cannot stay; there are {}, each stays once at most",
                size.rank
            ));
            return None;
        }
        if append == 0 && keep.iter().copied().eq(0..size.rank) {
            return None;
        }
        let rank = keep.len() + append;
        let size = Size { rank, scale: attached.structure().scale_of(rank).unwrap_or(size.scale) };
        let make = move |structure: &AnyStructure, site: &mut Site<'_>| {
            StructureEntry::find(structure.spec().name)?.resize(structure, &keep, site)
        };
        Some((size, Box::new(make) as MakeStructure))
    };
    let (module, changed) = rebuild(module, name, ask)?;
    match refused {
        Some(reason) => Err(AdapterError::Refused(reason)),
        None => Ok((module, changed)),
    }
}

/// Makes the structure of a layer of the present one, on a site that has the new size.
pub type MakeStructure = Box<dyn FnOnce(&AnyStructure, &mut Site<'_>) -> Result<AnyStructure, AdapterError>>;

/// Replaces the structures of an adapter on the layers for which `ask` returns a new size and structure. Returns the module and the ids of the
/// trained tensors whose shape or order changed.
pub(crate) fn rebuild<M: Module>(
    module: M,
    name: &str,
    mut ask: impl FnMut(&str, &Adapter) -> Option<(Size, MakeStructure)>,
) -> Result<(M, Vec<ParamId>), AdapterError> {
    let mut weights: BTreeMap<String, Tensor<2>> = BTreeMap::new();
    each_adapted(&module, |path, weight, _| {
        weights.insert(path.to_string(), weight.clone());
    });
    let mut stacks = stacks(&module);
    let mut shared = None;
    let mut changed = Vec::new();
    let mut found = false;
    let others: Vec<Adapter> = stacks.values().flatten().cloned().collect();
    for (path, stack) in &mut stacks {
        let Some(number) = stack.iter().position(|attached| attached.control().name() == name) else { continue };
        found = true;
        let (attached, weight) = (&stack[number], &weights[path]);
        let Some((size, make)) = ask(path, attached) else { continue };
        if shared.is_none() {
            shared = Some(joined(SharedTensors::default(), attached.control().config(), others.iter())?);
        }
        let Some(shared) = &mut shared else { continue };
        let below = AdapterStack { stack: stack[..number].to_vec() };
        let (resized, moved) = on_one_layer(attached, weight, &below, size, make, shared)?;
        changed.extend(moved);
        stack[number] = resized;
    }
    if !found {
        return Err(AdapterError::Refused(format!("the model has no adapter \"{name}\"")));
    }
    if let Some(control) = others.iter().map(Adapter::control).find(|control| control.name() == name) {
        let own = || stacks.values().flatten().filter(|attached| attached.control().name() == name);
        let trained = own().flat_map(Adapter::shapes).filter(|tensor| tensor.role != TensorRole::Frozen);
        control.set_totals(Totals {
            layers: own().count(),
            trained: trained.map(|tensor| tensor.shape.iter().product::<usize>()).sum(),
            ranks: own().map(|attached| attached.place().rank).sum(),
        });
    }
    Ok((put_back(module, stacks)?, changed))
}

/// Returns the new adapter of one layer and the ids of the tensors that changed.
fn on_one_layer(
    attached: &Adapter,
    stored: &Tensor<2>,
    below: &AdapterStack,
    size: Size,
    make: MakeStructure,
    shared: &mut SharedTensors,
) -> Result<(Adapter, Vec<ParamId>), AdapterError> {
    let config = attached.control().config();
    let entry = StructureEntry::find(attached.structure.spec().name)?;
    let mut place = attached.place().clone();
    place.resize(size);
    let weight = below.over(stored, None).weight().without_autodiff();
    let mut site = Site {
        place: &place,
        name: &config.name,
        spec: entry.spec,
        seed: config.seed,
        device: stored.device(),
        stored: stored.clone().without_autodiff().cast(DType::F32),
        weight: weight.cast(DType::F32),
        gradient: None,
        given: None,
        shared,
    };
    let structure = make(&attached.structure, &mut site)?;
    let before = attached.shapes();
    let resized = Adapter { structure, place: place.into(), ..attached.clone() };
    let trained = resized.shapes().into_iter().filter(|tensor| tensor.role != TensorRole::Frozen);
    // With an unchanged number of components the order may still differ.
    let moved = trained.filter(|tensor| {
        let old = before.iter().find(|old| old.field == tensor.field);
        old.is_none_or(|old| old.shape != tensor.shape) || size.rank == attached.place().rank
    });
    Ok((resized.clone(), moved.map(|tensor| tensor.id).collect()))
}

/// Rank and scale of an adapter's layers where they differ from its configuration.
pub fn sizes<M: Module>(module: &M, name: &str) -> Result<BTreeMap<String, Size>, AdapterError> {
    let layers: Vec<_> = adaptable_weights(module)?.into_values().collect();
    let mut sizes = BTreeMap::new();
    for (path, stack) in stacks(module) {
        if let Some(attached) = stack.iter().find(|attached| attached.control().name() == name) {
            sizes.insert(path, (attached.control().clone(), attached.place().size()));
        }
    }
    let Some((control, _)) = sizes.values().next() else {
        return Err(AdapterError::Refused(format!("the model has no adapter \"{name}\"")));
    };
    // An adapter made from another one has no layers of its own to compare with.
    let asked: BTreeMap<String, Size> = match control.config().places(&layers) {
        Ok(places) => places.into_iter().map(|place| (place.path.clone(), place.size())).collect(),
        Err(_) => return Ok(BTreeMap::new()),
    };
    let sizes = sizes.into_iter().map(|(path, (_, size))| (path, size));
    Ok(sizes.filter(|(path, size)| asked.get(path).is_some_and(|asked| asked != size)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near};

    fn resized(bench: &Bench, keep: &[usize], append: usize) -> (Bench, usize) {
        let ask = |_: &str, _: &Adapter| Some(Resize { keep: keep.to_vec(), append });
        let (bench, changed) = resize(bench.clone(), "default", ask).unwrap();
        assert_eq!(bench.adapter().place().rank, keep.len() + append);
        assert_eq!(bench.adapter().control().totals().ranks, keep.len() + append);
        (bench, changed.len())
    }

    #[test]
    fn new_components_of_lora_add_nothing_at_first_and_none_are_the_base() {
        let bare = Bench::new(9, 6, false);
        let bench = bare.moved(&AdapterConfig::new("lora").with_rank(3).with_alpha(6.0));
        let (grown, changed) = resized(&bench, &[0, 1, 2], 2);
        assert_eq!(changed, 2);
        near(grown.output(), bench.output(), 1e-6);
        near(resized(&bench, &[2, 0, 1], 0).0.output(), bench.output(), 1e-6);
        assert_eq!(resized(&bench, &[0, 1, 2], 0).1, 0, "nothing changed");
        let (none, _) = resized(&bench, &[], 0);
        near(none.output(), bare.output(), 0.0);
        near(none.update(), bare.weight().inner() * 0.0, 0.0);
        near(resized(&none, &[], 1).0.output(), bare.output(), 1e-6);
        // Kept components keep their scale.
        let (two, _) = resized(&bench, &[0, 1], 0);
        let (one, _) = resized(&two, &[0], 0);
        assert_eq!(one.adapter().place().scale, 2.0);
        let dropped = bench.output() - two.output();
        assert!(crate::bench::largest(dropped) > 1e-3, "the third component had a part in the output");
    }
}
