//! Merging of adapters into the weights, and the reverse.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterizer};
use burn::tensor::{DType, Tensor};
use lowrank_kernels::narrow::packed::holds_codes;
use lowrank_optim::ModulePath;

use super::error::AdapterError;
use super::fingerprint::of_values;
use super::layers::ids_of;
use super::stack::{AdapterStack, each_adapted, layer_of, matrix};
use lowrank_kernels::host::values as host;

/// State needed to undo a merge.
#[derive(Clone, Debug)]
pub struct UnmergeState {
    layers: BTreeMap<String, Kept>,
}

#[derive(Clone, Debug)]
struct Kept {
    adapter: AdapterStack,
    /// Flags of the adapters that were on.
    on: Vec<bool>,
    /// Fingerprint of the merged weight.
    merged: u64,
    /// Original weight, if the adapters cannot be subtracted from the merged one.
    base: Option<Tensor<2>>,
    /// Original bias and the fingerprint of the merged one, if the adapters change it.
    bias: Option<(Tensor<1>, u64)>,
}

/// Merges the adapters that are on into the weights and biases, in order; drops those that are off. All computation is
/// in f32.
///
/// Rejects structures that cannot be merged, layers that would need a bias, and non-finite merged weights or biases.
pub fn merged<M: Module>(module: M) -> Result<M, AdapterError> {
    let Prepared { layers, biases } = prepared(&module)?;
    // Without the original weights, which would be held in addition to the merged ones.
    let names: Vec<String> = layers.into_keys().collect();
    let module = with_biases(module.materialize(), biases);
    each_weight(&module, |path, weight| match names.iter().any(|name| name == path) {
        true => finite("weight", path, &weight),
        false => Ok(()),
    })?;
    Ok(module)
}

/// Merges as [`merged`] and also returns the state that [`unmerged`] needs.
pub fn merged_with_unmerge_state<M: Module>(module: M) -> Result<(M, UnmergeState), AdapterError> {
    let Prepared { mut layers, biases } = prepared(&module)?;
    let module = with_biases(module.materialize(), biases);
    each_weight(&module, |path, weight| {
        let Some(kept) = layers.get_mut(path) else { return Ok(()) };
        finite("weight", path, &weight)?;
        kept.merged = of_values(path, &host(weight.clone()));
        // A narrow base cannot be restored by subtraction.
        let wide = |base: &Tensor<2>| base.dtype() == DType::F32 && !holds_codes(base);
        if kept.base.as_ref().is_none_or(wide) && kept.taken_out(weight).is_some() {
            kept.base = None;
        }
        Ok(())
    })?;
    Ok((module, UnmergeState { layers }))
}

/// Restores a merged module, with its adapters on top of its original weights. Rejects weights or biases that have
/// changed since.
pub fn unmerged<M: Module>(module: M, unmerge_state: UnmergeState) -> Result<M, AdapterError> {
    let changed = |what: &str, path: &str| {
        AdapterError::Refused(format!(
            "the {what} of {path} has changed since it was merged: the original one cannot be restored"
        ))
    };
    let mut left: Vec<&String> = unmerge_state.layers.keys().collect();
    each_weight(&module, |path, weight| {
        let Some(kept) = unmerge_state.layers.get(path) else { return Ok(()) };
        left.retain(|name| *name != path);
        match of_values(path, &host(weight)) == kept.merged {
            true => Ok(()),
            false => Err(changed("weight", path)),
        }
    })?;
    if let Some(path) = left.first() {
        return Err(AdapterError::Refused(format!("the module has no layer {path}, which was merged")));
    }
    let now = biases(&module);
    let mut before = BTreeMap::new();
    for (path, kept) in &unmerge_state.layers {
        let Some((bias, merged)) = &kept.bias else { continue };
        match now.get(path).map(|bias| of_values(path, &host(bias.clone()))) == Some(*merged) {
            true => before.insert(path.clone(), bias.clone()),
            false => return Err(changed("bias", path)),
        };
    }
    let ids = ids_of(&module)?;
    let module = with_biases(module, before);
    Ok(module.apply_reparameterization(Restore { ids, layers: unmerge_state.layers }))
}

/// State that merging a module starts from.
struct Prepared {
    layers: BTreeMap<String, Kept>,
    /// Merged biases, if adapters change them.
    biases: BTreeMap<String, Tensor<1>>,
}

fn prepared<M: Module>(module: &M) -> Result<Prepared, AdapterError> {
    let before = biases(module);
    check(module, &before)?;
    let (mut layers, mut merged) = (layers(module), BTreeMap::new());
    for (path, kept) in &mut layers {
        let (Some(bias), true) = (before.get(path), kept.changes_bias()) else { continue };
        let Some(changed) = kept.merged_bias(bias) else { continue };
        finite("bias", path, &changed)?;
        kept.bias = Some((bias.clone(), of_values(path, &host(changed.clone()))));
        merged.insert(path.clone(), changed);
    }
    Ok(Prepared { layers, biases: merged })
}

impl Kept {
    /// Merged weight with the adapters subtracted, last one first.
    fn taken_out(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let on = self.adapter.stack.iter().zip(&self.on).filter(|(_, on)| **on);
        on.rev().try_fold(merged, |weight, (attached, _)| attached.unmerged(weight)).map(Tensor::detach)
    }

    fn changes_bias(&self) -> bool {
        let mut on = self.adapter.stack.iter().zip(&self.on).filter(|(_, on)| **on);
        on.any(|(attached, _)| attached.structure.spec().changes_bias)
    }

    fn merged_bias(&self, bias: &Tensor<1>) -> Option<Tensor<1>> {
        let merged = self.adapter.over(self.base.as_ref()?, Some(bias)).bias();
        merged.map(Tensor::without_autodiff)
    }
}

/// Rejects adapters that cannot be merged.
fn check<M: Module>(module: &M, biases: &BTreeMap<String, Tensor<1>>) -> Result<(), AdapterError> {
    let mut refused = None;
    each_adapted(module, |path, weight, adapter| {
        for attached in adapter.stack.iter().filter(|attached| attached.control().is_on()) {
            let spec = attached.structure.spec();
            let may_need = spec.changes_bias && !biases.contains_key(path);
            let needs_bias = || may_need && attached.structure().merged_bias(weight, None).is_some();
            let reason = match spec.merges {
                Err(reason) => reason,
                Ok(()) if needs_bias() => "the merged layer needs a bias, but the layer has none",
                Ok(()) => continue,
            };
            refused.get_or_insert(AdapterError::Refused(format!(
                "{}: the {} adapter \"{}\" cannot be merged: {reason}",
                path,
                spec.name,
                attached.control().name()
            )));
        }
    });
    refused.map_or(Ok(()), Err)
}

fn layers<M: Module>(module: &M) -> BTreeMap<String, Kept> {
    let mut found = BTreeMap::new();
    each_adapted(module, |path, weight, adapter| {
        let on = adapter.stack.iter().map(|attached| attached.control().is_on()).collect();
        let kept = Kept { adapter: adapter.clone(), on, merged: 0, base: Some(weight.clone()), bias: None };
        found.insert(path.to_string(), kept);
    });
    found
}

fn finite<const D: usize>(what: &str, path: &str, values: &Tensor<D>) -> Result<(), AdapterError> {
    match values.clone().is_finite().all().into_scalar::<bool>() {
        true => Ok(()),
        false => Err(AdapterError::Refused(format!(
            "the merged {what} of {path} is not finite: the adapter, or the {what}, holds infinite values or NaN"
        ))),
    }
}

/// Path of the layer that a bias belongs to.
fn biased(parameter: &str) -> Option<&str> {
    parameter.strip_suffix(".bias")
}

/// Biases of a module, without gradient, by layer path.
fn biases<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    #[derive(Default)]
    struct Walk {
        path: ModulePath,
        found: BTreeMap<String, Tensor<1>>,
    }
    impl ModuleVisitor for Walk {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.path.joined();
            if let (1, Some(layer)) = (D, biased(&path)) {
                let length = param.lazy_shape().num_elements();
                self.found.insert(layer.to_string(), param.base().without_autodiff().reshape([length]));
            }
        }
    }
    let mut walk = Walk::default();
    module.visit(&mut walk);
    walk.found
}

/// Replaces the biases of a module by these, by layer path.
fn with_biases<M: Module>(module: M, biases: BTreeMap<String, Tensor<1>>) -> M {
    struct Put {
        path: ModulePath,
        biases: BTreeMap<String, Tensor<1>>,
    }
    impl ModuleMapper for Put {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = self.path.joined();
            let Some(bias) = biased(&path).filter(|_| D == 1).and_then(|layer| self.biases.remove(layer)) else {
                return param;
            };
            let (id, before, mapper) = param.consume();
            let bias = bias.reshape(before.dims());
            let bias = if before.device().is_autodiff() { Tensor::from_inner(bias) } else { bias };
            let bias = if before.is_require_grad() { bias.require_grad() } else { bias };
            Param::from_mapped_value(id, bias, mapper)
        }
    }
    match biases.is_empty() {
        true => module,
        false => module.map(&mut Put { path: ModulePath::default(), biases }),
    }
}

/// Visits the matrices of a module without adapters until one is rejected.
fn each_weight<M: Module>(
    module: &M,
    see: impl FnMut(&str, Tensor<2>) -> Result<(), AdapterError>,
) -> Result<(), AdapterError> {
    struct Walk<F> {
        path: ModulePath,
        see: F,
        done: Result<(), AdapterError>,
    }
    impl<F: FnMut(&str, Tensor<2>) -> Result<(), AdapterError>> ModuleVisitor for Walk<F> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let ([_, _], true) = (param.lazy_shape().as_slice(), self.done.is_ok()) {
                let weight = matrix(param.base().without_autodiff());
                self.done = (self.see)(layer_of(&self.path.joined()), weight);
            }
        }
    }
    let mut walk = Walk { path: ModulePath::default(), see, done: Ok(()) };
    module.visit(&mut walk);
    walk.done
}

struct Restore {
    ids: BTreeMap<ParamId, String>,
    layers: BTreeMap<String, Kept>,
}

impl Reparameterizer for Restore {
    type Reparam = AdapterStack;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<AdapterStack>) {
        let kept = self.ids.get(&param.id).filter(|_| D == 2).and_then(|path| self.layers.remove(path));
        let Some(kept) = kept else { return (param, None) };
        let shape = param.dims();
        let merged = param.base().detach().reshape([shape[0], shape[1]]);
        let weight = match kept.base.clone().or_else(|| kept.taken_out(merged)) {
            Some(weight) => Tensor::from_dispatch(weight.into_dispatch()),
            None => unreachable!("the weight is kept where the adapters cannot be taken out"),
        };
        let tracked = param.is_require_grad();
        (Param::initialized(param.id, weight).set_require_grad(tracked), Some(kept.adapter))
    }
}
