//! Devices by name. The only file that names a backend.

use burn::tensor::Device;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use burn::tensor::DeviceType;
use burn::tensor::Tensor;
use flux_model::layers::packed;

/// What the program can be built for, and the cargo feature that builds it.
pub const BACKENDS: [Backend; 4] = [
    Backend {
        name: "flex",
        about: "CPU; the default",
        compiled: cfg!(feature = "flex"),
    },
    Backend {
        name: "ndarray",
        about: "CPU, on the ndarray crate",
        compiled: cfg!(feature = "ndarray"),
    },
    Backend {
        name: "wgpu",
        about: "GPU through Vulkan, Metal or DirectX 12",
        compiled: cfg!(feature = "wgpu"),
    },
    Backend {
        name: "cuda",
        about: "NVIDIA GPU",
        compiled: cfg!(feature = "cuda"),
    },
];

/// One backend.
#[derive(Debug, Clone, Copy)]
pub struct Backend {
    /// Name on the command line, and of the cargo feature.
    pub name: &'static str,
    /// What it runs on.
    pub about: &'static str,
    /// Whether this binary contains it.
    pub compiled: bool,
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No backend of that name.
    #[error("unknown device `{name}`; known: {}", BACKENDS.map(|b| b.name).join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// The binary was built without it.
    #[error(
        "device `{name}` is not in this binary; build it with `--features {name}` (or run `cargo xtask train --device {name}`)"
    )]
    NotCompiled {
        /// The backend.
        name: &'static str,
    },
    /// The machine has none.
    #[error("no {name} device found on this machine{}", if found == &0 { String::new() } else { format!(": index {index} asked for, {found} present") })]
    Absent {
        /// The backend.
        name: &'static str,
        /// The index asked for.
        index: usize,
        /// How many there are.
        found: usize,
    },
    /// Devices that do not compute the same bits.
    #[error(
        "devices `{first}` ({first_hardware}) and `{other}` ({other_hardware}) do not compute the same bits: those that share the steps of a run are of one backend and one kind of hardware"
    )]
    Unlike {
        /// The first device.
        first: String,
        /// What it is.
        first_hardware: String,
        /// One that differs.
        other: String,
        /// What that is.
        other_hardware: String,
    },
}

/// A device chosen by the user.
#[derive(Debug, Clone)]
pub struct NamedDevice {
    /// Backend and index, as in `cuda:1`.
    pub name: String,
    /// What the backend calls the hardware.
    pub hardware: String,
    /// The device, without autodiff.
    pub device: Device,
}

impl NamedDevice {
    /// The backend's name, without index.
    pub fn backend(&self) -> &str {
        self.name.split(':').next().unwrap_or_default()
    }

    /// Whether it computes in the machine's own memory.
    pub fn is_cpu(&self) -> bool {
        matches!(self.backend(), "flex" | "ndarray")
    }

    /// Whether operations have kernels there ([`lora_core::ops`]).
    pub fn has_kernels(&self) -> bool {
        self.backend() == "flex"
    }

    /// Whether a small tensor that is expanded stays small.
    pub fn keeps_views(&self) -> bool {
        self.backend() != "ndarray"
    }
}

/// The backend used where none is asked for: the first this binary contains.
pub fn default_name() -> &'static str {
    BACKENDS
        .iter()
        .find(|backend| backend.compiled)
        .map_or("flex", |backend| backend.name)
}

/// Opens `name`, such as `flex`, `wgpu` or `cuda:1`.
///
/// # Errors
/// A name that is unknown, not compiled in, or absent on this machine.
pub fn open(name: &str) -> Result<NamedDevice, DeviceError> {
    let unknown = || DeviceError::Unknown { name: name.into() };
    let (backend, index) = match name.split_once(':') {
        None => (name, 0),
        Some((backend, index)) => (backend, index.parse().map_err(|_| unknown())?),
    };
    let known = BACKENDS
        .iter()
        .find(|known| known.name == backend)
        .ok_or_else(unknown)?;
    if !known.compiled {
        return Err(DeviceError::NotCompiled { name: known.name });
    }
    let found = list(known.name);
    let count = found.len();
    found.into_iter().nth(index).ok_or(DeviceError::Absent {
        name: known.name,
        index,
        found: count,
    })
}

/// Opens every device of a list such as `cuda:0,cuda:1`, of one backend and one kind of hardware. One may be named more than
/// once: `flex,flex` are two workers on the CPU.
///
/// # Errors
/// As [`open`], and devices that differ.
pub fn open_all(names: &str) -> Result<Vec<NamedDevice>, DeviceError> {
    let devices = names.split(',').map(|name| open(name.trim()));
    let devices = devices.collect::<Result<Vec<_>, _>>()?;
    let kind = |device: &NamedDevice| (device.backend().to_string(), device.hardware.clone());
    match devices
        .iter()
        .find(|other| kind(other) != kind(&devices[0]))
    {
        None => Ok(devices),
        Some(other) => Err(DeviceError::Unlike {
            first: devices[0].name.clone(),
            first_hardware: devices[0].hardware.clone(),
            other: other.name.clone(),
            other_hardware: other.hardware.clone(),
        }),
    }
}

/// Every device of a compiled backend.
pub fn list(backend: &str) -> Vec<NamedDevice> {
    let named = |index: usize, hardware: String, device: Device| NamedDevice {
        name: if index == 0 {
            backend.to_string()
        } else {
            format!("{backend}:{index}")
        },
        hardware,
        device,
    };
    match backend {
        #[cfg(feature = "flex")]
        "flex" => vec![named(0, cpu_name(), Device::flex())],
        #[cfg(feature = "ndarray")]
        #[expect(
            deprecated,
            reason = "Burn means to drop this backend; while it is there, it is a second opinion"
        )]
        "ndarray" => vec![named(
            0,
            cpu_name(),
            Device::new(burn_ndarray::NdArrayDevice::Cpu),
        )],
        #[cfg(feature = "wgpu")]
        "wgpu" => {
            let devices = Device::enumerate(DeviceType::Wgpu).into_vec();
            devices
                .into_iter()
                .enumerate()
                .map(|(i, device)| named(i, hardware(&device), device))
                .collect()
        }
        #[cfg(feature = "cuda")]
        "cuda" => {
            let count = Device::enumerate(DeviceType::Cuda).into_vec().len();
            (0..count)
                .map(|i| {
                    let device = Device::new(burn_cuda::CudaDevice::new(i));
                    named(i, hardware(&device), device)
                })
                .collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn hardware(device: &Device) -> String {
    device
        .identity()
        .map_or_else(|| "unknown".into(), |identity| identity.name.to_string())
}

/// The processor's name, where the system tells it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(
        || std::env::consts::ARCH.to_string(),
        |(_, name)| name.trim().to_string(),
    )
}

/// Whether this device sums permuted tensors of rank 4 to wrong numbers, as cubecl backends of Burn 0.22.1 do.
///
/// The networks here avoid the case ([`packed`]), so training is right either way; models of one's own may not be.
pub fn reduction_fault(device: &Device) -> bool {
    let shape = [2, 4, 16, 32];
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|i| (i % 97) as f32)
        .collect();
    let permuted = Tensor::<1>::from_floats(values.as_slice(), device)
        .reshape(shape)
        .swap_dims(2, 3);
    let difference = permuted.clone().sum_dim(0) - packed(permuted).sum_dim(0);
    let largest: f32 = difference.abs().reshape([4 * 16 * 32]).max().into_scalar();
    largest > 1e-3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_names_the_known_ones() {
        let error = open("tpu").expect_err("unknown").to_string();
        assert_eq!(
            error,
            "unknown device `tpu`; known: flex, ndarray, wgpu, cuda"
        );
        assert!(open("flex:x").is_err());
    }

    #[test]
    fn devices_in_a_list_are_alike_and_may_be_one() {
        let name = default_name();
        let two = open_all(&format!("{name}, {name}")).expect("one device, twice");
        assert_eq!(two.len(), 2);
        assert_eq!(open_all(name).expect("one device").len(), 1);
        assert!(open_all(&format!("{name},")).is_err());
    }

    #[cfg(all(feature = "flex", feature = "ndarray"))]
    #[test]
    fn devices_of_two_backends_are_refused_together() {
        let error = open_all("flex,ndarray")
            .expect_err("they differ")
            .to_string();
        assert!(
            error.starts_with("devices `flex` (") && error.contains(") and `ndarray` ("),
            "{error}"
        );
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_that_is_not_compiled_in_names_its_feature() {
        let error = open("cuda").expect_err("not compiled").to_string();
        assert!(error.contains("`--features cuda`"), "{error}");
    }
}
