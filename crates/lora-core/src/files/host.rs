//! Tensors in host memory, exactly as a file stores them.
//!
//! Everything read from or written to disk passes through [`HostTensor`]: bytes, dtype and shape, no device and no
//! autodiff. Conversions round to nearest even and keep NaN. The two 8-bit floats are read-only: they follow
//! Micikevicius et al. 2022 (arXiv:2209.05433), where E4M3 has no infinity and one NaN per sign, and E5M2 is IEEE-like.

use std::fmt;
use std::ops::Range;

use half::prelude::*;

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
        let bytes = &self.bytes;
        match self.dtype {
            Dtype::F64 => position(bytes, |b| !f64::from_le_bytes(b).is_finite()),
            Dtype::F32 => position(bytes, |b| !f32::from_le_bytes(b).is_finite()),
            Dtype::F16 => position(bytes, |b| u16::from_le_bytes(b) & 0x7C00 == 0x7C00),
            Dtype::Bf16 => position(bytes, |b| u16::from_le_bytes(b) & 0x7F80 == 0x7F80),
            Dtype::F8E4m3 => position(bytes, |[b]| b & 0x7F == 0x7F),
            Dtype::F8E5m2 => position(bytes, |[b]| b & 0x7C == 0x7C),
            _ => None,
        }
    }
}

pub(super) const E4M3: [f32; 256] = fp8_table(4);
pub(super) const E5M2: [f32; 256] = fp8_table(5);

/// The value of each 8-bit code with `exponent_bits` exponent bits and the usual bias.
const fn fp8_table(exponent_bits: u32) -> [f32; 256] {
    let mantissa_bits = 7 - exponent_bits;
    let bias = (1 << (exponent_bits - 1)) - 1;
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let exponent = (code as u32 >> mantissa_bits) & ((1 << exponent_bits) - 1);
        let mantissa = code as u32 & ((1 << mantissa_bits) - 1);
        let magnitude = if exponent_bits == 4 && code & 0x7F == 0x7F {
            f32::NAN
        } else if exponent_bits == 5 && exponent == 31 {
            if mantissa == 0 {
                f32::INFINITY
            } else {
                f32::NAN
            }
        } else if exponent == 0 {
            // Subnormal: multiples of the step between the smallest normal numbers.
            mantissa as f32 * f32::from_bits((127 + 1 - bias - mantissa_bits) << 23)
        } else {
            f32::from_bits((exponent + 127 - bias) << 23 | mantissa << (23 - mantissa_bits))
        };
        table[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    table
}

fn decode_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F64 => decode(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::F32 => decode(bytes, out, f32::from_le_bytes),
        Dtype::F16 => decode_f16(bytes, out),
        Dtype::Bf16 => decode(bytes, out, |b| {
            f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
        }),
        Dtype::F8E4m3 => decode(bytes, out, |[b]| E4M3[usize::from(b)]),
        Dtype::F8E5m2 => decode(bytes, out, |[b]| E5M2[usize::from(b)]),
        Dtype::I64 => decode(bytes, out, |b| i64::from_le_bytes(b) as f32),
        Dtype::I32 => decode(bytes, out, |b| i32::from_le_bytes(b) as f32),
        Dtype::I16 => decode(bytes, out, |b| i16::from_le_bytes(b).into()),
        Dtype::I8 => decode(bytes, out, |b| i8::from_le_bytes(b).into()),
        Dtype::U64 => decode(bytes, out, |b| u64::from_le_bytes(b) as f32),
        Dtype::U32 => decode(bytes, out, |b| u32::from_le_bytes(b) as f32),
        Dtype::U16 => decode(bytes, out, |b| u16::from_le_bytes(b).into()),
        Dtype::U8 => decode(bytes, out, |[b]| b.into()),
        Dtype::Bool => decode(bytes, out, |[b]| (b != 0).into()),
    }
}

fn decode_f64(dtype: Dtype, bytes: &[u8], out: &mut [f64]) {
    match dtype {
        Dtype::F64 => decode(bytes, out, f64::from_le_bytes),
        Dtype::I64 => decode(bytes, out, |b| i64::from_le_bytes(b) as f64),
        Dtype::I32 => decode(bytes, out, |b| i32::from_le_bytes(b).into()),
        Dtype::U64 => decode(bytes, out, |b| u64::from_le_bytes(b) as f64),
        Dtype::U32 => decode(bytes, out, |b| u32::from_le_bytes(b).into()),
        // Every other type fits an f32 exactly.
        _ => {
            let mut block = [0.0; 256];
            let sources = bytes.chunks(block.len() * dtype.size());
            for (src, dst) in sources.zip(out.chunks_mut(block.len())) {
                let block = &mut block[..dst.len()];
                decode_f32(dtype, src, block);
                for (value, out) in block.iter().zip(dst) {
                    *out = f64::from(*value);
                }
            }
        }
    }
}

fn decode<T, const N: usize>(bytes: &[u8], out: &mut [T], value: impl Fn([u8; N]) -> T) {
    let (elements, rest) = bytes.as_chunks::<N>();
    assert!(
        elements.len() == out.len() && rest.is_empty(),
        "{} bytes do not hold {} elements of {N} bytes",
        bytes.len(),
        out.len()
    );
    for (element, out) in elements.iter().zip(out) {
        *out = value(*element);
    }
}

fn encode<T: Copy, const N: usize>(values: &[T], out: &mut [u8], to_bytes: impl Fn(T) -> [u8; N]) {
    for (value, out) in values.iter().zip(out.as_chunks_mut::<N>().0) {
        *out = to_bytes(*value);
    }
}

/// `half` converts slices with the F16C instructions where the CPU has them, so both directions go through blocks.
const F16_BLOCK: usize = 256;

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut block = [f16::ZERO; F16_BLOCK];
    for (src, dst) in bytes.chunks(2 * F16_BLOCK).zip(out.chunks_mut(F16_BLOCK)) {
        let block = &mut block[..dst.len()];
        decode(src, block, f16::from_le_bytes);
        block.convert_to_f32_slice(dst);
    }
}

fn encode_f16(values: &[f32], out: &mut [u8]) {
    let mut block = [f16::ZERO; F16_BLOCK];
    for (src, dst) in values.chunks(F16_BLOCK).zip(out.chunks_mut(2 * F16_BLOCK)) {
        let block = &mut block[..src.len()];
        block.convert_from_f32_slice(src);
        encode(block, dst, f16::to_le_bytes);
    }
}

/// As `half::bf16::from_f32`, without a branch per element.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    (if value.is_nan() { quiet_nan } else { rounded }) as u16
}

/// Rounds to the neighbour with an odd last bit unless exact, so that rounding again to a narrower type is still
/// rounding once. (`half`'s own conversions from `f64` drop the low 32 bits instead.)
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || !nearest.is_finite() {
        return nearest;
    }
    let away_from_zero = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away_from_zero)) | 1)
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensor(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> HostTensor {
        HostTensor {
            dtype,
            shape: shape.to_vec(),
            bytes: bytes.to_vec(),
        }
    }

    fn f64s(values: &[f64]) -> HostTensor {
        HostTensor::from_values(Dtype::F64, vec![values.len()], values, f64::to_le_bytes)
    }

    /// Elements `0, 1, 2, ..` of any dtype, as raw bits.
    fn counting(dtype: Dtype, shape: &[usize]) -> HostTensor {
        let count = shape.iter().product::<usize>() as u64;
        let bytes = (0..count)
            .flat_map(|i| i.to_le_bytes()[..dtype.size()].to_vec())
            .collect::<Vec<_>>();
        tensor(dtype, shape, &bytes)
    }

    #[test]
    fn dtype_names_are_those_of_the_safetensors_crate() {
        for dtype in Dtype::ALL {
            let json = format!("\"{}\"", dtype.name());
            let theirs: safetensors::Dtype = serde_json::from_str(&json).expect("a known dtype");
            assert_eq!(theirs.bitsize(), 8 * dtype.size());
            assert_eq!(theirs.to_string(), dtype.name());
            assert_eq!(Dtype::parse(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::parse("f32"), None);
        assert_eq!(Dtype::parse("F4"), None);
    }

    #[test]
    fn e4m3_has_the_published_values() {
        // Table 1 of arXiv:2209.05433.
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0xB8, -1.0),
            (0x3F, 1.875),
            (0x7E, 448.0),
            (0xFE, -448.0),
            (0x81, -(2f32.powi(-9))),
        ] {
            assert_eq!(tensor(Dtype::F8E4m3, &[1], &[code]).to_f32(), [value]);
        }
        let all = tensor(Dtype::F8E4m3, &[256], &Vec::from_iter(0..=255)).to_f32();
        let nan = (0..256).filter(|&i| all[i].is_nan()).collect::<Vec<_>>();
        assert_eq!(nan, [0x7F, 0xFF]);
        assert!(all.iter().all(|value| !value.is_infinite()));
        assert!(all[..0x7F].is_sorted());
        assert!(all[0x80].is_sign_negative());
    }

    #[test]
    fn e5m2_is_the_upper_half_of_f16() {
        let all = tensor(Dtype::F8E5m2, &[256], &Vec::from_iter(0..=255)).to_f32();
        for (code, value) in (0u16..).zip(all) {
            let reference = f16::from_bits(code << 8).to_f32();
            assert!(value.to_bits() == reference.to_bits() || value.is_nan() && reference.is_nan());
        }
    }

    #[test]
    fn every_dtype_converts() {
        let one = |dtype| match dtype {
            Dtype::F64 => 1f64.to_le_bytes().to_vec(),
            Dtype::F32 => 1f32.to_le_bytes().to_vec(),
            Dtype::F16 => f16::ONE.to_le_bytes().to_vec(),
            Dtype::Bf16 => bf16::ONE.to_le_bytes().to_vec(),
            Dtype::F8E4m3 => vec![0x38],
            Dtype::F8E5m2 => vec![0x3C],
            _ => 1u64.to_le_bytes()[..dtype.size()].to_vec(),
        };
        for dtype in Dtype::ALL {
            // Longer than any block, and not a multiple of one.
            let ones = tensor(dtype, &[3001], &one(dtype).repeat(3001));
            assert_eq!(ones.to_f32(), vec![1.0; 3001], "{dtype}");
            assert_eq!(ones.to_f64(), vec![1.0; 3001], "{dtype}");
            let integers = (!dtype.is_float()).then(|| vec![1; 3001]);
            assert_eq!(ones.to_i64(), integers, "{dtype}");
            assert_eq!(ones.first_non_finite(), None);
            for target in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let cast = ones.cast(target);
                assert_eq!(cast, tensor(target, &[3001], &one(target).repeat(3001)));
            }
        }
    }

    #[test]
    fn integers_keep_their_sign_and_range() {
        assert_eq!(
            HostTensor::from_i64([2], &[i64::MIN, -1]).to_i64(),
            Some(vec![i64::MIN, -1])
        );
        assert_eq!(tensor(Dtype::I8, &[1], &[0xFF]).to_i64(), Some(vec![-1]));
        assert_eq!(tensor(Dtype::U8, &[1], &[0xFF]).to_i64(), Some(vec![255]));
        assert_eq!(tensor(Dtype::Bool, &[1], &[7]).to_i64(), Some(vec![1]));
        assert_eq!(tensor(Dtype::U64, &[1], &[0xFF; 8]).to_i64(), None);
        assert_eq!(
            tensor(Dtype::U64, &[1], &[0xFF; 8]).to_f32(),
            [2f32.powi(64)]
        );
    }

    #[test]
    fn scalars_and_empty_tensors_convert() {
        let scalar = HostTensor::from_f32([], &[2.5]);
        assert_eq!((scalar.numel(), scalar.to_f32()), (1, vec![2.5]));
        assert_eq!(scalar.cast(Dtype::Bf16).to_f32(), [2.5]);
        let empty = HostTensor::from_f32([0, 3], &[]);
        assert_eq!(empty.cast(Dtype::F16).to_f64(), [0.0; 0]);
        assert_eq!(empty.transposed().shape, [3, 0]);
        assert_eq!(empty.rows(0..0), empty);
    }

    #[test]
    fn a_cast_from_f64_rounds_once() {
        let tie = 1.0 + 2f64.powi(-8); // half way between two bf16
        let values = [
            tie,
            tie + 2f64.powi(-40),
            tie - 2f64.powi(-40),
            -tie - 2f64.powi(-40),
        ];
        let above = 1.0 + 2f32.powi(-7);
        assert_eq!(
            f64s(&values).cast(Dtype::Bf16).to_f32(),
            [1.0, above, 1.0, -above]
        );
        let tie = 1.0 + 2f64.powi(-11);
        assert_eq!(
            f64s(&[tie, tie + 2f64.powi(-40)]).cast(Dtype::F16).to_f32(),
            [1.0, 1.0 + 2f32.powi(-10)]
        );
        let values = [1e300, -1e300, 1e-300, -1e-300, f64::NAN, f64::INFINITY];
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let cast = f64s(&values).cast(dtype).to_f32();
            assert_eq!(cast[..4], [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0]);
            assert!(cast[4].is_nan() && cast[5] == f32::INFINITY);
        }
    }

    #[test]
    #[should_panic(expected = "cannot cast F32 to I8")]
    fn a_cast_to_integers_is_refused() {
        HostTensor::from_f32([0], &[]).cast(Dtype::I8);
    }

    #[test]
    #[should_panic(expected = "shape [2, 2] and values differ")]
    fn values_must_fill_the_shape() {
        HostTensor::from_f32([2, 2], &[0.0; 3]);
    }

    #[test]
    fn transposing_moves_every_element() {
        for dtype in [Dtype::U8, Dtype::Bf16, Dtype::F32, Dtype::I64] {
            for (rows, columns) in [(1, 1), (2, 3), (64, 64), (65, 130), (1, 200)] {
                let before = counting(dtype, &[rows, columns]);
                let after = before.transposed();
                assert_eq!(after.shape, [columns, rows]);
                let size = dtype.size();
                for i in 0..rows * columns {
                    let j = i % columns * rows + i / columns;
                    assert_eq!(
                        after.bytes[j * size..][..size],
                        before.bytes[i * size..][..size]
                    );
                }
                assert_eq!(after.transposed(), before);
            }
        }
    }

    #[test]
    #[should_panic(expected = "needs two axes, found [2, 2, 2]")]
    fn transposing_needs_two_axes() {
        counting(Dtype::U8, &[2, 2, 2]).transposed();
    }

    #[test]
    fn rows_slice_the_outermost_axis() {
        let rows = counting(Dtype::I64, &[4, 2, 3]).rows(1..3);
        assert_eq!(rows.shape, [2, 2, 3]);
        assert_eq!(rows.to_i64(), Some(Vec::from_iter(6..18)));
    }

    #[test]
    fn the_first_non_finite_element_is_found() {
        for (dtype, codes) in [
            (
                Dtype::F64,
                vec![f64::NAN.to_bits(), f64::NEG_INFINITY.to_bits()],
            ),
            (Dtype::F32, vec![0x7F80_0001, 0xFF80_0000]),
            (Dtype::F16, vec![0x7C00, 0xFE00]),
            (Dtype::Bf16, vec![0x7F80, 0xFFC0]),
            (Dtype::F8E4m3, vec![0x7F, 0xFF]),
            (Dtype::F8E5m2, vec![0x7C, 0xFF]),
        ] {
            for code in codes {
                let size = dtype.size();
                let mut values = tensor(dtype, &[3000], &vec![0; 3000 * size]);
                for i in [2999, 1500] {
                    values.bytes[i * size..][..size].copy_from_slice(&code.to_le_bytes()[..size]);
                    assert_eq!(values.first_non_finite(), Some(i), "{dtype} {code:#x}");
                }
            }
        }
        assert_eq!(tensor(Dtype::U8, &[1], &[0xFF]).first_non_finite(), None);
    }

    proptest! {
        #[test]
        fn narrow_floats_agree_with_half(bits: Vec<u32>) {
            let values = Vec::from_iter(bits.iter().map(|&bits| f32::from_bits(bits)));
            let single = HostTensor::from_f32([values.len()], &values);
            let to_bf16 = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes());
            prop_assert_eq!(single.cast(Dtype::Bf16).bytes, Vec::from_iter(to_bf16));
            let to_f16 = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes());
            prop_assert_eq!(single.cast(Dtype::F16).bytes, Vec::from_iter(to_f16));
        }

        #[test]
        fn narrowing_an_f64_that_is_an_f32_rounds_like_the_f32(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(!value.is_nan());
            let single = HostTensor::from_f32([1], &[value]);
            for dtype in [Dtype::F16, Dtype::Bf16] {
                prop_assert_eq!(f64s(&[value.into()]).cast(dtype), single.cast(dtype));
            }
        }

        #[test]
        fn widening_loses_nothing(bytes: Vec<[u8; 2]>) {
            for dtype in [Dtype::F16, Dtype::Bf16] {
                let narrow = tensor(dtype, &[bytes.len()], bytes.as_flattened());
                prop_assume!(narrow.first_non_finite().is_none());
                prop_assert_eq!(&narrow.cast(Dtype::F32).cast(dtype), &narrow);
                prop_assert_eq!(&narrow.cast(Dtype::F64).cast(dtype), &narrow);
            }
        }
    }
}
