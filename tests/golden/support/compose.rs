//! Layers of compositions from the tensors of a case.

use lowrank_models::adapter::compose::{Composition, Layer, Matrix, Source};
use serde_json::{Value, json};

use super::case::{Array, Case};

/// A matrix of a case.
pub fn matrix(case: &Case, name: &str) -> Result<Matrix, String> {
    let Array { shape, values } = case.array(name)?;
    match shape[..] {
        [rows, columns] => Ok(Matrix::from_row_slice(rows, columns, &values)),
        _ => Err(format!("{name} has shape {shape:?} instead of that of a matrix")),
    }
}

/// Number of tensors `prefix{i}suffix` from 0 on.
pub fn count(case: &Case, prefix: &str, suffix: &str) -> usize {
    (0..).take_while(|number| case.has(&format!("{prefix}{number}{suffix}"))).count()
}

/// The adapters of a case, with scales and weights of its configuration.
pub fn layer(case: &Case) -> Result<Layer, String> {
    let listed = |key: &str| -> Result<Option<Vec<f64>>, String> {
        match &case.config[key] {
            Value::Null => Ok(None),
            value => serde_json::from_value(value.clone()).map_err(|error| format!("{key}: {error}")),
        }
    };
    let (scales, weights) = (listed("scales")?, listed("weights")?);
    let sources: Result<Vec<Source>, String> = (0..count(case, "adapter", ".A"))
        .map(|number| {
            let at = |list: &Option<Vec<f64>>| match list {
                None => Ok(None),
                Some(list) => list.get(number).copied().map(Some).ok_or("a list has fewer numbers than adapters"),
            };
            Ok(Source {
                adapter: format!("adapter{number}"),
                a: matrix(case, &format!("adapter{number}.A"))?,
                b: matrix(case, &format!("adapter{number}.B"))?,
                scale: at(&scales)?.unwrap_or(1.0),
                weight: at(&weights)?,
                basis: None,
            })
        })
        .collect();
    Layer::new("layer", sources?).map_err(|error| error.to_string())
}

/// The composition of a name with options of a JSON object.
pub fn method(name: &str, options: Value) -> Result<Box<dyn Composition>, String> {
    let options = options.as_object().cloned().unwrap_or_default();
    <dyn Composition>::named(name, &options).map_err(|error| error.to_string())
}

/// The dense update that a composition makes of a layer.
pub fn delta(name: &str, options: Value, layer: &Layer) -> Result<Matrix, String> {
    let composed = method(name, options)?.compose(layer).map_err(|error| error.to_string())?;
    composed.result.into_delta().ok_or_else(|| format!("{name} makes no update"))
}

/// Row-major values.
pub fn values(matrix: &Matrix) -> Vec<f32> {
    matrix.transpose().iter().map(|value| *value as f32).collect()
}

/// Equal to a tensor of the case within a share of its largest value.
pub fn near(case: &Case, name: &str, ours: &Matrix, share: f64) -> Result<(), String> {
    let expected = case.array(name)?;
    if expected.shape.len() == 2 && expected.shape != [ours.nrows(), ours.ncols()] {
        return Err(format!("{name} has shape {:?}, ours {:?}", expected.shape, ours.shape()));
    }
    expected.near(name, &values(ours), share * expected.largest().max(1e-6), 0.0).map(|_| ())
}

/// A number of the configuration as an option, or none.
pub fn optional(case: &Case, key: &str) -> Value {
    match &case.config[key] {
        Value::Null => json!(null),
        value => value.clone(),
    }
}
