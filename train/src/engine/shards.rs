//! Optimizer state that is divided among the processes of a run: each parameter belongs to one of them, which alone holds
//! its state and updates it, and sends the result to the others.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{DType, Shape, Tensor, TensorData};
use lowrank_kernels::narrow::packed::{holds_codes, memory, of_memory, stored_bytes};

use crate::process::Peers;

/// Division of parameters among processes, the same on all of them.
#[derive(Clone, Debug)]
pub struct Shards {
    peers: Peers,
    /// Owner of each parameter by its id.
    owners: BTreeMap<u64, usize>,
}

/// Owner of each of these states, so that the processes hold about equally many bytes: the largest state first, each to
/// the process with the fewest bytes so far.
pub fn owners(bytes: &[u64], processes: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..bytes.len()).collect();
    order.sort_by_key(|number| Reverse(bytes[*number]));
    let mut held = vec![(0, 0); processes.max(1)];
    let mut owners = vec![0; bytes.len()];
    for number in order {
        // States without bytes are dealt out by their number.
        let owner = (0..held.len()).min_by_key(|process| held[*process]).unwrap_or(0);
        held[owner].0 += bytes[number];
        held[owner].1 += 1;
        owners[number] = owner;
    }
    owners
}

/// Bytes of the process that holds most of these states.
pub fn largest_share(bytes: &[u64], processes: usize) -> u64 {
    let mut held = vec![0; processes.max(1)];
    owners(bytes, processes).iter().zip(bytes).for_each(|(owner, bytes)| held[*owner] += bytes);
    held.into_iter().max().unwrap_or(0)
}

impl Shards {
    /// Divides parameters with states of these bytes.
    pub fn new(peers: Peers, states: &[(ParamId, u64)]) -> Self {
        let bytes: Vec<u64> = states.iter().map(|(_, bytes)| *bytes).collect();
        let ids = states.iter().map(|(id, _)| id.val());
        Self { peers, owners: ids.zip(owners(&bytes, peers.size())).collect() }
    }

    /// The processes.
    pub fn peers(&self) -> Peers {
        self.peers
    }

    /// Returns true if the parameter with this id belongs to this process.
    pub fn is_own(&self, id: u64) -> bool {
        self.owners.get(&id) == Some(&self.peers.rank())
    }

    /// Owner of a parameter. One that appears in the course of a run is dealt out when it first has a gradient, which is
    /// in the same order on all processes.
    fn owner(&mut self, id: u64) -> usize {
        let next = self.owners.len() % self.peers.size();
        *self.owners.entry(id).or_insert(next)
    }

    /// Takes a step of the optimizer: each process updates its own parameters and receives all others.
    pub(super) fn step<M: Module>(
        &mut self,
        optimizer: &mut ModuleOptimizer,
        lr: f64,
        model: M,
        grads: GradientsParams,
    ) -> M {
        let mut divide = Divide { shards: self, grads, own: GradientsParams::new(), stepped: BTreeMap::new() };
        model.visit(&mut divide);
        let Divide { own, stepped, .. } = divide;
        let model = optimizer.step(lr, model, own);
        model.map(&mut Exchange { peers: self.peers, stepped })
    }
}

/// Selects the gradients of this process' parameters, and notes the owners of all that have gradients.
struct Divide<'a> {
    shards: &'a mut Shards,
    grads: GradientsParams,
    own: GradientsParams,
    stepped: BTreeMap<u64, usize>,
}

impl ModuleVisitor for Divide<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(grad) = self.grads.remove::<D>(param.id) else { return };
        let owner = self.shards.owner(param.id.val());
        self.stepped.insert(param.id.val(), owner);
        if owner == self.shards.peers.rank() {
            self.own.register(param.id, grad);
        }
    }
}

/// Gives all processes the values of the owners.
struct Exchange {
    peers: Peers,
    stepped: BTreeMap<u64, usize>,
}

impl Exchange {
    /// The owner's value of a tensor that is not tracked, with the owner's bits.
    fn exchanged<const D: usize>(&self, value: Tensor<D>, owner: usize) -> Tensor<D> {
        if owner == self.peers.rank() {
            let (mut bytes, ..) = memory(value.clone()).into_parts();
            self.peers.broadcast(owner, &mut bytes);
            return value;
        }
        let (codes, device, shape, dtype) = (holds_codes(&value), value.device(), value.shape(), value.dtype());
        let mut bytes = vec![0; stored_bytes(&value)];
        drop(value);
        self.peers.broadcast(owner, &mut bytes);
        if codes {
            let words = Shape::from([bytes.len() / DType::F32.size()]);
            let sides = [shape[0], shape[1]];
            let held = of_memory(TensorData::from_bytes_vec(bytes, words, DType::F32), sides, &device);
            return Tensor::from_dispatch(held.into_dispatch());
        }
        Tensor::from_data(TensorData::from_bytes_vec(bytes, shape, dtype), (&device, dtype))
    }
}

impl ModuleMapper for Exchange {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(owner) = self.stepped.remove(&param.id.val()) else { return param };
        let (id, tensor, mapper) = param.consume();
        let (tracked, trained) = (tensor.device().is_autodiff(), tensor.is_require_grad());
        let value = self.exchanged(tensor.without_autodiff(), owner);
        let value = if tracked { Tensor::from_inner(value) } else { value };
        let value = if trained { value.require_grad() } else { value };
        Param::from_mapped_value(id, value, mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_divided_into_about_equal_shares_whatever_their_order() {
        let bytes = [800, 100, 0, 400, 400, 300, 100, 0, 300];
        let share = |processes| {
            let owners = owners(&bytes, processes);
            let held = |process| -> u64 {
                owners.iter().zip(bytes).filter(|(owner, _)| **owner == process).map(|(_, bytes)| bytes).sum()
            };
            (0..processes).map(held).collect::<Vec<u64>>()
        };
        assert_eq!(share(1), [2400]);
        assert_eq!(share(2), [1200, 1200]);
        assert_eq!(share(3), [800, 800, 800]);
        assert_eq!((largest_share(&bytes, 2), largest_share(&bytes, 100), largest_share(&[], 3)), (1200, 800, 0));
        let empty = owners(&[0, 0, 0, 0], 2);
        assert_eq!(empty, [0, 1, 0, 1], "states of unknown size are dealt out in turn");
    }
}
