//! Into few bits: NF4 as bitsandbytes makes it, integers of 8 bits, fp8 with a scale.

use super::{Factors, Quantised, Rounding, Values};
use crate::files::host::E4M3;
use crate::ops::codes::OnDevice;

/// Elements of a block: bitsandbytes' default.
pub(super) const BLOCK: usize = 64;
/// Factors that share a factor where they are quantised themselves.
pub(super) const NESTED_BLOCK: usize = 256;

/// The values of NF4: quantiles of the normal distribution, in `[-1, 1]`.
///
/// # Source
/// bitsandbytes 0.50 `functional.get_4bit_type`.
#[expect(clippy::excessive_precision, reason = "the numbers of the source")]
pub(super) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_53,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.0,
];

impl Quantised {
    /// NF4 with double quantisation, in blocks of 64: 4.13 bits an element.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn nf4(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        let shape = shape.into();
        check_shape(&shape, values);
        let middles: [f32; 15] = std::array::from_fn(|i| (NF4[i] + NF4[i + 1]) / 2.0);
        let code = |value: f32| middles.iter().filter(|&&middle| middle < value).count() as u8;
        let largest: Vec<f32> = values.chunks(BLOCK).map(largest).collect();
        let mut codes = Vec::with_capacity(values.len().div_ceil(2));
        for (block, largest) in values.chunks(BLOCK).zip(&largest) {
            let factor = 1.0 / largest.max(1e-38);
            let code = |value: f32| code((value * factor).clamp(-1.0, 1.0));
            codes.extend(block.chunks(2).map(|pair| {
                let second = pair.get(1).copied().unwrap_or(0.0);
                code(pair[0]) << 4 | code(second)
            }));
        }
        Self {
            shape,
            codes,
            values: Values::Nibbles(NF4),
            block: BLOCK,
            skipped: 0,
            factors: quantised(&largest),
            rounding: Rounding::F32,
            on_device: OnDevice::default(),
        }
    }

    /// Integers from -127 to 127, in blocks of 64: 8.5 bits an element.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn int8(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        let shape = shape.into();
        check_shape(&shape, values);
        let largest: Vec<f32> = values.chunks(BLOCK).map(largest).collect();
        let mut codes = Vec::with_capacity(values.len());
        for (block, largest) in values.chunks(BLOCK).zip(&largest) {
            let factor = 127.0 / largest.max(1e-30);
            let code = |value: &f32| (value * factor).round_ties_even().clamp(-127.0, 127.0);
            codes.extend(
                block
                    .iter()
                    .map(|value| (code(value) as i8).cast_unsigned()),
            );
        }
        Self {
            shape,
            codes,
            values: Values::Int8,
            block: BLOCK,
            skipped: 0,
            factors: Factors::Plain(largest.iter().map(|largest| largest / 127.0).collect()),
            rounding: Rounding::F32,
            on_device: OnDevice::default(),
        }
    }

    /// fp8 E4M3 with one factor, such that the largest element is the largest number of the type.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn fp8(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        const LARGEST: usize = 0x7e; // codes from 0 to here grow with their values
        let shape = shape.into();
        check_shape(&shape, values);
        let scale = largest(values).max(1e-30) / E4M3[LARGEST];
        let code = |value: &f32| {
            let size = (value / scale).abs();
            let above = E4M3[..LARGEST].partition_point(|&entry| entry < size);
            let below = above.saturating_sub(1);
            let [under, over] = [size - E4M3[below], E4M3[above] - size];
            let is_even = below & 1 == 0;
            let code = match under < over || (under == over && is_even) {
                true => below,
                false => above,
            };
            code as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
        };
        let factors = match values.is_empty() {
            true => Vec::new(),
            false => vec![scale],
        };
        Self {
            codes: values.iter().map(code).collect(),
            values: Values::Bytes(Box::new(E4M3)),
            block: values.len().max(1),
            skipped: 0,
            factors: Factors::Plain(factors),
            rounding: Rounding::F32,
            on_device: OnDevice::default(),
            shape,
        }
    }
}

fn check_shape(shape: &[usize], values: &[f32]) {
    let numel: usize = shape.iter().product();
    assert_eq!(numel, values.len(), "shape {shape:?} and values differ");
}

fn largest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |top, value| top.max(value.abs()))
}

/// Factors less their mean, in 8 bits.
fn quantised(factors: &[f32]) -> Factors {
    let sum: f64 = factors.iter().map(|&factor| f64::from(factor)).sum();
    let offset = (sum / factors.len().max(1) as f64) as f32;
    let rest: Vec<f32> = factors.iter().map(|factor| factor - offset).collect();
    let table = dynamic_map();
    let largest: Vec<f32> = rest.chunks(NESTED_BLOCK).map(largest).collect();
    let mut codes = Vec::with_capacity(rest.len());
    for (block, largest) in rest.chunks(NESTED_BLOCK).zip(&largest) {
        let factor = 1.0 / largest.max(1e-38);
        codes.extend(block.iter().map(|value| nearest(&table, value * factor)));
    }
    let codes = Quantised {
        shape: vec![rest.len()],
        codes,
        values: Values::Bytes(Box::new(table)),
        block: NESTED_BLOCK,
        skipped: 0,
        factors: Factors::Plain(largest),
        rounding: Rounding::F32,
        on_device: OnDevice::default(),
    };
    Factors::Quantised(Box::new(codes), offset)
}

/// Index of the entry that is nearest to `value`.
fn nearest(table: &[f32; 256], value: f32) -> u8 {
    let above = table.partition_point(|&entry| entry < value).min(255);
    let below = above.saturating_sub(1);
    let distance = |at: usize| (table[at] - value).abs();
    let at = if distance(below) <= distance(above) {
        below
    } else {
        above
    };
    at as u8
}

/// 256 values in `[-1, 1]`, closer to each other near zero: a sign, an exponent of ten in unary, the rest a linear fraction.
///
/// # Source
/// Dettmers 2015, arXiv:1511.04561; bitsandbytes 0.50 `functional.create_dynamic_map`.
pub(super) fn dynamic_map() -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for i in 0..7 {
        let steps = 1 << i;
        let power = 10f64.powi(i - 6);
        let boundary = |k: i32| (0.1 + 0.9 * f64::from(k) / f64::from(steps)) as f32;
        for k in 0..steps {
            let middle = (boundary(k) + boundary(k + 1)) / 2.0;
            let value = (power * f64::from(middle)) as f32;
            values.extend([value, -value]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values.get(i).copied().unwrap_or(0.0))
}
