//! Devices by name.

use burn::tensor::Device;

/// Device that does not exist or that this build does not support.
#[derive(Debug, thiserror::Error)]
#[error("train.device = \"{name}\": {reason}")]
pub struct DeviceError {
    /// The name.
    name: String,
    /// Reason and remedy.
    reason: String,
}

/// Returns the plain device (without autodiff) of a name such as `cpu`, `cuda` or `cuda:1`.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let refuse = |reason: String| DeviceError { name: name.to_string(), reason };
    let (kind, number) = match name.split_once(':') {
        Some((kind, number)) => {
            (kind, Some(number.parse::<usize>().map_err(|_| refuse(format!("\"{number}\" is no number")))?))
        }
        None => (name, None),
    };
    match (kind, number) {
        #[cfg(feature = "flex")]
        ("cpu", None) => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        ("cuda", number) => Ok(Device::cuda(number.unwrap_or(0))),
        #[cfg(feature = "rocm")]
        ("rocm", number) => Ok(Device::rocm(number.unwrap_or(0))),
        #[cfg(feature = "wgpu")]
        ("wgpu", number) => Ok(Device::wgpu(kind_of(number))),
        #[cfg(feature = "vulkan")]
        ("vulkan", number) => Ok(Device::vulkan(kind_of(number))),
        #[cfg(feature = "metal")]
        ("metal", number) => Ok(Device::metal(kind_of(number))),
        ("cpu", Some(_)) => Err(refuse("there is one CPU device; write `cpu`".into())),
        #[cfg(not(feature = "flex"))]
        ("cpu", None) => Err(refuse("this build has no CPU support; build with `--features flex`".into())),
        #[allow(unreachable_patterns)] // those that this build has stand above
        ("cuda" | "rocm" | "wgpu" | "vulkan" | "metal", _) => {
            Err(refuse(format!("this build has no {kind} support; build with `--features {kind}`")))
        }
        _ => Err(refuse("known are cpu, cuda, rocm, wgpu, vulkan and metal, the latter with `:N` for the N-th".into())),
    }
}

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
fn kind_of(number: Option<usize>) -> burn::tensor::DeviceKind {
    number.map_or(burn::tensor::DeviceKind::DefaultDevice, burn::tensor::DeviceKind::DiscreteGpu)
}

/// Limits the CPU threads of the whole process; 0 means one per core. Only the first call of a process has an effect.
pub fn set_threads(threads: usize) {
    if threads > 0 {
        // Fails if the pool is already running, which only happens in a second call of the process.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_missing_devices_say_what_to_do() {
        device("cpu").unwrap();
        let message = |name: &str| device(name).unwrap_err().to_string();
        assert!(message("gpu").contains("cuda"));
        assert!(message("cuda:x").contains("no number"));
        assert!(message("cpu:1").contains("one CPU"));
        #[cfg(not(feature = "cuda"))]
        assert!(message("cuda").contains("--features cuda"));
    }
}
