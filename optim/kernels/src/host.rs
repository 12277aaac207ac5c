//! Values of tensors on the host. On the CPU backend they are the tensor's own memory: nothing is copied if the tensor is not shared.

use burn::tensor::{Device, Int, Tensor, TensorData};
use rayon::prelude::*;

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

/// Transposes a row-major `rows x columns` matrix in parallel, tile by tile.
///
/// Each line of memory is read and written once, and a stride of a power of two does not throw the lines of a tile out of the cache.
pub fn transpose_into<T: Copy + Default + Send + Sync>(from: &[T], [rows, columns]: [usize; 2], to: &mut [T]) {
    const TILE: usize = 32;
    to.par_chunks_mut((TILE * rows).max(1)).enumerate().for_each(|(band, to)| {
        let first = band * TILE;
        let width = TILE.min(columns - first);
        let mut tile = [[T::default(); TILE]; TILE];
        for top in (0..rows).step_by(TILE) {
            let height = TILE.min(rows - top);
            for row in 0..height {
                let from = &from[(top + row) * columns + first..][..width];
                from.iter().enumerate().for_each(|(column, value)| tile[column][row] = *value);
            }
            for (column, values) in tile[..width].iter().enumerate() {
                to[column * rows + top..][..height].copy_from_slice(&values[..height]);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_any_shape_are_transposed() {
        for (rows, columns) in [(0, 3), (3, 0), (1, 1), (1, 70), (33, 64), (70, 31), (129, 97)] {
            let values: Vec<usize> = (0..rows * columns).collect();
            let mut turned = vec![0; values.len()];
            transpose_into(&values, [rows, columns], &mut turned);
            assert!((0..values.len()).all(|at| turned[at % columns * rows + at / columns] == at), "{rows} x {columns}");
        }
    }
}
