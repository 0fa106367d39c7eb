//! What a stored tensor becomes in memory: the one place that decides it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use burn::tensor::{
    AllocationProperty, Bytes, DType, Device, Element, Tensor, TensorData, bf16, f16,
};
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::quantised::{Codec, Quantised};
use lora_core::frozen::placeholder;
use serde::{Deserialize, Serialize};

/// How the weights of a network's linear layers are kept. Everything else, norms and biases above all, is f32.
///
/// Layers compute in f32 whatever their weights are ([`lora_core::linear`]), and to f32 is exact from bf16, f16 and few bits:
/// weights as they are stored give the values that f32 weights give, up to the order of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BaseDtype {
    /// bf16 and f16 as they are, where the device has the type, and few bits as they are; what is stored otherwise as f32.
    #[default]
    AsStored,
    /// f32.
    F32,
    /// bf16, rounded to nearest even where more bits are stored.
    Bf16,
    /// Integers of 8 bits with a factor for every 64; what is stored in as few bits as it is.
    Q8,
    /// bitsandbytes' NF4 with double quantisation; what is stored in 4 bits as it is.
    Nf4,
}

impl fmt::Display for BaseDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AsStored => "as-stored",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Nf4 => "nf4",
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
    pub(super) fn kept(self, stored: Storage, device: &Device) -> Kept {
        let dense = |dtype| match device.supports_dtype(burn_dtype(dtype)) {
            true => Kept::Dense(dtype),
            false => Kept::Dense(Dtype::F32),
        };
        match (self, stored) {
            (Self::F32, _) => Kept::Dense(Dtype::F32),
            (Self::Bf16, _) => dense(Dtype::Bf16),
            (Self::AsStored | Self::Q8, Storage::FewBits(bits))
            | (Self::Nf4, Storage::FewBits(bits @ 4)) => Kept::FewBits(bits),
            (Self::Q8, _) => Kept::Int8,
            (Self::Nf4, _) => Kept::Nf4,
            (Self::AsStored, Storage::Dense(stored @ (Dtype::Bf16 | Dtype::F16))) => dense(stored),
            (Self::AsStored, Storage::Dense(_)) => Kept::Dense(Dtype::F32),
        }
    }
}

/// What a checkpoint stores a weight as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Storage {
    Dense(Dtype),
    /// So many an element.
    FewBits(u32),
}

/// What a weight is kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    Dense(Dtype),
    /// As it is stored, in so many an element.
    FewBits(u32),
    Int8,
    Nf4,
}

impl Kept {
    /// What brings a weight into it, where it is not stored so.
    pub(super) fn codec(self) -> Option<Codec> {
        match self {
            Self::Int8 => Some(Codec::Int8),
            Self::Nf4 => Some(Codec::Nf4),
            Self::Dense(_) | Self::FewBits(_) => None,
        }
    }

    /// What so many elements take, about: factors of blocks count as those of 64.
    pub(super) fn bytes(self, numel: usize) -> u64 {
        let bytes = match self {
            Self::Dense(dtype) => numel * dtype.size(),
            Self::FewBits(8) => numel,
            Self::Int8 => numel + numel / 16,
            Self::FewBits(_) | Self::Nf4 => numel / 2 + numel / 60,
        };
        bytes as u64
    }
}

/// A tensor as it is in a checkpoint.
pub(super) enum Read {
    Dense(HostTensor),
    FewBits(Quantised),
}

impl Read {
    fn storage(&self) -> Storage {
        match self {
            Self::Dense(tensor) => Storage::Dense(tensor.dtype),
            Self::FewBits(tensor) => Storage::FewBits(tensor.bits()),
        }
    }

    /// What is in few bits as f32.
    pub(super) fn dense(self) -> HostTensor {
        match self {
            Self::Dense(tensor) => tensor,
            Self::FewBits(tensor) => HostTensor::from_f32(tensor.shape(), &tensor.to_f32()),
        }
    }
}

/// Weights in few bits on their way into a network, by the paths of the parameters.
pub(super) type Held = BTreeMap<String, Arc<Quantised>>;

/// A parameter's values on the host, ready for a device.
pub(super) enum Ready {
    Dense {
        data: TensorData,
        dtype: DType,
        /// `[out, in]`, to be seen as `[in, out]`.
        is_turned: bool,
    },
    /// `[out, in]`.
    FewBits(Arc<Quantised>),
}

impl Ready {
    /// Decides what a tensor becomes on `device`, and converts it; `is_linear` says that it is the weight of a linear layer,
    /// `[out, in]`.
    ///
    /// # Errors
    /// Row-major index of the first value that is not finite.
    pub(super) fn new(
        read: Read,
        is_linear: bool,
        base: BaseDtype,
        device: &Device,
    ) -> Result<Self, usize> {
        let kept = match is_linear {
            true => base.kept(read.storage(), device),
            false => Kept::Dense(Dtype::F32),
        };
        if let (Kept::FewBits(_), Read::FewBits(tensor)) = (kept, &read)
            && let Some(index) = tensor.first_non_finite()
        {
            return Err(index);
        }
        let tensor = match (kept, read) {
            (Kept::FewBits(_), Read::FewBits(tensor)) => return Ok(Self::FewBits(tensor.into())),
            (_, read) => read.dense(),
        };
        if let Some(index) = tensor.first_non_finite() {
            return Err(index);
        }
        let Some(codec) = kept.codec() else {
            return Self::dense(tensor, is_linear, kept);
        };
        let tensor = codec.encode(tensor.shape.clone(), &tensor.to_f32());
        Ok(Self::FewBits(tensor.into()))
    }

    /// The weight of a linear layer, `shape` `[out, in]`, that is computed with as its bytes are.
    pub(super) fn as_stored(bytes: bytes::Bytes, shape: &[usize], dtype: Dtype) -> Self {
        let dtype = burn_dtype(dtype);
        let bytes = Bytes::from_shared(bytes, AllocationProperty::Other);
        Self::Dense {
            data: TensorData::from_bytes(bytes, shape.to_vec(), dtype),
            dtype,
            is_turned: true,
        }
    }

    fn dense(mut tensor: HostTensor, is_linear: bool, kept: Kept) -> Result<Self, usize> {
        let kept = match kept {
            Kept::Dense(dtype) => dtype,
            Kept::FewBits(_) | Kept::Int8 | Kept::Nf4 => Dtype::F32,
        };
        if tensor.dtype != kept {
            tensor = tensor.cast(kept);
            if let Some(index) = tensor.first_non_finite() {
                return Err(index);
            }
        }
        let is_turned = is_linear && kept != Dtype::F32;
        if is_linear && !is_turned {
            tensor = tensor.transposed(); // f32 is laid out as it is computed with
        }
        Ok(Self::Dense {
            data: elements(&tensor),
            dtype: burn_dtype(kept),
            is_turned,
        })
    }

    /// On a device, without gradients, for the parameter at `path`; a weight in few bits goes to `held`.
    pub(super) fn on<const D: usize>(
        self,
        path: String,
        held: &mut Held,
        device: &Device,
    ) -> Tensor<D> {
        match self {
            Self::Dense {
                data,
                dtype,
                is_turned,
            } => {
                let tensor = Tensor::from_data(data, (device, dtype));
                match is_turned {
                    true => tensor.transpose(),
                    false => tensor,
                }
            }
            Self::FewBits(tensor) => {
                let shape = std::array::from_fn(|axis| tensor.shape()[D - 1 - axis]);
                held.insert(path, tensor);
                placeholder(shape, device)
            }
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
