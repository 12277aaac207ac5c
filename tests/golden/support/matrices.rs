//! Matrices of cases in Burn's layout.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::case::{Array, Case};

/// Stored `[d_out, d_in]` or `[d_out, rank]` in the case, transposed in a layer.
pub fn turned(case: &Case, name: &str) -> Result<Tensor<2>, String> {
    Ok(case.array(name)?.tensor::<2>().transpose().autodiff().require_grad())
}

pub fn tracked(case: &Case, name: &str) -> Result<Tensor<1>, String> {
    Ok(case.array(name)?.tensor::<1>().autodiff().require_grad())
}

pub fn rows(case: &Case, name: &str) -> Result<Tensor<2>, String> {
    let array = case.array(name)?;
    let width = *array.shape.last().ok_or("a scalar has no rows")?;
    let count = array.values.len() / width;
    Ok(Tensor::from_data(TensorData::new(array.f32(), [count, width]), &Device::default()))
}

pub fn index(case: &Case, name: &str) -> Result<Tensor<1, Int>, String> {
    let positions = case.array(name)?.i32();
    let count = positions.len();
    Ok(Tensor::from_data(TensorData::new(positions, [count]), (&Device::default(), DType::I32)))
}

/// Within 1e-5 of the largest value.
pub fn near(expected: &Array, what: &str, ours: Vec<f32>) -> Result<(), String> {
    expected.near(what, &ours, 1e-5 * expected.largest().max(1e-3), 1e-5).map(|_| ())
}
