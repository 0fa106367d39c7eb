//! Element types.

use std::fmt;

/// Element types a safetensors file may hold and this project reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE double precision.
    F64,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an [`F32`](Self::F32).
    Bf16,
    /// 4 exponent and 3 mantissa bits, bias 7, largest value 448.
    F8E4m3,
    /// 5 exponent and 2 mantissa bits: the upper half of an [`F16`](Self::F16).
    F8E5m2,
    /// Signed, 8 bytes.
    I64,
    /// Signed, 4 bytes.
    I32,
    /// Signed, 2 bytes.
    I16,
    /// Signed, 1 byte.
    I8,
    /// Unsigned, 8 bytes.
    U64,
    /// Unsigned, 4 bytes.
    U32,
    /// Unsigned, 2 bytes.
    U16,
    /// Unsigned, 1 byte.
    U8,
    /// One byte, true unless zero.
    Bool,
}

impl Dtype {
    pub(crate) const ALL: [Self; 15] = {
        use Dtype::*;
        [
            F64, F32, F16, Bf16, F8E4m3, F8E5m2, I64, I32, I16, I8, U64, U32, U16, U8, Bool,
        ]
    };

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::F8E4m3 | Self::F8E5m2 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The safetensors spelling, such as `F8_E4M3`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F8E4m3 => "F8_E4M3",
            Self::F8E5m2 => "F8_E5M2",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
        }
    }

    /// The dtype of this safetensors spelling.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Whether elements are floating point, so that they can be NaN or infinite.
    pub fn is_float(self) -> bool {
        matches!(
            self,
            Self::F64 | Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4m3 | Self::F8E5m2
        )
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
