//! A weight in few bits on a device: its codes four bytes to an integer, the values they stand for, and the factors of blocks.
//!
//! Decoding is a table look-up and a product, as on the host ([`Quantised`](crate::files::quantised::Quantised)), in Burn's
//! operations: the same values. Factors
//! that are quantised themselves are decoded once, on the host.

use std::sync::{Arc, OnceLock};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// A weight in few bits on the host.
pub(crate) struct Parts<'a> {
    /// `[out, in]`.
    pub(crate) shape: [usize; 2],
    /// 4 or 8 bits each; the first of two in a byte is in its high half.
    pub(crate) codes: &'a [u8],
    /// The value of each code.
    pub(crate) table: Vec<f32>,
    pub(crate) factors: Vec<f32>,
    /// Elements of a block.
    pub(crate) block: usize,
    /// Elements before the first one.
    pub(crate) skipped: usize,
    /// What decoded elements are rounded to.
    pub(crate) rounded: DType,
}

/// A weight `[out, in]` in few bits, on a device.
#[derive(Debug)]
pub(crate) struct Codes {
    /// Integers of four bytes.
    words: Tensor<1, Int>,
    /// By how much to shift them for each of their codes.
    shifts: Tensor<1, Int>,
    bits: u32,
    /// The value of each code.
    table: Tensor<1>,
    /// Of each block.
    factors: Tensor<1>,
    block: usize,
    skipped: usize,
    shape: [usize; 2],
    /// What decoded elements are rounded to.
    rounded: DType,
}

impl Codes {
    /// Takes a weight to `device`, which is without autodiff; `None` if that lacks the type its elements are rounded to, or
    /// there are none.
    pub(crate) fn new(parts: Parts, device: &Device) -> Option<Self> {
        let Parts {
            shape,
            codes,
            table,
            factors,
            block,
            skipped,
            rounded,
        } = parts;
        if shape.contains(&0) || !device.supports_dtype(rounded) {
            return None;
        }
        let bits = table.len().ilog2();
        let per_word = 32 / bits as usize;
        // Whole blocks: what is beyond the last element is cut off.
        let words = (factors.len() * block).div_ceil(per_word);
        let mut bytes = codes.to_vec();
        bytes.resize(4 * words, 0);
        let (quads, _) = bytes.as_chunks::<4>();
        let quads: Vec<i32> = quads.iter().map(|quad| i32::from_le_bytes(*quad)).collect();
        let shifts: Vec<i32> = match bits {
            4 => vec![4, 0, 12, 8, 20, 16, 28, 24],
            _ => vec![0, 8, 16, 24],
        };
        let integers = |values: Vec<i32>| {
            let count = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [count]), (device, DType::I32))
        };
        let floats = |values: Vec<f32>| {
            let count = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [count]), device)
        };
        Some(Self {
            words: integers(quads),
            shifts: integers(shifts),
            bits,
            table: floats(table),
            factors: floats(factors),
            block,
            skipped,
            shape,
            rounded,
        })
    }

    /// `[in, out]`, f32.
    pub(crate) fn dense(&self) -> Tensor<2> {
        let [words, per_word] = [self.words.dims()[0], self.shifts.dims()[0]];
        let split = |codes: Tensor<2, Int>| codes.expand([words, per_word]);
        let codes = split(self.words.clone().reshape([words, 1]))
            .bitwise_right_shift(split(self.shifts.clone().reshape([1, per_word])))
            .bitwise_and_scalar((1 << self.bits) - 1)
            .reshape([words * per_word]);
        let blocks = self.factors.dims()[0];
        let numel = self.shape[0] * self.shape[1];
        let values = self.table.clone().select(0, codes);
        let values = values.narrow(0, 0, blocks * self.block);
        let values =
            values.reshape([blocks, self.block]) * self.factors.clone().unsqueeze_dim::<2>(1);
        let values = values
            .reshape([blocks * self.block])
            .narrow(0, self.skipped, numel);
        let values = values.cast(self.rounded).cast(DType::F32);
        values.reshape(self.shape).transpose()
    }
}

/// What of a weight is on a device already. It is no part of its value.
#[derive(Debug, Default)]
pub(crate) struct OnDevice(OnceLock<Box<(Device, Option<Arc<Codes>>)>>);

impl OnDevice {
    /// What is on `device`, made by `new` unless it is there.
    pub(crate) fn codes(
        &self,
        device: &Device,
        new: impl Fn() -> Option<Codes>,
    ) -> Option<Arc<Codes>> {
        let new = || new().map(Arc::new);
        let (first, codes) = &**self.0.get_or_init(|| Box::new((device.clone(), new())));
        match first == device {
            true => codes.clone(),
            false => new(),
        }
    }
}

impl Clone for OnDevice {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for OnDevice {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
