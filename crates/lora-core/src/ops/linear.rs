//! `y = x W + b + scale * ((mask * x) Aᵀ) Bᵀ`: a frozen linear layer with its LoRA, in one node.
//!
//! With `u = scale * (mask * x) Aᵀ` and the gradient `g` of `y`:
//!
//! ```text
//! y  = x W + b + u Bᵀ             v  = scale * g B
//! dx = g Wᵀ + mask * (v A)        dA = vᵀ (mask * x)        dB = gᵀ u
//! ```
//!
//! Kept for the backward pass are `x`, `u`, the mask and the weights, by reference. `W` is f32, bf16 or f16; a panel of
//! its columns is f32 at a time. `W` and `b` get gradients too where they are trained (`dW = xᵀ g`, `db` the sum of `g`).
//!
//! Source: Hu et al. 2021, arXiv:2106.09685; PEFT `lora.Linear.forward` (dropout on the adapter's input alone).

use burn::tensor::Tensor;
use burn::tensor::module::linear as burn_linear;

/// The adapter's part of [`linear`].
#[derive(Debug, Clone)]
pub struct LowRank<const D: usize> {
    /// `A`, `[rank, in]`.
    pub a: Tensor<2>,
    /// `B`, `[out, rank]`.
    pub b: Tensor<2>,
    /// Factor of the update.
    pub scale: f64,
    /// Dropout: factors of the elements of the adapter's input, `[..., in]`.
    pub mask: Option<Tensor<D>>,
}

/// `x W + b + scale * ((mask * x) Aᵀ) Bᵀ`.
///
/// # Shapes
/// - `x`: `[..., in]`, `weight`: `[in, out]`, `bias`: `[out]`; returns `[..., out]`
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    adapter: Option<LowRank<D>>,
) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if cpu::takes(&x, &weight, adapter.as_ref()) {
        return cpu::linear(x, weight, bias, adapter);
    }
    plain(x, weight, bias, adapter)
}

/// The composition of Burn's operations.
fn plain<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    adapter: Option<LowRank<D>>,
) -> Tensor<D> {
    let weight = weight.cast(x.dtype()); // free where it is the same
    let result = burn_linear(x.clone(), weight, bias);
    let Some(LowRank { a, b, scale, mask }) = adapter else {
        return result;
    };
    let x = match mask {
        Some(mask) => x * mask,
        None => x,
    };
    let low = burn_linear(x, a.transpose(), None);
    result + burn_linear(low, b.transpose(), None).mul_scalar(scale)
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::Flex;
    use burn::backend::flex::FlexTensor;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::{DType, Shape, Tensor, bf16, f16};
    use half::slice::HalfFloatSliceExt;
    use rayon::prelude::*;

    use super::LowRank;
    use crate::ops::kernel::{
        CHUNK, ROWS, dims, matrix, owned, packed, simd, tensor, transposed, values,
    };
    use crate::ops::low_rank::{Strips, expand, outer, project};
    use crate::ops::{Operation, apply, has_kernels};

    /// Whether the kernels take these operands; what they do not take is left to the composition, and to its errors.
    pub fn takes<const D: usize>(
        x: &Tensor<D>,
        weight: &Tensor<2>,
        adapter: Option<&LowRank<D>>,
    ) -> bool {
        let is_float = matches!(weight.dtype(), DType::F32 | DType::BF16 | DType::F16);
        let of_f32 = adapter.is_none_or(|adapter| {
            [adapter.a.dtype(), adapter.b.dtype()] == [DType::F32; 2]
                && adapter.a.dims()[0] > 0
                && adapter
                    .mask
                    .as_ref()
                    .is_none_or(|mask| mask.dims() == x.dims())
        });
        has_kernels(x) && is_float && of_f32 && D > 1 && x.shape().num_elements() > 0
    }

    pub fn linear<const D: usize>(
        x: Tensor<D>,
        weight: Tensor<2>,
        bias: Option<Tensor<1>>,
        adapter: Option<LowRank<D>>,
    ) -> Tensor<D> {
        let none = Tensor::<1>::empty([0], &x.device());
        let operation = Linear {
            has_bias: bias.is_some(),
            scale: adapter.as_ref().map(|adapter| adapter.scale as f32),
            has_mask: adapter
                .as_ref()
                .is_some_and(|adapter| adapter.mask.is_some()),
        };
        let bias = bias.unwrap_or_else(|| none.clone()).into_dispatch();
        let mut inputs = vec![x.into_dispatch(), weight.into_dispatch(), bias];
        match adapter {
            None => inputs.extend([none.clone().into_dispatch(), none.into_dispatch()]),
            Some(LowRank { a, b, mask, .. }) => {
                inputs.extend([a.into_dispatch(), b.into_dispatch()]);
                inputs.extend(mask.map(Tensor::into_dispatch));
            }
        }
        apply::<_, 5, D>(operation, inputs)
    }

    /// Inputs: `x`, `W`, `b`, `A`, `B`, the mask; what is absent is empty.
    #[derive(Debug, Clone)]
    struct Linear {
        has_bias: bool,
        scale: Option<f32>,
        has_mask: bool,
    }

    #[derive(Debug, Clone)]
    struct Saved {
        x: FlexTensor,
        weight: FlexTensor,
        /// `A`, `B`, `u` and the mask.
        adapter: Option<[FlexTensor; 4]>,
    }

    impl Operation<5> for Linear {
        type Saved = Saved;

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Saved) {
            let mut inputs = inputs.into_iter();
            let mut next = || inputs.next().expect("as many inputs as `linear` gives");
            let (x, weight, bias) = (packed(next()), next(), packed(next()));
            let bias = if self.has_bias { values(&bias) } else { &[] };
            let mut y = product(&x, &weight);
            let Some(scale) = self.scale else {
                if self.has_bias {
                    add_bias(y.storage_mut(), bias);
                }
                let adapter = None;
                return (y, Saved { x, weight, adapter });
            };
            let (a, b) = (packed(next()), packed(next()));
            let mask = match self.has_mask {
                true => packed(next()),
                false => tensor(Vec::new(), [0]),
            };
            let ([rank, inner], [outer, _]) = (dims(&a), dims(&b));
            let down = Strips::of_columns([inner, rank], |r| row(&a, r, inner));
            let up = Strips::of_columns([rank, outer], |j| row(&b, j, rank));
            let low = project(&masked(&x, &mask), &down, scale);
            expand(y.storage_mut(), &low, &up, bias, &[]);
            let rows = low.len() / rank;
            let low = tensor(low, [rows, rank]);
            let adapter = Some([a, b, low, mask]);
            (y, Saved { x, weight, adapter })
        }

        fn backward(
            &self,
            saved: Saved,
            grad: FlexTensor,
            [want_x, want_weight, want_bias, want_a, want_b]: [bool; 5],
        ) -> [Option<FlexTensor>; 5] {
            let Saved { x, weight, adapter } = saved;
            let grad = packed(grad);
            let width = last(&grad);
            let mut dx = want_x.then(|| product(&grad, &transposed(weight.clone())));
            let dw = want_weight.then(|| {
                let rows = |x: &FlexTensor| x.reshape(Shape::from(rows_of(x)));
                Flex::float_matmul(transposed(rows(&x)), rows(&grad))
            });
            let db = want_bias.then(|| {
                let rows = values(&grad).len() / width;
                tensor(outer(&vec![1.0; rows], values(&grad), [1, width]), [width])
            });
            let (Some(scale), Some([a, b, low, mask])) = (self.scale, adapter) else {
                return [dx, dw, db, None, None];
            };
            let [rank, inner] = dims(&a);
            let of_a = (want_x || want_a).then(|| {
                let down = Strips::of([width, rank], |k| row(&b, k, rank));
                project(values(&grad), &down, scale)
            });
            if let (Some(dx), Some(low_grad)) = (&mut dx, &of_a) {
                let up = Strips::of([rank, inner], |r| row(&a, r, inner));
                expand(dx.storage_mut(), low_grad, &up, &[], values(&mask));
            }
            let da = of_a.filter(|_| want_a).map(|low_grad| {
                let da = outer(&low_grad, &masked(&x, &mask), [rank, inner]);
                tensor(da, [rank, inner])
            });
            let db_factor = want_b.then(|| {
                let turned = outer(values(&low), values(&grad), [rank, width]);
                owned(transposed(tensor(turned, [rank, width])))
            });
            [dx, dw, db, da, db_factor]
        }
    }

    fn row(x: &FlexTensor, index: usize, width: usize) -> &[f32] {
        &values(x)[index * width..][..width]
    }

    /// `mask * x`; an empty mask counts as none.
    fn masked<'a>(x: &'a FlexTensor, mask: &FlexTensor) -> std::borrow::Cow<'a, [f32]> {
        let (x, mask) = (values(x), values(mask));
        if mask.is_empty() {
            return x.into();
        }
        let mut result = x.to_vec();
        let tasks = result.par_chunks_mut(CHUNK).zip(mask.par_chunks(CHUNK));
        tasks.for_each(|(x, mask)| {
            simd(
                #[inline(always)]
                || {
                    for (x, mask) in x.iter_mut().zip(mask) {
                        *x *= mask;
                    }
                },
            )
        });
        result.into()
    }

    fn add_bias(y: &mut [f32], bias: &[f32]) {
        let width = bias.len();
        y.par_chunks_mut(ROWS * width).for_each(|y| {
            simd(
                #[inline(always)]
                || {
                    for y in y.chunks_exact_mut(width) {
                        for (y, bias) in y.iter_mut().zip(bias) {
                            *y += bias;
                        }
                    }
                },
            )
        });
    }

    fn last(x: &FlexTensor) -> usize {
        let shape = x.layout().shape();
        shape[shape.num_dims() - 1]
    }

    fn rows_of(x: &FlexTensor) -> [usize; 2] {
        [x.layout().num_elements() / last(x), last(x)]
    }

    /// `x W`, with `x` packed and `[..., in]`.
    fn product(x: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
        let rows = x.reshape(Shape::from(rows_of(x)));
        let [_, outer] = dims(weight);
        let y = match weight.dtype() {
            DType::BF16 => product_by_panels(&rows, weight, FlexTensor::storage::<bf16>),
            DType::F16 => product_by_panels(&rows, weight, FlexTensor::storage::<f16>),
            _ => Flex::float_matmul(rows, weight.clone()),
        };
        let mut shape = x.layout().shape().clone();
        let end = shape.num_dims() - 1;
        shape[end] = outer;
        y.reshape(shape)
    }

    /// Columns of a weight that are f32 at a time.
    const PANEL: usize = 512;

    fn product_by_panels<E: Sync>(
        x: &FlexTensor,
        weight: &FlexTensor,
        elements: fn(&FlexTensor) -> &[E],
    ) -> FlexTensor
    where
        [E]: HalfFloatSliceExt,
    {
        let [rows, _] = dims(x);
        let [inner, outer] = dims(weight);
        let weight = match weight.layout().strides() {
            [_, 1] | [1, _] => weight.clone(),
            _ => weight.to_contiguous(),
        };
        let layout = weight.layout();
        let strides = [layout.strides()[0] as usize, layout.strides()[1] as usize];
        let by_rows = strides[1] == 1;
        let source = &elements(&weight)[layout.start_offset()..];
        let mut y = vec![0f32; rows * outer];
        for first in (0..outer).step_by(PANEL) {
            let columns = PANEL.min(outer - first);
            let mut panel = vec![0f32; inner * columns];
            // in the order of the storage: rows of the panel, or its columns
            let (line, step, shape) = match by_rows {
                true => (columns, strides[0], [columns, 1]),
                false => (inner, strides[1], [1, inner]),
            };
            let start = if by_rows { first } else { first * strides[1] };
            let tasks = panel.par_chunks_mut(line * ROWS).enumerate();
            tasks.for_each(|(task, panel)| {
                for (i, line) in panel.chunks_exact_mut(line).enumerate() {
                    let from = &source[start + (task * ROWS + i) * step..][..line.len()];
                    from.convert_to_f32_slice(line);
                }
            });
            let panel = matrix(
                &tensor(panel, [inner * columns]),
                [inner, columns],
                shape,
                0,
            );
            let part = Flex::float_matmul(x.clone(), panel);
            y.par_chunks_mut(outer)
                .zip(values(&part).par_chunks(columns))
                .for_each(|(y, part)| y[first..first + columns].copy_from_slice(part));
        }
        tensor(y, [rows, outer])
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::ops::check::{agree, random};

    #[test]
    fn a_layer_agrees_with_its_composition_for_every_storage_of_its_weight() {
        for [rows, inner, outer] in [[1, 1, 1], [3, 17, 5], [130, 67, 600], [65, 300, 513]] {
            let kept = random([inner, outer]);
            let turned = random([outer, inner]).transpose();
            for weight in [kept, turned] {
                for dtype in [DType::F32, DType::BF16, DType::F16] {
                    let weight = weight.clone().cast(dtype);
                    agree([random([2, rows, inner])], |[x]| {
                        linear(x, weight.clone(), Some(random([outer])), None)
                    });
                    agree([random([rows, inner])], |[x]| {
                        linear(x, weight.clone(), None, None)
                    });
                }
            }
        }
    }

    #[test]
    fn a_layer_with_an_adapter_agrees_with_its_composition() {
        for [rows, inner, outer, rank] in [
            [1, 1, 1, 1],
            [3, 17, 5, 2],
            [130, 67, 600, 16],
            [70, 33, 90, 19],
        ] {
            let (weight, bias) = (random([inner, outer]), random([outer]));
            let dropped = random([1, rows, inner]).greater_elem(0.0).float() * 1.5;
            for mask in [None, Some(dropped)] {
                agree(
                    [
                        random([1, rows, inner]),
                        random([1, rank, inner]),
                        random([1, outer, rank]),
                    ],
                    |[x, a, b]| {
                        let adapter = LowRank {
                            a: a.squeeze_dim(0),
                            b: b.squeeze_dim(0),
                            scale: 0.7,
                            mask: mask.clone(),
                        };
                        linear(x, weight.clone(), Some(bias.clone()), Some(adapter))
                    },
                );
            }
        }
    }

    #[test]
    fn a_weight_and_a_bias_that_are_trained_get_their_gradients() {
        let (inner, outer) = (19, 7);
        agree(
            [
                random([5, inner]),
                random([inner, outer]),
                random([1, outer]),
            ],
            |[x, weight, bias]| linear(x, weight, Some(bias.squeeze_dim(0)), None),
        );
    }
}
