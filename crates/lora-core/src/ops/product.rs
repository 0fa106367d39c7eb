//! `x W` for every storage of a frozen `W`: what is not f32 is so a panel of columns at a time.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape, bf16, f16};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::kernel::{ROWS, dims, matrix, simd, tensor, transposed, values};
use crate::files::quantised::Quantised;

/// Columns of a weight that are f32 at a time.
const PANEL: usize = 512;

/// A weight on the CPU.
#[derive(Debug, Clone)]
pub(super) enum Stored {
    /// `[in, out]`, f32, bf16 or f16.
    Dense(FlexTensor),
    /// `[out, in]`, in few bits.
    Quantised(Arc<Quantised>),
}

/// `x W`, with `x` packed and `[..., in]`.
pub(super) fn product(x: &FlexTensor, weight: &Stored) -> FlexTensor {
    match weight {
        Stored::Dense(weight) => dense(x, weight.clone()),
        Stored::Quantised(weight) => quantised(x, weight, false),
    }
}

/// `x Wᵀ`, with `x` packed and `[..., out]`.
pub(super) fn product_with_transposed(x: &FlexTensor, weight: &Stored) -> FlexTensor {
    match weight {
        Stored::Dense(weight) => dense(x, transposed(weight.clone())),
        Stored::Quantised(weight) => quantised(x, weight, true),
    }
}

/// Zeros in the shape of [`product`].
pub(super) fn zeros(x: &FlexTensor, weight: &Stored) -> FlexTensor {
    let outer = match weight {
        Stored::Dense(weight) => dims::<2>(weight)[1],
        Stored::Quantised(weight) => weight.shape()[0],
    };
    let rows = x.layout().num_elements() / last(x);
    shaped(tensor(vec![0.0; rows * outer], [rows, outer]), x, outer)
}

fn dense(x: &FlexTensor, weight: FlexTensor) -> FlexTensor {
    let [_, outer] = dims(&weight);
    let rows = by_rows(x);
    let y = match weight.dtype() {
        DType::BF16 => of_halves(&rows, weight, FlexTensor::storage::<bf16>),
        DType::F16 => of_halves(&rows, weight, FlexTensor::storage::<f16>),
        _ => Flex::float_matmul(rows, weight),
    };
    shaped(y, x, outer)
}

fn of_halves<E: Sync>(
    x: &FlexTensor,
    weight: FlexTensor,
    elements: fn(&FlexTensor) -> &[E],
) -> FlexTensor
where
    [E]: HalfFloatSliceExt,
{
    let size = dims(&weight);
    let weight = match weight.layout().strides() {
        [_, 1] | [1, _] => weight,
        _ => weight.to_contiguous(),
    };
    let layout = weight.layout();
    let strides = [layout.strides()[0] as usize, layout.strides()[1] as usize];
    let lies = match strides {
        [step, 1] => Lies::ByRows(step),
        [_, step] => Lies::ByColumns(step),
    };
    let source = &elements(&weight)[layout.start_offset()..];
    by_panels(x, size, lies, |start, line| {
        source[start..][..line.len()].convert_to_f32_slice(line);
    })
}

fn quantised(x: &FlexTensor, weight: &Quantised, is_transposed: bool) -> FlexTensor {
    let [out, inputs] = [weight.shape()[0], weight.shape()[1]];
    let (size, lies) = match is_transposed {
        true => ([out, inputs], Lies::ByRows(inputs)),
        false => ([inputs, out], Lies::ByColumns(inputs)),
    };
    let y = by_panels(&by_rows(x), size, lies, |start, line| {
        simd(
            #[inline(always)]
            || weight.decode(start, line),
        );
    });
    shaped(y, x, size[1])
}

/// How the elements of a matrix follow each other, and how far apart its rows or columns begin.
#[derive(Clone, Copy)]
enum Lies {
    ByRows(usize),
    ByColumns(usize),
}

/// `x` times a matrix `[inner, outer]`, of which `read` writes the elements from one on.
fn by_panels(
    x: &FlexTensor,
    [inner, outer]: [usize; 2],
    lies: Lies,
    read: impl Fn(usize, &mut [f32]) + Sync,
) -> FlexTensor {
    let [rows, _] = dims(x);
    let mut y = vec![0f32; rows * outer];
    for first in (0..outer).step_by(PANEL) {
        let columns = PANEL.min(outer - first);
        let mut panel = vec![0f32; inner * columns];
        // in the order of the storage: rows of the panel, or its columns
        let (line, step, start, strides) = match lies {
            Lies::ByRows(step) => (columns, step, first, [columns, 1]),
            Lies::ByColumns(step) => (inner, step, first * step, [1, inner]),
        };
        let tasks = panel.par_chunks_mut((line * ROWS).max(1)).enumerate();
        tasks.for_each(|(task, panel)| {
            for (i, line) in panel.chunks_exact_mut(line).enumerate() {
                read(start + (task * ROWS + i) * step, line);
            }
        });
        let panel = tensor(panel, [inner * columns]);
        let part = Flex::float_matmul(x.clone(), matrix(&panel, [inner, columns], strides, 0));
        y.par_chunks_mut(outer)
            .zip(values(&part).par_chunks(columns))
            .for_each(|(y, part)| y[first..first + columns].copy_from_slice(part));
    }
    tensor(y, [rows, outer])
}

/// A packed tensor as rows of its last dimension.
fn by_rows(x: &FlexTensor) -> FlexTensor {
    let width = last(x);
    x.reshape(Shape::from([x.layout().num_elements() / width, width]))
}

/// Rows of width `outer` in the shape that `x` has but for its last dimension.
fn shaped(y: FlexTensor, x: &FlexTensor, outer: usize) -> FlexTensor {
    let mut shape = x.layout().shape().clone();
    let end = shape.num_dims() - 1;
    shape[end] = outer;
    y.reshape(shape)
}

/// Length of the last dimension.
pub(super) fn last(x: &FlexTensor) -> usize {
    let shape = x.layout().shape();
    shape[shape.num_dims() - 1]
}
