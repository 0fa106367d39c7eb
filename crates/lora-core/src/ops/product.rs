//! `x W` for every storage of a frozen `W`, which is made f32 while it is packed.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, bf16, f16};
use half::slice::HalfFloatSliceExt;

use super::gemm::{self, Lines, Product};
use super::kernel::{dims, simd, tensor, transposed, values};
use crate::files::quantised::Quantised;

/// A weight on the CPU.
#[derive(Debug, Clone)]
pub(super) enum Stored {
    /// `[in, out]`, f32, bf16 or f16.
    Dense(FlexTensor),
    /// `[out, in]`, in few bits.
    Quantised(Arc<Quantised>),
}

/// `x W` plus `more`, with `x` packed and `[..., in]`.
pub(super) fn product(x: &FlexTensor, weight: &Stored, more: &[Product<'_>]) -> FlexTensor {
    match weight {
        Stored::Dense(weight) => dense(x, weight.clone(), more),
        Stored::Quantised(weight) => {
            let inner = weight.shape()[1];
            sum(
                x,
                weight.shape()[0],
                Lines::Columns(&decoded(weight, inner)),
                more,
            )
        }
    }
}

/// `x Wᵀ` plus `more`, with `x` packed and `[..., out]`.
pub(super) fn product_with_transposed(
    x: &FlexTensor,
    weight: &Stored,
    more: &[Product<'_>],
) -> FlexTensor {
    match weight {
        Stored::Dense(weight) => dense(x, transposed(weight.clone()), more),
        Stored::Quantised(weight) => {
            let inner = weight.shape()[1];
            sum(x, inner, Lines::Rows(&decoded(weight, inner)), more)
        }
    }
}

/// Zeros in the shape of [`product`].
pub(super) fn zeros(x: &FlexTensor, weight: &Stored) -> FlexTensor {
    let outer = match weight {
        Stored::Dense(weight) => dims::<2>(weight)[1],
        Stored::Quantised(weight) => weight.shape()[0],
    };
    shaped(vec![0.0; rows(x) * outer], x, outer)
}

fn dense(x: &FlexTensor, weight: FlexTensor, more: &[Product<'_>]) -> FlexTensor {
    let weight = match weight.layout().strides() {
        [_, 1] | [1, _] => weight,
        _ => weight.to_contiguous(),
    };
    match weight.dtype() {
        DType::BF16 => read_with(x, &weight, FlexTensor::storage::<bf16>, from_bf16, more),
        DType::F16 => {
            let from_f16 = |to: &mut [f32], from: &[f16]| from.convert_to_f32_slice(to);
            read_with(x, &weight, FlexTensor::storage::<f16>, from_f16, more)
        }
        _ => read_with(
            x,
            &weight,
            FlexTensor::storage::<f32>,
            <[f32]>::copy_from_slice,
            more,
        ),
    }
}

/// In so few instructions that the CPU fetches several lines of a weight at a time; NaNs stay NaNs, as they are.
fn from_bf16(to: &mut [f32], from: &[bf16]) {
    simd(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = f32::from_bits(u32::from(from.to_bits()) << 16);
            }
        },
    );
}

/// `x` times a matrix of adjacent rows or columns, whose elements `read` makes f32.
fn read_with<E: Sync>(
    x: &FlexTensor,
    weight: &FlexTensor,
    elements: fn(&FlexTensor) -> &[E],
    read: impl Fn(&mut [f32], &[E]) + Sync,
    more: &[Product<'_>],
) -> FlexTensor {
    let [_, outer] = dims(weight);
    let layout = weight.layout();
    let source = &elements(weight)[layout.start_offset()..];
    let [down, across] = [layout.strides()[0] as usize, layout.strides()[1] as usize];
    let line = |step: usize| {
        let read = &read;
        move |line: usize, start: usize, to: &mut [f32]| {
            read(to, &source[line * step + start..][..to.len()]);
        }
    };
    match across {
        1 => sum(x, outer, Lines::Rows(&line(down)), more),
        _ => sum(x, outer, Lines::Columns(&line(across)), more),
    }
}

/// The rows of a weight `[out, in]` in few bits.
fn decoded(weight: &Quantised, inner: usize) -> impl Fn(usize, usize, &mut [f32]) + Sync {
    move |row, start, to| {
        simd(
            #[inline(always)]
            || weight.decode(row * inner + start, to),
        );
    }
}

/// `x` times a matrix of `outer` columns, plus `more`.
fn sum(x: &FlexTensor, outer: usize, weight: Lines<'_>, more: &[Product<'_>]) -> FlexTensor {
    let first = Product {
        x: values(x),
        weight,
    };
    let products: Vec<Product> = std::iter::once(first).chain(more.iter().copied()).collect();
    shaped(gemm::sum(rows(x), outer, &products), x, outer)
}

/// How many rows of its last dimension a tensor has.
pub(super) fn rows(x: &FlexTensor) -> usize {
    x.layout().num_elements() / last(x)
}

/// Rows of width `outer` in the shape that `x` has but for its last dimension.
fn shaped(y: Vec<f32>, x: &FlexTensor, outer: usize) -> FlexTensor {
    let mut shape = x.layout().shape().clone();
    let end = shape.num_dims() - 1;
    shape[end] = outer;
    tensor(y, shape)
}

/// Length of the last dimension.
pub(super) fn last(x: &FlexTensor) -> usize {
    let shape = x.layout().shape();
    shape[shape.num_dims() - 1]
}
