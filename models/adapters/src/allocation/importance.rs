//! Importance of parameters from their sensitivity over several steps.

use burn::tensor::{Device, Tensor, TensorData};

use super::record::AllocationRecord;

/// Exponential means of sensitivities, and of their deviations from those means: both start at 0 and are not corrected for it. What is sensitive
/// and uncertain is important.
#[derive(Clone, Debug)]
pub struct Importance {
    mean: Tensor<1>,
    deviation: Tensor<1>,
}

impl Importance {
    /// Importance of `count` parameters that were never seen.
    pub fn new(count: usize, device: &Device) -> Self {
        Self { mean: Tensor::zeros([count], device), deviation: Tensor::zeros([count], device) }
    }

    /// Adds the sensitivities of a step.
    pub fn add(&mut self, sensitivity: Tensor<1>, beta_1: f64, beta_2: f64) {
        let device = sensitivity.device();
        let [mean, deviation] = [&self.mean, &self.deviation].map(|kept| kept.clone().to_device(&device));
        self.mean = mean.mul_scalar(beta_1) + sensitivity.clone().mul_scalar(1.0 - beta_1);
        let away = (sensitivity - self.mean.clone()).abs();
        self.deviation = deviation.mul_scalar(beta_2) + away.mul_scalar(1.0 - beta_2);
    }

    /// Mean times deviation.
    pub fn score(&self) -> Tensor<1> {
        self.mean.clone() * self.deviation.clone()
    }

    /// Writes it to a record under a name.
    pub fn put(&self, name: &str, record: &mut AllocationRecord) {
        for (part, values) in [("mean", &self.mean), ("deviation", &self.deviation)] {
            record.put(format!("{part}.{name}"), values.clone().into_data());
        }
    }

    /// Removes and returns all of a record, by their names.
    pub fn take_all(record: &mut AllocationRecord) -> Vec<(String, Self)> {
        let means = record.take_all("mean.");
        let tensor = |data: TensorData| Tensor::from_data(data, &Device::default());
        means
            .into_iter()
            .filter_map(|(name, mean)| {
                let deviation = record.take(&format!("deviation.{name}"))?;
                Some((name, Self { mean: tensor(mean), deviation: tensor(deviation) }))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_kernels::host::values;

    #[test]
    fn means_follow_the_sensitivities_and_come_back_from_a_record() {
        let step = |values: [f32; 2]| Tensor::<1>::from_data(TensorData::from(values), &Device::default());
        let mut importance = Importance::new(2, &Device::default());
        importance.add(step([1.0, 0.0]), 0.5, 0.75);
        importance.add(step([3.0, 0.0]), 0.5, 0.75);
        // Means 0.5 and 1.75, deviations 0.25 * 0.5 and 0.75 * 0.125 + 0.25 * 1.25.
        assert_eq!(values(importance.score()), [1.75 * 0.40625, 0.0]);
        let mut record = AllocationRecord::default();
        importance.put("7", &mut record);
        let back = Importance::take_all(&mut record);
        assert_eq!((back.len(), back[0].0.as_str()), (1, "7"));
        assert_eq!(values(back[0].1.score()), values(importance.score()));
        assert_eq!(record, AllocationRecord::default());
    }
}
