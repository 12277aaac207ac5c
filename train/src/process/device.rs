//! Devices by name.

use burn::tensor::Device;
#[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu", feature = "vulkan", feature = "metal"))]
use burn::tensor::DeviceType;

/// Device that does not exist or that this build does not support.
#[derive(Debug, thiserror::Error)]
#[error("train.device = \"{name}\": {reason}")]
pub struct DeviceError {
    /// The name.
    name: String,
    /// Reason and remedy.
    reason: String,
}

/// Which of several adapters a name such as `wgpu:1` or `wgpu:cpu` means.
#[derive(Clone, Copy)]
enum Choice {
    /// The backend's own choice.
    Default,
    /// The n-th graphics card.
    #[allow(dead_code, reason = "read by builds with a GPU")]
    Card(usize),
    /// A software driver.
    Software,
}

/// Returns the plain device (without autodiff) of a name such as `cpu`, `cuda`, `cuda:1` or `wgpu:cpu`.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let refuse = |reason: String| DeviceError { name: name.to_string(), reason };
    let (kind, choice) = match name.split_once(':') {
        Some((kind @ ("wgpu" | "vulkan"), "cpu")) => (kind, Choice::Software),
        Some((kind, number)) => {
            (kind, Choice::Card(number.parse().map_err(|_| refuse(format!("\"{number}\" is not a number")))?))
        }
        None => (name, Choice::Default),
    };
    match (kind, choice) {
        #[cfg(feature = "flex")]
        ("cpu", Choice::Default) => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        ("cuda", choice) => gpu::present(Device::cuda(gpu::index(choice)), DeviceType::Cuda, choice).map_err(refuse),
        #[cfg(feature = "rocm")]
        ("rocm", choice) => gpu::present(Device::rocm(gpu::index(choice)), DeviceType::Rocm, choice).map_err(refuse),
        #[cfg(feature = "wgpu")]
        ("wgpu", choice) => gpu::present(Device::wgpu(gpu::kind(choice)), DeviceType::Wgpu, choice).map_err(refuse),
        #[cfg(feature = "vulkan")]
        ("vulkan", choice) => {
            gpu::present(Device::vulkan(gpu::kind(choice)), DeviceType::Vulkan, choice).map_err(refuse)
        }
        #[cfg(feature = "metal")]
        ("metal", choice) => gpu::present(Device::metal(gpu::kind(choice)), DeviceType::Metal, choice).map_err(refuse),
        ("cpu", _) => Err(refuse("there is one CPU device; write `cpu`".into())),
        #[cfg(not(feature = "flex"))]
        ("cpu", Choice::Default) => Err(refuse("this build has no CPU support; build with `--features flex`".into())),
        #[allow(unreachable_patterns)] // those that this build has stand above
        ("cuda" | "rocm" | "wgpu" | "vulkan" | "metal", _) => {
            Err(refuse(format!("this build has no {kind} support; build with `--features {kind}`")))
        }
        _ => Err(refuse(
            "known are cpu, cuda, rocm, wgpu, vulkan and metal, those of GPUs with `:N` for the N-th card, and \
             wgpu:cpu and vulkan:cpu for a software driver"
                .into(),
        )),
    }
}

/// Returns the name that the driver gives to a GPU; none for the CPU.
pub fn adapter_name(device: &Device) -> Option<String> {
    #[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu", feature = "vulkan", feature = "metal"))]
    return device.identity().map(|identity| identity.name);
    #[cfg(not(any(feature = "cuda", feature = "rocm", feature = "wgpu", feature = "vulkan", feature = "metal")))]
    {
        let _ = device;
        None
    }
}

#[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod gpu {
    use burn::tensor::{Device, DeviceType};

    use super::Choice;

    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
    pub fn kind(choice: Choice) -> burn::tensor::DeviceKind {
        match choice {
            Choice::Default => burn::tensor::DeviceKind::DefaultDevice,
            Choice::Card(number) => burn::tensor::DeviceKind::DiscreteGpu(number),
            Choice::Software => burn::tensor::DeviceKind::Cpu,
        }
    }

    #[cfg(any(feature = "cuda", feature = "rocm"))]
    pub fn index(choice: Choice) -> usize {
        match choice {
            Choice::Card(number) => number,
            Choice::Default | Choice::Software => 0,
        }
    }

    /// Rejects a device that this machine does not have: the backends panic when one is first used.
    pub fn present(device: Device, of: DeviceType, choice: Choice) -> Result<Device, String> {
        let known = Device::enumerate(of);
        if known.is_empty() {
            return Err("no such device was found; install its driver, or use `cpu`".into());
        }
        if !matches!(choice, Choice::Default) && !known.contains(&device) {
            let names = known.iter().map(|device| super::adapter_name(device).unwrap_or_default());
            return Err(format!(
                "this machine has: {}; cards are counted from 0, and a software driver is `:cpu`",
                names.collect::<Vec<_>>().join(", ")
            ));
        }
        Ok(device)
    }
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
        assert!(message("cuda:x").contains("not a number"));
        assert!(message("cpu:1").contains("one CPU"));
        assert!(message("cuda:cpu").contains("not a number"));
        assert!(message("gpu").contains("wgpu:cpu"));
        #[cfg(not(feature = "cuda"))]
        assert!(message("cuda").contains("--features cuda"));
        #[cfg(not(feature = "wgpu"))]
        assert!(message("wgpu:cpu").contains("--features wgpu"));
    }
}
