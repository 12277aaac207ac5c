//! One pair of factors for all layers of a type that were not selected.

use std::collections::BTreeMap;

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_optim::Part;

use super::grid::LayerGrid;
use crate::ground::error::AdapterError;
use crate::ground::stack::each_adapter;
use crate::structures::Diffora;

/// Layers that share a pair of factors: the first holds it, the others follow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedPairs {
    /// Ids of A and B of the layers of each type.
    groups: Vec<Vec<[ParamId; 2]>>,
}

impl SharedPairs {
    /// Rejects layers of one type whose sides differ.
    pub fn check<'a>(layers: impl IntoIterator<Item = (&'a str, [usize; 2])>) -> Result<(), AdapterError> {
        let mut known: BTreeMap<String, (&str, [usize; 2])> = BTreeMap::new();
        for (path, sides) in layers {
            let (first, others) = *known.entry(LayerGrid::kind(path)).or_insert((path, sides));
            if others != sides {
                return Err(AdapterError::Refused(format!(
                    "allocation.options.sharing = pair: {path} has the sides {sides:?} and {first} {others:?}, and layers of one type share their factors; set it to none"
                )));
            }
        }
        Ok(())
    }

    /// Groups of the layers of an adapter that were not selected.
    pub fn of(part: &dyn Part, name: &str, is_selected: &dyn Fn(&str) -> bool) -> Result<Self, AdapterError> {
        let mut groups: BTreeMap<String, Vec<[ParamId; 2]>> = BTreeMap::new();
        let mut sides = Vec::new();
        each_adapter(part, |path, stack| {
            let own = stack.stack.iter().find(|adapter| adapter.control().name() == name);
            let Some(own) = own.and_then(|adapter| adapter.structure.downcast_ref::<Diffora>()) else { return };
            if !is_selected(path) {
                sides.push((path.to_string(), [own.a.dims()[0], own.b.dims()[1]]));
                groups.entry(LayerGrid::kind(path)).or_default().push([own.a.id, own.b.id]);
            }
        });
        Self::check(sides.iter().map(|(path, sides)| (path.as_str(), *sides)))?;
        Ok(Self { groups: groups.into_values().collect() })
    }

    /// Ids of the tensors that follow those of another layer.
    pub fn followers(&self) -> Vec<ParamId> {
        self.groups.iter().flat_map(|group| group.iter().skip(1).flatten().copied()).collect()
    }

    /// Adds the gradients of all layers of a group to the first one's, in their order; the others get none.
    pub fn gather(&self, mut grads: GradientsParams) -> GradientsParams {
        for group in &self.groups {
            for side in [0, 1] {
                let all = group.iter().filter_map(|pair| grads.remove::<2>(pair[side]));
                if let Some(sum) = all.reduce(|sum, grad| sum + grad) {
                    grads.register(group[0][side], sum);
                }
            }
        }
        grads
    }

    /// Values of the layers that follow others: those of the first of their group, row-major.
    pub fn following(&self, part: &dyn Part) -> BTreeMap<ParamId, Tensor<1>> {
        let mut firsts = BTreeMap::new();
        let wanted: Vec<ParamId> = self.groups.iter().flat_map(|group| group[0]).collect();
        each_adapter(part, |_, stack| {
            for own in stack.stack.iter().filter_map(|adapter| adapter.structure.downcast_ref::<Diffora>()) {
                for factor in [&own.a, &own.b].into_iter().filter(|factor| wanted.contains(&factor.id)) {
                    let value = factor.val().without_autodiff();
                    let count = value.dims().iter().product::<usize>();
                    firsts.insert(factor.id, value.reshape([count]));
                }
            }
        });
        let followers = self.groups.iter().flat_map(|group| group[1..].iter().map(|pair| (group[0], *pair)));
        followers
            .flat_map(|(first, pair)| [(first[0], pair[0]), (first[1], pair[1])])
            .filter_map(|(first, follower)| Some((follower, firsts.get(&first)?.clone())))
            .collect()
    }
}
