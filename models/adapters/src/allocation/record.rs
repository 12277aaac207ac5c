//! State of an allocation in checkpoints.

use std::collections::BTreeMap;

use burn::optim::OptimizerRecord;
use burn::tensor::TensorData;
use burn_pack::{Reader, Tensor, Writer};

/// Named tensors: the state of an allocation between two steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AllocationRecord(BTreeMap<String, TensorData>);

impl AllocationRecord {
    /// Adds a tensor.
    pub fn put(&mut self, name: impl Into<String>, data: TensorData) {
        self.0.insert(name.into(), data);
    }

    /// Adds values of 8 bytes.
    pub fn put_numbers(&mut self, name: impl Into<String>, values: Vec<f64>) {
        let count = values.len();
        self.put(name, TensorData::new(values, [count]));
    }

    /// Removes and returns a tensor.
    pub fn take(&mut self, name: &str) -> Option<TensorData> {
        self.0.remove(name)
    }

    /// Removes and returns values of 8 bytes.
    pub fn take_numbers(&mut self, name: &str) -> Option<Vec<f64>> {
        self.take(name)?.try_into_vec().ok()
    }

    /// Removes and returns all tensors whose names start with this, under the rest of their names.
    pub fn take_all(&mut self, start: &str) -> Vec<(String, TensorData)> {
        let names: Vec<String> = self.0.keys().filter(|name| name.starts_with(start)).cloned().collect();
        names.into_iter().filter_map(|name| Some((name[start.len()..].to_string(), self.0.remove(&name)?))).collect()
    }
}

impl From<AllocationRecord> for OptimizerRecord {
    fn from(AllocationRecord(tensors): AllocationRecord) -> Self {
        if tensors.is_empty() {
            return Self::default();
        }
        let tensors = tensors.into_iter().map(|(name, data)| {
            let (bytes, shape, dtype) = data.into_parts();
            Tensor::new(name, dtype, shape, None, bytes)
        });
        let bytes = Writer::new(tensors.collect()).into_bytes().map_err(|error| error.to_string());
        match bytes.and_then(|bytes| Self::from_bytes(bytes).map_err(|error| error.to_string())) {
            Ok(record) => record,
            Err(error) => unreachable!("tensors of distinct names make a record: {error}"),
        }
    }
}

impl From<OptimizerRecord> for AllocationRecord {
    fn from(record: OptimizerRecord) -> Self {
        let bytes = record.into_bytes().map_err(|error| error.to_string());
        let tensors = bytes.and_then(|bytes| {
            let tensors =
                Reader::from_bytes(bytes).and_then(Reader::into_tensors).map_err(|error| error.to_string())?;
            let named = tensors.into_iter().map(|tensor| {
                let (name, dtype, shape, _, bytes) = tensor.into_parts().map_err(|error| error.to_string())?;
                Ok((name, TensorData::from_bytes(bytes, shape, dtype)))
            });
            named.collect::<Result<BTreeMap<_, _>, String>>()
        });
        match tensors {
            Ok(tensors) => Self(tensors),
            Err(error) => unreachable!("a record that was read has tensors: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_they_were() {
        let mut record = AllocationRecord::default();
        record.put("mean.7", TensorData::new(vec![1f32, -2.0], [2]));
        record.put_numbers("pattern", vec![1.0, 0.0, 0.1]);
        let kept = OptimizerRecord::from(record.clone());
        assert_eq!(kept.len(), 2);
        let bytes = kept.into_bytes().unwrap();
        let mut back = AllocationRecord::from(OptimizerRecord::from_bytes(bytes).unwrap());
        assert_eq!(back, record);
        assert_eq!(back.take_numbers("pattern"), Some(vec![1.0, 0.0, 0.1]));
        assert_eq!(back.take_all("mean."), [("7".to_string(), TensorData::new(vec![1f32, -2.0], [2]))]);
        assert_eq!(AllocationRecord::from(OptimizerRecord::default()), AllocationRecord::default());
    }
}
