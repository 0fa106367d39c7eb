//! Tensors in host memory, exactly as a file stores them.
//!
//! Everything read from or written to disk passes through [`HostTensor`]: bytes, dtype and shape, no device and no
//! autodiff. Conversions round to nearest even and keep NaN. The two 8-bit floats are read-only: they follow
//! Micikevicius et al. 2022 (arXiv:2209.05433), where E4M3 has no infinity and one NaN per sign, and E5M2 is IEEE-like.

mod convert;
mod dtype;

use std::ops::Range;

use convert::{bf16_bits, decode, decode_f32, decode_f64, encode, encode_f16, round_to_odd};

pub(in crate::files) use convert::{E4M3, E5M2};
pub use dtype::Dtype;

/// One tensor on the host, as a file stores it: little-endian, row-major.
///
/// The number of bytes is the number of elements times [`Dtype::size`].
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Length of each axis, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Vec<u8>,
}

impl HostTensor {
    /// An [`F32`](Dtype::F32) tensor.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn from_f32(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        Self::from_values(Dtype::F32, shape.into(), values, f32::to_le_bytes)
    }

    /// An [`I64`](Dtype::I64) tensor.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn from_i64(shape: impl Into<Vec<usize>>, values: &[i64]) -> Self {
        Self::from_values(Dtype::I64, shape.into(), values, i64::to_le_bytes)
    }

    fn from_values<T: Copy, const N: usize>(
        dtype: Dtype,
        shape: Vec<usize>,
        values: &[T],
        to_bytes: impl Fn(T) -> [u8; N],
    ) -> Self {
        let numel: usize = shape.iter().product();
        assert_eq!(numel, values.len(), "shape {shape:?} and values differ");
        let mut bytes = vec![0; numel * N];
        encode(values, &mut bytes, to_bytes);
        Self {
            dtype,
            shape,
            bytes,
        }
    }

    /// Number of elements: the product of the shape, 1 for a scalar.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Every element as `f32`; exact for the floats up to 32 bits, rounded to nearest even otherwise.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.numel()];
        decode_f32(self.dtype, &self.bytes, &mut values);
        values
    }

    /// Every element as `f64`; exact except for 64-bit integers beyond 2^53.
    pub fn to_f64(&self) -> Vec<f64> {
        let mut values = vec![0.0; self.numel()];
        decode_f64(self.dtype, &self.bytes, &mut values);
        values
    }

    /// Every element of an integer or boolean tensor; `None` for floats and where a value exceeds `i64`.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        let mut values = vec![0; self.numel()];
        let (bytes, out) = (&self.bytes, &mut values);
        match self.dtype {
            Dtype::I64 => decode(bytes, out, i64::from_le_bytes),
            Dtype::I32 => decode(bytes, out, |b| i32::from_le_bytes(b).into()),
            Dtype::I16 => decode(bytes, out, |b| i16::from_le_bytes(b).into()),
            Dtype::I8 => decode(bytes, out, |b| i8::from_le_bytes(b).into()),
            // Wraps to a negative number exactly when the value is too large.
            Dtype::U64 => decode(bytes, out, |b| u64::from_le_bytes(b).cast_signed()),
            Dtype::U32 => decode(bytes, out, |b| u32::from_le_bytes(b).into()),
            Dtype::U16 => decode(bytes, out, |b| u16::from_le_bytes(b).into()),
            Dtype::U8 => decode(bytes, out, |[b]| b.into()),
            Dtype::Bool => decode(bytes, out, |[b]| (b != 0).into()),
            _ => return None,
        }
        let fits = self.dtype != Dtype::U64 || values.iter().all(|&value| value >= 0);
        fits.then_some(values)
    }

    /// The same values as another float dtype, each rounded once to nearest even; the same dtype is a copy.
    ///
    /// Values out of range become infinite. Integers beyond 2^53 pass through `f64` first.
    ///
    /// # Panics
    /// If `dtype` is another integer, boolean or 8-bit float type.
    pub fn cast(&self, dtype: Dtype) -> Self {
        const BLOCK: usize = 1024;
        if dtype == self.dtype {
            return self.clone();
        }
        assert!(
            matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::Bf16),
            "cannot cast {} to {dtype}",
            self.dtype
        );
        let mut bytes = vec![0; self.numel() * dtype.size()];
        let (mut single, mut double) = ([0f32; BLOCK], [0f64; BLOCK]);
        let sources = self.bytes.chunks(BLOCK * self.dtype.size());
        for (src, dst) in sources.zip(bytes.chunks_mut(BLOCK * dtype.size())) {
            let single = &mut single[..src.len() / self.dtype.size()];
            let double = &mut double[..single.len()];
            match dtype {
                Dtype::F64 => {
                    decode_f64(self.dtype, src, double);
                    encode(double, dst, f64::to_le_bytes);
                }
                Dtype::F32 => {
                    decode_f32(self.dtype, src, single);
                    encode(single, dst, f32::to_le_bytes);
                }
                _ => {
                    if self.dtype.size() >= 4 && self.dtype != Dtype::F32 {
                        decode_f64(self.dtype, src, double);
                        for (single, double) in single.iter_mut().zip(double) {
                            *single = round_to_odd(*double);
                        }
                    } else {
                        decode_f32(self.dtype, src, single);
                    }
                    if dtype == Dtype::F16 {
                        encode_f16(single, dst);
                    } else {
                        encode(single, dst, |value| bf16_bits(value).to_le_bytes());
                    }
                }
            }
        }
        Self {
            dtype,
            shape: self.shape.clone(),
            bytes,
        }
    }

    /// The two axes exchanged.
    ///
    /// # Shapes
    /// `[rows, columns]` to `[columns, rows]`
    /// # Panics
    /// If the tensor is not 2-D.
    pub fn transposed(&self) -> Self {
        let &[rows, columns] = self.shape.as_slice() else {
            panic!("transposed() needs two axes, found {:?}", self.shape);
        };
        Self {
            dtype: self.dtype,
            shape: vec![columns, rows],
            bytes: match self.dtype.size() {
                1 => transpose::<1>(&self.bytes, rows, columns),
                2 => transpose::<2>(&self.bytes, rows, columns),
                4 => transpose::<4>(&self.bytes, rows, columns),
                _ => transpose::<8>(&self.bytes, rows, columns),
            },
        }
    }

    /// A slice of the outermost axis.
    ///
    /// # Panics
    /// If the tensor is a scalar or `rows` exceeds the axis.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let stride = self.shape[1..].iter().product::<usize>() * self.dtype.size();
        Self {
            dtype: self.dtype,
            shape,
            bytes: self.bytes[rows.start * stride..rows.end * stride].to_vec(),
        }
    }

    /// Flat index of the first NaN or infinity.
    pub fn first_non_finite(&self) -> Option<usize> {
        first_non_finite(self.dtype, &self.bytes)
    }
}

/// Index of the first NaN or infinity of elements as a file stores them.
pub fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    match dtype {
        Dtype::F64 => position(bytes, |b| !f64::from_le_bytes(b).is_finite()),
        Dtype::F32 => position(bytes, |b| !f32::from_le_bytes(b).is_finite()),
        Dtype::F16 => position(bytes, |b| u16::from_le_bytes(b) & 0x7C00 == 0x7C00),
        Dtype::Bf16 => position(bytes, |b| u16::from_le_bytes(b) & 0x7F80 == 0x7F80),
        Dtype::F8E4m3 => position(bytes, |[b]| b & 0x7F == 0x7F),
        Dtype::F8E5m2 => position(bytes, |[b]| b & 0x7C == 0x7C),
        _ => None,
    }
}

/// Goes through square tiles, so that both the reads and the writes are runs of neighbouring elements.
fn transpose<const N: usize>(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    const TILE: usize = 64;
    let mut out = vec![0; rows * columns * N];
    let src = bytes.as_chunks::<N>().0;
    let dst = out.as_chunks_mut::<N>().0;
    let mut tile = [[[0; N]; TILE]; TILE];
    for row in (0..rows).step_by(TILE) {
        let height = TILE.min(rows - row);
        for column in (0..columns).step_by(TILE) {
            let width = TILE.min(columns - column);
            for (i, line) in tile[..height].iter_mut().enumerate() {
                let start = (row + i) * columns + column;
                line[..width].copy_from_slice(&src[start..start + width]);
            }
            for j in 0..width {
                let start = (column + j) * rows + row;
                for (out, line) in dst[start..start + height].iter_mut().zip(&tile) {
                    *out = line[j];
                }
            }
        }
    }
    out
}

/// Tests whole blocks first: without an early exit the loop is vectorised.
fn position<const N: usize>(bytes: &[u8], found: impl Fn([u8; N]) -> bool) -> Option<usize> {
    const BLOCK: usize = 1024;
    for (i, block) in bytes.as_chunks::<N>().0.chunks(BLOCK).enumerate() {
        if block
            .iter()
            .fold(false, |any, &element| any | found(element))
        {
            let offset = block.iter().position(|&element| found(element))?;
            return Some(i * BLOCK + offset);
        }
    }
    None
}

#[cfg(test)]
mod tests;
