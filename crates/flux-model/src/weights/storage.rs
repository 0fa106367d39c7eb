//! What a stored tensor becomes in memory: the one place that decides it.

use std::fmt;

use burn::tensor::{DType, Device, Element, Tensor, TensorData, bf16, f16};
use lora_core::files::host::{Dtype, HostTensor};
use serde::{Deserialize, Serialize};

/// How the weights of a network's linear layers are kept. Everything else, norms and biases above all, is f32.
///
/// Layers compute in f32 whatever their weights are ([`lora_core::linear`]), and bf16 or f16 to f32 is exact: weights as
/// they are stored give the values that f32 weights give, up to the order of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BaseDtype {
    /// bf16 and f16 as they are, where the device has the type; what is stored otherwise as f32.
    #[default]
    AsStored,
    /// f32.
    F32,
    /// bf16, rounded to nearest even where more bits are stored.
    Bf16,
}

impl fmt::Display for BaseDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AsStored => "as-stored",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl BaseDtype {
    /// Why weights cannot be kept so on `device`, if so.
    pub fn problem(self, device: &Device) -> Option<String> {
        let lacks = self == Self::Bf16 && !device.supports_dtype(DType::BF16);
        lacks.then(|| "this device has no bf16: use \"as-stored\" or \"f32\"".into())
    }

    /// What a weight that is stored as `stored` is kept as; f32 if as nothing smaller.
    pub(super) fn kept(self, stored: Dtype, device: &Device) -> Dtype {
        let wanted = match (self, stored) {
            (Self::AsStored, Dtype::Bf16 | Dtype::F16) => stored,
            (Self::Bf16, _) => Dtype::Bf16,
            _ => Dtype::F32,
        };
        match device.supports_dtype(burn_dtype(wanted)) {
            true => wanted,
            false => Dtype::F32,
        }
    }
}

/// A parameter's values on the host, ready for a device.
pub(super) struct Ready {
    data: TensorData,
    dtype: DType,
    /// `[out, in]`, to be seen as `[in, out]`.
    is_turned: bool,
}

impl Ready {
    /// Decides what a tensor becomes on `device`, and converts it; `is_linear` says that it is the weight of a linear layer,
    /// `[out, in]`.
    ///
    /// # Errors
    /// Row-major index of the first value that is not finite.
    pub(super) fn new(
        mut tensor: HostTensor,
        is_linear: bool,
        base: BaseDtype,
        device: &Device,
    ) -> Result<Self, usize> {
        let kept = match is_linear {
            true => base.kept(tensor.dtype, device),
            false => Dtype::F32,
        };
        if tensor.dtype != kept {
            tensor = tensor.cast(kept);
        }
        if let Some(index) = tensor.first_non_finite() {
            return Err(index);
        }
        let is_turned = is_linear && kept != Dtype::F32;
        if is_linear && !is_turned {
            tensor = tensor.transposed(); // f32 is laid out as it is computed with
        }
        Ok(Self {
            data: elements(&tensor),
            dtype: burn_dtype(kept),
            is_turned,
        })
    }

    /// On a device, without gradients.
    pub(super) fn on<const D: usize>(self, device: &Device) -> Tensor<D> {
        let tensor = Tensor::from_data(self.data, (device, self.dtype));
        match self.is_turned {
            true => tensor.transpose(),
            false => tensor,
        }
    }
}

/// Burn's name of a type that weights are kept in.
fn burn_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
        _ => DType::F32,
    }
}

/// The elements of a tensor of one of those types.
fn elements(tensor: &HostTensor) -> TensorData {
    fn of<E: Element>(tensor: &HostTensor, element: fn([u8; 2]) -> E) -> TensorData {
        let (pairs, _) = tensor.bytes.as_chunks();
        let values: Vec<E> = pairs.iter().map(|pair| element(*pair)).collect();
        TensorData::new(values, tensor.shape.clone())
    }
    match tensor.dtype {
        Dtype::Bf16 => of(tensor, bf16::from_le_bytes),
        Dtype::F16 => of(tensor, f16::from_le_bytes),
        _ => TensorData::new(tensor.to_f32(), tensor.shape.clone()),
    }
}
