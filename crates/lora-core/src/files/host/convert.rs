//! Elements from bytes and to bytes.

use half::prelude::*;

use super::dtype::Dtype;

pub(in crate::files) const E4M3: [f32; 256] = fp8_table(4);
pub(in crate::files) const E5M2: [f32; 256] = fp8_table(5);

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

pub(super) fn decode_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
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

pub(super) fn decode_f64(dtype: Dtype, bytes: &[u8], out: &mut [f64]) {
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

pub(super) fn decode<T, const N: usize>(bytes: &[u8], out: &mut [T], value: impl Fn([u8; N]) -> T) {
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

pub(super) fn encode<T: Copy, const N: usize>(
    values: &[T],
    out: &mut [u8],
    to_bytes: impl Fn(T) -> [u8; N],
) {
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

pub(super) fn encode_f16(values: &[f32], out: &mut [u8]) {
    let mut block = [f16::ZERO; F16_BLOCK];
    for (src, dst) in values.chunks(F16_BLOCK).zip(out.chunks_mut(2 * F16_BLOCK)) {
        let block = &mut block[..src.len()];
        block.convert_from_f32_slice(src);
        encode(block, dst, f16::to_le_bytes);
    }
}

/// As `half::bf16::from_f32`, without a branch per element.
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    (if value.is_nan() { quiet_nan } else { rounded }) as u16
}

/// Rounds to the neighbour with an odd last bit unless exact, so that rounding again to a narrower type is still
/// rounding once. (`half`'s own conversions from `f64` drop the low 32 bits instead.)
pub(super) fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || !nearest.is_finite() {
        return nearest;
    }
    let away_from_zero = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away_from_zero)) | 1)
}
