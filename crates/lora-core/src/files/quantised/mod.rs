//! Tensors in few bits: a code for each element, a factor for each block of them.
//!
//! Every storage of frozen weights is of this kind, and is decoded by one rule, `value of the code * factor of the block`:
//!
//! | storage | code | block |
//! |---|---|---|
//! | bitsandbytes' NF4 and FP4 | 4 bits into a table, the first element in the high half of a byte | 64 elements |
//! | bitsandbytes' 8 bits | an integer | a row |
//! | fp8 | E4M3 or E5M2 | the tensor, or a row |
//! | own `q8` | an integer | 64 elements |
//!
//! Blocks are cut from the elements in row-major order, across rows. Factors may be quantised themselves (bitsandbytes' double
//! quantisation): their codes are then a tensor of this kind, and an offset is added. bitsandbytes decodes 4 bits to the dtype
//! that the weight had, so the product is rounded to it.
//!
//! Source: Dettmers et al. 2023, arXiv:2305.14314; bitsandbytes 0.50 `functional.py`.

mod encode;
mod pack;
mod stored;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device};

pub use pack::Codec;
pub use stored::Stored;

use crate::ops::codes::{Codes, OnDevice, Parts};

/// What codes stand for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Values {
    /// Two to a byte, high half first, each an index.
    Nibbles([f32; 16]),
    /// A byte each, an index.
    Bytes(Box<[f32; 256]>),
    /// A byte each, a signed integer.
    Int8,
}

/// The factor of each block.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Factors {
    Plain(Vec<f32>),
    /// Double quantisation: these values and an offset.
    Quantised(Box<Quantised>, f32),
}

impl Factors {
    fn len(&self) -> usize {
        match self {
            Self::Plain(factors) => factors.len(),
            Self::Quantised(codes, _) => codes.numel(),
        }
    }

    #[inline(always)]
    fn at(&self, block: usize) -> f32 {
        match self {
            Self::Plain(factors) => factors[block],
            Self::Quantised(codes, offset) => {
                let at = codes.skipped + block;
                let factor = match &codes.factors {
                    Factors::Plain(factors) => factors[at / codes.block],
                    Factors::Quantised(..) => f32::NAN, // refused by `Quantised::new`
                };
                codes.values.one(&codes.codes, at) * factor + offset
            }
        }
    }

    fn range(&self, blocks: Range<usize>) -> Self {
        match self {
            Self::Plain(factors) => Self::Plain(factors[blocks].to_vec()),
            Self::Quantised(codes, offset) => {
                Self::Quantised(Box::new(codes.range(vec![blocks.len()], blocks)), *offset)
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Plain(factors) => size_of_val(factors.as_slice()),
            Self::Quantised(codes, _) => codes.bytes(),
        }
    }
}

/// What a decoded element is rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    F32,
    Bf16,
    F16,
}

impl Rounding {
    #[inline(always)]
    fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
            Self::F16 => half::f16::from_f32_const(value).to_f32_const(),
        }
    }
}

/// A tensor in few bits, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantised {
    shape: Vec<usize>,
    codes: Vec<u8>,
    values: Values,
    /// Elements of a block.
    block: usize,
    /// Elements before the first one: a slice starts inside of a block.
    skipped: usize,
    factors: Factors,
    rounding: Rounding,
    on_device: OnDevice,
}

impl Quantised {
    /// Of its parts; what does not fit together is said.
    pub(crate) fn new(
        shape: Vec<usize>,
        codes: Vec<u8>,
        values: Values,
        block: usize,
        factors: Factors,
    ) -> Result<Self, String> {
        let numel = shape
            .iter()
            .try_fold(1usize, |n, &axis| n.checked_mul(axis));
        let numel = numel.ok_or_else(|| format!("its shape {shape:?} overflows"))?;
        let is_packed = matches!(values, Values::Nibbles(_));
        if block == 0 || (is_packed && block % 2 == 1) {
            return Err(format!("its blocks have {block} elements"));
        }
        if let Factors::Quantised(codes, _) = &factors
            && matches!(codes.factors, Factors::Quantised(..))
        {
            return Err("its factors are quantised twice".into());
        }
        let needed = if is_packed { numel.div_ceil(2) } else { numel };
        if codes.len() != needed {
            return Err(format!(
                "{} bytes of codes are there, its shape {shape:?} takes {needed}",
                codes.len()
            ));
        }
        let (found, blocks) = (factors.len(), numel.div_ceil(block));
        if found != blocks {
            return Err(format!(
                "{found} factors are there, {numel} elements in blocks of {block} take {blocks}"
            ));
        }
        Ok(Self {
            shape,
            codes,
            values,
            block,
            skipped: 0,
            factors,
            rounding: Rounding::F32,
            on_device: OnDevice::default(),
        })
    }

    /// Decoded to another type than f32.
    pub(crate) fn rounded_to(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    /// Length of each axis, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        match self.values {
            Values::Nibbles(_) => 4,
            Values::Bytes(_) | Values::Int8 => 8,
        }
    }

    /// Bytes that it takes in memory.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.factors.bytes()
    }

    /// Writes the elements from `start` on, in row-major order, until `out` is full.
    ///
    /// # Panics
    /// If there are not so many.
    #[inline(always)]
    pub fn decode(&self, start: usize, out: &mut [f32]) {
        let mut at = self.skipped + start;
        let mut rest = out;
        while !rest.is_empty() {
            let block = at / self.block;
            let len = rest.len().min((block + 1) * self.block - at);
            let (now, later) = rest.split_at_mut(len);
            let factor = self.factors.at(block);
            let value = |value: f32| self.rounding.round(value * factor);
            self.values.decode(&self.codes, at, value, now);
            (at, rest) = (at + len, later);
        }
    }

    /// All elements, in row-major order.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.numel()];
        self.decode(0, &mut values);
        values
    }

    /// A slice of the outermost axis.
    ///
    /// # Panics
    /// If the tensor is a scalar or `rows` exceeds the axis.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.shape[0]);
        let stride: usize = self.shape[1..].iter().product();
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        self.range(shape, rows.start * stride..rows.end * stride)
    }

    /// The elements of a range, in another shape.
    fn range(&self, shape: Vec<usize>, elements: Range<usize>) -> Self {
        let [start, end] = [elements.start, elements.end].map(|at| self.skipped + at);
        let (first, last) = (start / self.block, end.div_ceil(self.block));
        let codes = match self.values {
            Values::Nibbles(_) => first * self.block / 2..end.div_ceil(2),
            Values::Bytes(_) | Values::Int8 => first * self.block..end,
        };
        Self {
            shape,
            codes: self.codes[codes].to_vec(),
            values: self.values.clone(),
            block: self.block,
            skipped: start - first * self.block,
            factors: self.factors.range(first..last.max(first)),
            rounding: self.rounding,
            on_device: OnDevice::default(),
        }
    }

    /// A matrix's codes on `device`, which is without autodiff; they stay there. `None` where it cannot be decoded there.
    pub(crate) fn on_device(&self, device: &Device) -> Option<Arc<Codes>> {
        let &[out, inputs] = self.shape.as_slice() else {
            return None;
        };
        let parts = || Parts {
            shape: [out, inputs],
            codes: &self.codes,
            table: match &self.values {
                Values::Nibbles(table) => table.to_vec(),
                Values::Bytes(table) => table.to_vec(),
                Values::Int8 => (0..=u8::MAX)
                    .map(|code| f32::from(code.cast_signed()))
                    .collect(),
            },
            factors: (0..self.factors.len())
                .map(|block| self.factors.at(block))
                .collect(),
            block: self.block,
            skipped: self.skipped,
            rounded: match self.rounding {
                Rounding::F32 => DType::F32,
                Rounding::Bf16 => DType::BF16,
                Rounding::F16 => DType::F16,
            },
        };
        (self.on_device).codes(device, || Codes::new(parts(), device))
    }

    /// Flat index of the first NaN or infinity.
    pub fn first_non_finite(&self) -> Option<usize> {
        let mut piece = [0f32; 4096];
        let numel = self.numel();
        (0..numel).step_by(piece.len()).find_map(|start| {
            let piece = &mut piece[..(numel - start).min(4096)];
            self.decode(start, piece);
            let found = piece.iter().position(|value| !value.is_finite());
            found.map(|at| start + at)
        })
    }
}

impl Values {
    #[inline(always)]
    fn one(&self, codes: &[u8], at: usize) -> f32 {
        match self {
            Self::Nibbles(table) => {
                let byte = codes[at / 2];
                let code = if at & 1 == 0 { byte >> 4 } else { byte & 15 };
                table[usize::from(code)]
            }
            Self::Bytes(table) => table[usize::from(codes[at])],
            Self::Int8 => f32::from(codes[at].cast_signed()),
        }
    }

    /// The elements from `at` on, which are all of one block: `value` of what their codes stand for.
    #[inline(always)]
    fn decode(&self, codes: &[u8], at: usize, value: impl Fn(f32) -> f32, out: &mut [f32]) {
        match self {
            Self::Nibbles(table) => {
                let table = table.map(&value);
                let nibble = |code: u8| table[usize::from(code & 15)];
                let odd = (at % 2).min(out.len());
                let (first, out) = out.split_at_mut(odd);
                if let Some(first) = first.first_mut() {
                    *first = nibble(codes[at / 2]);
                }
                let at = at + odd;
                let codes = &codes[at / 2..][..out.len().div_ceil(2)];
                let (pairs, rest) = out.as_chunks_mut::<2>();
                for (pair, &byte) in pairs.iter_mut().zip(codes) {
                    *pair = [nibble(byte >> 4), nibble(byte)];
                }
                if let (Some(last), Some(&byte)) = (rest.first_mut(), codes.last()) {
                    *last = nibble(byte >> 4);
                }
            }
            Self::Bytes(table) => {
                for (out, &code) in out.iter_mut().zip(&codes[at..]) {
                    *out = value(table[usize::from(code)]);
                }
            }
            Self::Int8 => {
                for (out, &code) in out.iter_mut().zip(&codes[at..]) {
                    *out = value(f32::from(code.cast_signed()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
