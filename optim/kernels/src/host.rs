//! Values of tensors on the host. On the CPU backend they are the tensor's own memory: nothing is copied if the tensor is not shared.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::ops::widened;

/// Row-major values of a float tensor.
pub fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    // A matrix in codes has no values of its own.
    let x = match D {
        2 => Tensor::from_dispatch(widened(Tensor::from_dispatch(x.into_dispatch())).into_dispatch()),
        _ => x,
    };
    match x.into_data().convert::<f32>().try_into_vec() {
        Ok(values) => values,
        Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
    }
}

/// Values of an index tensor.
pub fn indices(x: &Tensor<1, Int>) -> Vec<i32> {
    match x.to_data().convert::<i32>().try_into_vec() {
        Ok(values) => values,
        Err(error) => unreachable!("data converted to i32 is i32: {error:?}"),
    }
}

/// Reports whether plain tensors of this device live in the CPU backend's memory.
pub fn is_cpu(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    return matches!(device.as_dispatch(), burn::backend::DispatchDevice::Flex(_));
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
}

/// Elements of an f32 tensor for changes in place.
pub struct Memory<const D: usize> {
    data: TensorData,
    device: Device,
}

impl<const D: usize> Memory<D> {
    /// Uses the tensor's memory, or a copy if the tensor is shared.
    pub fn of(x: Tensor<D>) -> Self {
        let device = x.device();
        Self { data: x.into_data().convert::<f32>(), device }
    }

    /// The values.
    pub fn read(&self) -> &[f32] {
        match self.data.as_slice() {
            Ok(values) => values,
            Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
        }
    }

    /// The values.
    pub fn write(&mut self) -> &mut [f32] {
        match self.data.as_mut_slice() {
            Ok(values) => values,
            Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
        }
    }

    /// Returns the elements as a tensor.
    pub fn tensor(self) -> Tensor<D> {
        Tensor::from_data(self.data, &self.device)
    }
}
