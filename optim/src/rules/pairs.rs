//! The two factors of LoRA adapters: their location in a module and their elements.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor, TensorData};
use lowrank_kernels::host::values;
use nalgebra::{DMatrix, Dyn, SymmetricEigen};

use crate::error::OptimError;
use crate::part::Part;
use crate::path::{ModulePath, ParameterVisitor, visit_parameters};

/// The two factors of one LoRA adapter: its layer acts as `x (W + scale A B)`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPair {
    /// Path of the layer.
    pub path: String,
    /// The frozen weight `W [d_in, d_out]`.
    pub weight: ParamId,
    /// `A [d_in, rank]`.
    pub a: ParamId,
    /// `B [rank, d_out]`.
    pub b: ParamId,
    /// Factor of the product.
    pub scale: f64,
}

impl LoraPair {
    /// The adapters that Burn's [`Module::apply_lora`] attached to a module; having none is an error.
    pub fn of<M: Module>(module: &M) -> Result<Vec<Self>, OptimError> {
        let mut finder = Finder::default();
        visit_parameters(module, &mut finder);
        if finder.found.is_empty() {
            return Err(OptimError::NoAdapter);
        }
        let mut pairs = finder.found;
        let mut scales = Scales { pairs: &pairs, found: BTreeMap::new() };
        module.clone().map(&mut Ones(&pairs)).materialize().visit(&mut scales);
        let found = scales.found;
        for pair in &mut pairs {
            pair.scale = found.get(&pair.weight).copied().unwrap_or(1.0);
        }
        Ok(pairs)
    }
}

/// Burn passes a visitor `weight`, then, inside of `lora`, `a` and `b`.
#[derive(Default)]
struct Finder {
    /// Of the last tensor outside of an adapter, and of `a`.
    weight: Option<ParamId>,
    a: Option<ParamId>,
    found: Vec<LoraPair>,
}

impl ParameterVisitor for Finder {
    fn float<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<D>>) {
        let inside = path.within("lora", "Reparameterization");
        let path = path.joined();
        if !inside {
            self.weight = Some(param.id);
        } else if path.ends_with(".a") {
            self.a = Some(param.id);
        } else if let (Some(weight), Some(a), Some(layer)) = (self.weight, self.a.take(), path.strip_suffix(".lora.b"))
        {
            let path = layer.strip_suffix(".weight").unwrap_or(layer).to_string();
            self.found.push(LoraPair { path, weight, a, b: param.id, scale: f64::NAN });
        }
    }
}

/// Burn passes a visitor the factors of its adapters but not their scale. It is read from a copy of the module whose adapters are
/// `0 + scale * 1 * 1`.
struct Ones<'a>(&'a [LoraPair]);

impl ModuleMapper for Ones<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, device) = (param.id, param.lazy_device().inner());
        let one = |value: f32| Param::initialized(id, Tensor::full([1; D], value, (&device, DType::F32)));
        if self.0.iter().any(|pair| pair.weight == id) {
            one(0.0)
        } else if self.0.iter().any(|pair| pair.a == id || pair.b == id) {
            one(1.0)
        } else {
            param
        }
    }
}

struct Scales<'a> {
    pairs: &'a [LoraPair],
    found: BTreeMap<ParamId, f64>,
}

impl ModuleVisitor for Scales<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.pairs.iter().any(|pair| pair.weight == param.id) {
            self.found.insert(param.id, f64::from(param.val().into_scalar::<f32>()));
        }
    }
}

/// Matrices of a module by their ids, without gradient. While they are held the module's own are not changed in place.
pub(super) fn matrices(part: &dyn Part, wanted: &BTreeSet<ParamId>) -> BTreeMap<ParamId, Tensor<2>> {
    struct Collect<'a> {
        wanted: &'a BTreeSet<ParamId>,
        found: BTreeMap<ParamId, Tensor<2>>,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.wanted.contains(&param.id)
                && let [rows, columns] = *param.lazy_shape().as_slice()
            {
                self.found.insert(param.id, param.base().without_autodiff().reshape([rows, columns]));
            }
        }
    }
    let mut collect = Collect { wanted, found: BTreeMap::new() };
    part.walk(&mut collect);
    collect.found
}

/// A pair with its factors and their gradients, in f32.
pub(super) struct PairGradients<'a> {
    pub pair: &'a LoraPair,
    pub a: Tensor<2>,
    pub b: Tensor<2>,
    pub grad_a: Option<Tensor<2>>,
    pub grad_b: Tensor<2>,
}

/// Removes the gradients of the pairs from those of a module, or of a part of it. With `both` a gradient of one factor alone is an error,
/// else that of B is enough.
pub(super) fn take_pairs<'a>(
    part: &dyn Part,
    pairs: &'a [LoraPair],
    grads: &mut GradientsParams,
    both: bool,
) -> Result<Vec<PairGradients<'a>>, OptimError> {
    let mut taken = Vec::new();
    for pair in pairs {
        match (grads.remove::<2>(pair.a), grads.remove::<2>(pair.b)) {
            (None, None) => {}
            (grad_a, Some(grad_b)) if grad_a.is_some() || !both => taken.push((pair, grad_a, grad_b)),
            (grad_a, _) => {
                let [present, missing] = if grad_a.is_some() { ["A", "B"] } else { ["B", "A"] };
                return Err(OptimError::LoneFactor { path: pair.path.clone(), present, missing });
            }
        }
    }
    let wanted = taken.iter().flat_map(|(pair, ..)| [pair.a, pair.b]).collect();
    let mut found = matrices(part, &wanted);
    let mut met = Vec::with_capacity(taken.len());
    for (pair, grad_a, grad_b) in taken {
        let (Some(a), Some(b)) = (found.remove(&pair.a), found.remove(&pair.b)) else {
            return Err(OptimError::NoAdapter);
        };
        let f32 = |x: Tensor<2>| x.cast(DType::F32);
        met.push(PairGradients { pair, a: f32(a), b: f32(b), grad_a: grad_a.map(f32), grad_b: f32(grad_b) });
    }
    Ok(met)
}

/// A matrix in f64 on the host, column by column: a tensor `[n, m]` is held as `m x n`, which is how the papers write the factors.
pub(super) fn transposed(x: Tensor<2>) -> DMatrix<f64> {
    let [rows, columns] = x.dims();
    DMatrix::from_iterator(columns, rows, values(x).into_iter().map(f64::from))
}

/// The tensor `[n, m]` of a matrix `m x n`, or the number of its elements that are infinite or not a number.
pub(super) fn data(x: &DMatrix<f64>) -> Result<TensorData, u64> {
    let values: Vec<f32> = x.iter().map(|value| *value as f32).collect();
    match values.iter().filter(|value| !value.is_finite()).count() {
        0 => Ok(TensorData::new(values, [x.ncols(), x.nrows()])),
        count => Err(count as u64),
    }
}

/// Eigenvalues and eigenvectors of a product of a matrix with itself; values below 0 are rounding. None when something is not finite.
pub(super) fn eigen(gram: &DMatrix<f64>) -> Option<SymmetricEigen<f64, Dyn>> {
    /// Sweeps after which the iteration stops without result; it needs a few for each value.
    const SWEEPS: usize = 100;
    if gram.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let mut eigen = SymmetricEigen::try_new(gram.clone(), f64::EPSILON, SWEEPS * gram.nrows().max(32))?;
    eigen.eigenvalues.apply(|value| *value = value.max(0.0));
    Some(eigen)
}

/// `(G + delta I)^-1` from the eigenvectors of G.
pub(super) fn damped_inverse(eigen: &SymmetricEigen<f64, Dyn>, delta: f64) -> DMatrix<f64> {
    let mut scaled = eigen.eigenvectors.clone();
    for (mut column, value) in scaled.column_iter_mut().zip(eigen.eigenvalues.iter()) {
        column.scale_mut((value + delta).recip());
    }
    scaled * eigen.eigenvectors.transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Lora;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    #[derive(Module, Debug)]
    struct Two {
        first: Linear,
        others: Vec<Linear>,
    }

    #[test]
    fn burns_adapters_are_found_with_their_scales() {
        let device = Device::default().autodiff();
        let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).init(&device);
        let module = Two { first: layer(4, 6), others: vec![layer(6, 5), layer(5, 3)] };
        assert!(matches!(LoraPair::of(&module), Err(OptimError::NoAdapter)));
        let only = burn::module::ParamGroup::from_predicate("others");
        let module = module.apply_lora(Lora::new(2, 5.0).set_param_group(only));
        let pairs = LoraPair::of(&module).unwrap();
        let paths: Vec<&str> = pairs.iter().map(|pair| pair.path.as_str()).collect();
        assert_eq!(paths, ["others.0", "others.1"]);
        for (pair, layer) in pairs.iter().zip(&module.others) {
            let adapter = layer.weight.adapter().unwrap();
            assert_eq!((pair.weight, pair.a, pair.b), (layer.weight.id, adapter.a.id, adapter.b.id));
            assert_eq!(pair.scale, adapter.scale);
        }
    }
}
