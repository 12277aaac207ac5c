//! Structures that start from a decomposition of the weight.

use burn::tensor::{Tensor, TensorData};
use lowrank_models::adapter::{AdapterConfig, GivenTensors};

use super::bench::{Bench, adapter, attached, batch, fresh, given, near};
use super::case::{Case, host};

/// Tensors of a case under other names; `values` gives some of our own.
pub fn kept(case: &Case, names: &[(&str, &str)], values: Vec<(&str, Vec<f32>)>) -> Result<GivenTensors, String> {
    let mut kept = GivenTensors::new();
    for (field, name) in names {
        let array = case.array(name)?;
        kept.insert(field.to_string(), TensorData::new(array.f32(), array.shape.clone()));
    }
    for (field, values) in values {
        let count = values.len();
        kept.insert(field.to_string(), TensorData::new(values, [count]));
    }
    Ok(kept)
}

pub fn matrix(case: &Case, name: &str) -> Result<Tensor<2>, String> {
    Ok(case.array(name)?.tensor())
}

/// The weight less a part of it, `left diag(values) right`, is the case's remainder.
pub fn remainder(case: &Case, left: &str, values: &[f32], right: &str) -> Result<(), String> {
    let values = Tensor::<1>::from_data(values, &Default::default()).unsqueeze::<2>();
    let part = (matrix(case, left)? * values).matmul(matrix(case, right)?);
    let rest = host(matrix(case, "in.weight")? - part);
    let size = case.array("in.weight")?.largest();
    case.array("frozen.residual")?.near("frozen.residual", &rest, 2e-5 * size, 0.0).map(|_| ())
}

/// The first values of a tensor.
pub fn first(case: &Case, name: &str, count: usize) -> Result<Vec<f32>, String> {
    let mut values = case.array(name)?.f32();
    values.truncate(count);
    Ok(values)
}

/// A tensor of an adapter, laid out as in the case.
pub fn tensor(bench: &Bench, field: &str) -> Result<Vec<f32>, String> {
    let found = adapter(bench).tensors().into_iter().find(|(tensor, _)| tensor.field == field);
    let (_, data) = found.ok_or_else(|| format!("the adapter has no tensor {field}"))?;
    data.try_into_vec().map_err(|error| format!("{field}: {error:?}"))
}

/// The tensors that an adapter of our own begins with, with the trained ones of the case in place of their like.
pub fn own(case: &Case, config: &AdapterConfig, word: &str) -> Result<Bench, String> {
    let start = adapter(&fresh(case, config)?);
    let mut tensors: GivenTensors = start.tensors().into_iter().map(|(tensor, data)| (tensor.field, data)).collect();
    tensors.extend(given(case, &[word])?);
    attached(case, config, tensors)
}

/// An adapter that begins by itself leaves the layer as it is.
pub fn starts_at_base(case: &Case, config: &AdapterConfig) -> Result<Bench, String> {
    let bench = fresh(case, config)?;
    near(case, "exp.y_base", &host(bench.output(batch(case, "in.x")?).inner()), 1e-5)?;
    Ok(bench)
}
