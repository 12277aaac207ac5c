//! One golden case: named tensors and a configuration.
#![allow(dead_code)] // methods not implemented yet will use all of it

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A remark for the case's line, or what is wrong.
pub type Outcome = Result<String, String>;

/// A case file in memory.
pub struct Case {
    bytes: Vec<u8>,
    /// The file.
    pub path: PathBuf,
    /// The configuration; null when the header has none.
    pub config: Value,
}

/// A tensor of a case as f64, which holds f32 and the integers of the cases exactly.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values in row-major order.
    pub values: Vec<f64>,
}

impl Case {
    /// Reads a case file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| error.to_string())?;
        let config = match metadata.metadata().as_ref().and_then(|map| map.get("config")) {
            Some(text) => serde_json::from_str(text).map_err(|error| format!("configuration: {error}"))?,
            None => Value::Null,
        };
        Ok(Self { bytes, path: path.to_path_buf(), config })
    }

    pub fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("the header was read before")
    }

    /// Names of all tensors.
    pub fn names(&self) -> Vec<String> {
        self.file().names().into_iter().map(str::to_string).collect()
    }

    /// Returns true if there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    /// A tensor.
    pub fn array(&self, name: &str) -> Result<Array, String> {
        let file = self.file();
        let view = file.tensor(name).map_err(|_| format!("tensor {name} is missing"))?;
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::I32 => data.as_chunks().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
            other => return Err(format!("tensor {name} has type {other:?}")),
        };
        Ok(Array { shape: view.shape().to_vec(), values })
    }

    /// A number of the configuration.
    pub fn number(&self, key: &str) -> Result<f64, String> {
        self.config[key]
            .as_f64()
            .ok_or_else(|| format!("configuration: {key} is {} instead of a number", self.config[key]))
    }

    /// A whole number of the configuration.
    pub fn count(&self, key: &str) -> Result<usize, String> {
        let value = &self.config[key];
        value
            .as_u64()
            .map(|n| n as usize)
            .ok_or_else(|| format!("configuration: {key} is {value} instead of a whole number"))
    }
}

impl Array {
    /// The values as f32.
    pub fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|value| *value as f32).collect()
    }

    /// The values as i32.
    pub fn i32(&self) -> Vec<i32> {
        self.values.iter().map(|value| *value as i32).collect()
    }

    /// Refuses values of ours that are further than `absolute + relative * |expected|` from these.
    pub fn near(&self, what: &str, ours: &[f32], absolute: f64, relative: f64) -> Result<f64, String> {
        if ours.len() != self.values.len() {
            return Err(format!("{what}: {} values instead of {}", ours.len(), self.values.len()));
        }
        let mut worst = 0f64;
        for (index, (ours, expected)) in ours.iter().zip(&self.values).enumerate() {
            let difference = (f64::from(*ours) - expected).abs();
            if difference.is_nan() || difference > absolute + relative * expected.abs() {
                return Err(format!("{what}[{index}] is {ours} instead of {expected}"));
            }
            worst = worst.max(difference);
        }
        Ok(worst)
    }
}

impl Case {
    /// A word of the configuration.
    pub fn word(&self, key: &str) -> Result<&str, String> {
        self.config[key].as_str().ok_or_else(|| format!("configuration: {key} is {}", self.config[key]))
    }

    /// A flag of the configuration.
    pub fn flag(&self, key: &str) -> Result<bool, String> {
        self.config[key].as_bool().ok_or_else(|| format!("configuration: {key} is {}", self.config[key]))
    }

    /// One of the known words of the configuration.
    pub fn choice<T: Copy>(&self, key: &str, known: &[(&str, T)]) -> Result<T, String> {
        let word = self.word(key)?;
        let found = known.iter().find(|(name, _)| *name == word).map(|(_, value)| *value);
        found.ok_or_else(|| format!("configuration: {key} is \"{word}\""))
    }
}

impl Array {
    /// The values at one step.
    pub fn at(&self, step: usize) -> Self {
        let size: usize = self.shape[1..].iter().product();
        Self { shape: self.shape[1..].to_vec(), values: self.values[step * size..(step + 1) * size].to_vec() }
    }

    /// The values as a tensor.
    pub fn tensor<const D: usize>(&self) -> burn::tensor::Tensor<D> {
        let data = burn::tensor::TensorData::new(self.f32(), self.shape.clone());
        burn::tensor::Tensor::from_data(data, &burn::tensor::Device::default())
    }

    /// The largest magnitude.
    pub fn largest(&self) -> f64 {
        self.values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
    }
}

/// Values of a tensor of ours.
pub fn host<const D: usize>(tensor: burn::tensor::Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().expect("f32")
}
