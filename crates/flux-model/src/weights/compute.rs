//! What the blocks of a network compute in.

use std::fmt;

use burn::tensor::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

/// What blocks compute in: their activations and the products with base weights.
///
/// In bf16, norms, softmax and activation functions still compute in f32, and so do the conditioning, what is before the
/// first block and behind the last one, and the loss; the factors of adapters are f32, and rounded for their products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compute {
    /// f32.
    #[default]
    F32,
    /// bf16, with sums in f32 where the device's matrix units have them so.
    Bf16,
}

impl Compute {
    /// Why blocks cannot compute so on `device`, if so.
    pub fn problem(self, device: &Device) -> Option<String> {
        let lacks = !device.supports_dtype(self.dtype());
        lacks.then(|| "this device has no bf16: use \"f32\"".into())
    }

    /// Tokens on their way into the first block.
    pub(crate) fn lower(self, tokens: Vec<Tensor<3>>) -> Vec<Tensor<3>> {
        let lower = |tokens: Tensor<3>| tokens.cast(self.dtype()); // free in f32
        tokens.into_iter().map(lower).collect()
    }

    /// Of tensors that are computed in it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}
