//! `y = x W + b + scale * ((mask * x) Aᵀ) Bᵀ`: a frozen linear layer with its LoRA, in one node.
//!
//! With `u = scale * (mask * x) Aᵀ` and the gradient `g` of `y`:
//!
//! ```text
//! y  = x W + b + u Bᵀ             v  = scale * g B
//! dx = g Wᵀ + mask * (v A)        dA = vᵀ (mask * x)        dB = gᵀ u
//! ```
//!
//! Kept for the backward pass are `x`, `u`, the mask and the weights, by reference. `W` is f32, bf16, f16 or in few bits, and
//! is made f32 while it is packed; the side path and the bias are further rows of the same product (`ops::gemm`). `W` and
//! `b` get gradients too where they are trained (`dW = xᵀ g`, `db` the sum of `g`). The composition casts or decodes `W` as a
//! whole, in both passes, and keeps it as it is (`ops::decoded`). A block that is computed again takes `y` and `u` from its first
//! run where they are kept ([`computed_once`](crate::ops::computed_once)).
//!
//! Source: Hu et al. 2021, arXiv:2106.09685; PEFT `lora.Linear.forward` (dropout on the adapter's input alone).

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use crate::files::quantised::Quantised;
use crate::ops::composition::has_node;
use crate::ops::decoded::{self, Kept};
use crate::ops::matmul::{plus, times};

/// The weight of [`linear`].
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "it is made for one call, and a tensor is what it mostly is"
)]
pub enum Weight {
    /// `[in, out]`, f32, bf16 or f16.
    Dense(Tensor<2>),
    /// `[out, in]`, in few bits; it gets no gradient.
    Quantised(Arc<Quantised>),
}

impl From<Tensor<2>> for Weight {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(weight)
    }
}

impl From<Arc<Quantised>> for Weight {
    fn from(weight: Arc<Quantised>) -> Self {
        Self::Quantised(weight)
    }
}

impl Weight {
    /// `[in, out]`; what is in few bits is decoded to f32, on `device`.
    pub fn dense(&self, device: &Device) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.clone(),
            Self::Quantised(weight) => {
                let data = TensorData::new(weight.to_f32(), weight.shape().to_vec());
                Tensor::<2>::from_data(data, device).transpose()
            }
        }
    }
}

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
    weight: impl Into<Weight>,
    bias: Option<Tensor<1>>,
    adapter: Option<LowRank<D>>,
) -> Tensor<D> {
    linear_of(x, weight.into(), bias, adapter, false)
}

/// [`linear`]; `is_last` says that the block it is in does not read the result. Where that block is computed again for its
/// gradients, the result is then zero, if there are kernels.
pub(crate) fn linear_of<const D: usize>(
    x: Tensor<D>,
    weight: Weight,
    bias: Option<Tensor<1>>,
    adapter: Option<LowRank<D>>,
    is_last: bool,
) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if cpu::takes(&x, &weight, adapter.as_ref()) {
        return cpu::linear(x, weight, bias, adapter, is_last);
    }
    let _ = is_last;
    plain(x, weight, bias, adapter)
}

/// The composition of Burn's operations.
fn plain<const D: usize>(
    x: Tensor<D>,
    weight: Weight,
    bias: Option<Tensor<1>>,
    adapter: Option<LowRank<D>>,
) -> Tensor<D> {
    let result = base(x.clone(), weight, bias);
    let Some(LowRank { a, b, scale, mask }) = adapter else {
        return result;
    };
    let dtype = x.dtype(); // the casts are free where all is f32
    let x = match mask {
        Some(mask) => x * mask.cast(dtype),
        None => x,
    };
    let low = times(x, a.transpose().cast(dtype), None).mul_scalar(scale);
    result + times(low, b.transpose().cast(dtype), None)
}

/// `x W + b`.
fn base<const D: usize>(x: Tensor<D>, weight: Weight, bias: Option<Tensor<1>>) -> Tensor<D> {
    let (device, dtype) = (x.device().inner(), x.dtype());
    let bias = bias.map(|bias| bias.cast(dtype)); // free where it is the same
    let kept = match &weight {
        _ if !has_node(&device) => None,
        Weight::Dense(dense) if dense.dtype() == dtype || dense.is_tracked() => None,
        Weight::Dense(dense) => Some(Kept::Dense(dense.clone().inner())),
        Weight::Quantised(few) => few.on_device(&device).map(Kept::Codes),
    };
    let Some(kept) = kept else {
        let weight = weight.dense(&x.device()).cast(dtype);
        return times(x, weight, bias);
    };
    plus(decoded::times(x, kept), bias)
}

#[cfg(feature = "flex")]
mod cpu {
    use std::sync::Arc;

    use burn::backend::Flex;
    use burn::backend::flex::FlexTensor;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::{DType, Shape, Tensor};
    use rayon::prelude::*;

    use super::{LowRank, Weight};
    use crate::files::quantised::Quantised;
    use crate::ops::gemm::{Lines, Product};
    use crate::ops::kernel::{CHUNK, dims, owned, packed, simd, tensor, transposed, values};
    use crate::ops::low_rank::{Strips, expand, outer, project};
    use crate::ops::once::{computed_once, is_second_run};
    use crate::ops::product::{Stored, last, product, product_with_transposed, rows, zeros};
    use crate::ops::{Operation, apply, has_kernels};

    /// Whether the kernels take these operands; what they do not take is left to the composition, and to its errors.
    pub fn takes<const D: usize>(
        x: &Tensor<D>,
        weight: &Weight,
        adapter: Option<&LowRank<D>>,
    ) -> bool {
        let is_known = match weight {
            Weight::Dense(weight) => {
                matches!(weight.dtype(), DType::F32 | DType::BF16 | DType::F16)
                    && x.dims()[D - 1] == weight.dims()[0]
            }
            Weight::Quantised(weight) => x.dims()[D - 1] == weight.shape()[1],
        };
        let of_f32 = adapter.is_none_or(|adapter| {
            [adapter.a.dtype(), adapter.b.dtype()] == [DType::F32; 2]
                && adapter.a.dims()[0] > 0
                && adapter
                    .mask
                    .as_ref()
                    .is_none_or(|mask| mask.dims() == x.dims())
        });
        has_kernels(x) && is_known && of_f32 && D > 1 && x.shape().num_elements() > 0
    }

    pub fn linear<const D: usize>(
        x: Tensor<D>,
        weight: Weight,
        bias: Option<Tensor<1>>,
        adapter: Option<LowRank<D>>,
        is_last: bool,
    ) -> Tensor<D> {
        let none = Tensor::<1>::empty([0], &x.device());
        let (weight, quantised) = match weight {
            Weight::Dense(weight) => (weight.into_dispatch(), None),
            Weight::Quantised(weight) => (none.clone().into_dispatch(), Some(weight)),
        };
        let operation = Linear {
            is_last,
            quantised,
            has_bias: bias.is_some(),
            scale: adapter.as_ref().map(|adapter| adapter.scale as f32),
            has_mask: adapter
                .as_ref()
                .is_some_and(|adapter| adapter.mask.is_some()),
        };
        let bias = bias.unwrap_or_else(|| none.clone()).into_dispatch();
        let mut inputs = vec![x.into_dispatch(), weight, bias];
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
        /// Whether no later operation of the block reads the result.
        is_last: bool,
        /// The weight, if it is no tensor.
        quantised: Option<Arc<Quantised>>,
        has_bias: bool,
        scale: Option<f32>,
        has_mask: bool,
    }

    #[derive(Debug, Clone)]
    struct Saved {
        x: FlexTensor,
        weight: Stored,
        /// `A`, `B`, `u` and the mask.
        adapter: Option<[FlexTensor; 4]>,
    }

    impl Operation<5> for Linear {
        type Saved = Saved;

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Saved) {
            let mut inputs = inputs.into_iter();
            let mut next = || inputs.next().expect("as many inputs as `linear` gives");
            let (x, weight, bias) = (packed(next()), next(), packed(next()));
            let weight = match &self.quantised {
                None => Stored::Dense(weight),
                Some(weight) => Stored::Quantised(weight.clone()),
            };
            let adapter = self.scale.map(|scale| Factors {
                a: packed(next()),
                b: packed(next()),
                mask: match self.has_mask {
                    true => packed(next()),
                    false => tensor(Vec::new(), [0]),
                },
                scale,
            });
            let (y, low) = computed_once(!self.is_last, || {
                self.result(&x, &weight, &bias, adapter.as_ref())
            });
            let adapter = adapter.map(|Factors { a, b, mask, .. }| [a, b, low, mask]);
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
            let dw = want_weight.then(|| {
                let rows = |x: &FlexTensor| x.reshape(Shape::from(rows_of(x)));
                Flex::float_matmul(transposed(rows(&x)), rows(&grad))
            });
            let db = want_bias.then(|| {
                let rows = values(&grad).len() / width;
                tensor(outer(&vec![1.0; rows], values(&grad), [1, width]), [width])
            });
            let (Some(scale), Some([a, b, low, mask])) = (self.scale, adapter) else {
                let dx = want_x.then(|| product_with_transposed(&grad, &weight, &[]));
                return [dx, dw, db, None, None];
            };
            let [rank, inner] = dims(&a);
            let (a, b) = (values(&a), values(&b));
            let of_a = (want_x || want_a).then(|| {
                let down = Strips::of([width, rank], |k| row(b, k, rank));
                project(values(&grad), &down, scale)
            });
            let dx = of_a.as_ref().filter(|_| want_x).map(|low_grad| {
                if self.has_mask {
                    let mut dx = product_with_transposed(&grad, &weight, &[]);
                    let up = Strips::of([rank, inner], |r| row(a, r, inner));
                    expand(dx.storage_mut(), low_grad, &up, values(&mask));
                    return dx;
                }
                let of_x = |r: usize, from: usize, to: &mut [f32]| {
                    to.copy_from_slice(&row(a, r, inner)[from..][..to.len()])
                };
                let side = Product {
                    x: low_grad,
                    weight: Lines::Rows(&of_x),
                };
                product_with_transposed(&grad, &weight, &[side])
            });
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

    /// The adapter as it is stored; an empty mask counts as none.
    struct Factors {
        a: FlexTensor,
        b: FlexTensor,
        mask: FlexTensor,
        scale: f32,
    }

    impl Linear {
        /// `y`, zero where nobody reads it, and `u`, `[rows, rank]`.
        fn result(
            &self,
            x: &FlexTensor,
            weight: &Stored,
            bias: &FlexTensor,
            adapter: Option<&Factors>,
        ) -> (FlexTensor, FlexTensor) {
            let rows = rows(x);
            let low = adapter.map_or_else(
                || tensor(Vec::new(), [rows, 0]),
                |Factors { a, mask, scale, .. }| {
                    let [rank, inner] = dims(a);
                    let a = values(a);
                    let down = Strips::of_columns([inner, rank], |r| row(a, r, inner));
                    tensor(project(&masked(x, mask), &down, *scale), [rows, rank])
                },
            );
            if self.is_last && is_second_run() {
                return (zeros(x, weight), low);
            }
            let bias = values(bias);
            let of_bias = |_: usize, from: usize, to: &mut [f32]| {
                to.copy_from_slice(&bias[from..][..to.len()])
            };
            let up = adapter.map(|Factors { b, .. }| {
                let (rank, b) = (last(b), values(b));
                move |column: usize, from: usize, to: &mut [f32]| {
                    to.copy_from_slice(&row(b, column, rank)[from..][..to.len()])
                }
            });
            let ones = vec![1f32; if self.has_bias { rows } else { 0 }];
            let of_bias = self.has_bias.then_some(Product {
                x: &ones,
                weight: Lines::Rows(&of_bias),
            });
            let of_adapter = up.as_ref().map(|up| Product {
                x: values(&low),
                weight: Lines::Columns(up),
            });
            let more: Vec<Product> = of_bias.into_iter().chain(of_adapter).collect();
            (product(x, weight, &more), low)
        }
    }

    fn row(x: &[f32], index: usize, width: usize) -> &[f32] {
        &x[index * width..][..width]
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

    fn rows_of(x: &FlexTensor) -> [usize; 2] {
        [rows(x), last(x)]
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::ops::check::{agree, random, same_bits_with_any_threads_and_vectors};

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

    /// Weights in few bits, of every kind, and of sizes that end inside of blocks and panels.
    fn in_few_bits() -> Vec<Weight> {
        let mut all = Vec::new();
        for [inner, outer] in [[5, 7], [67, 600], [300, 513]] {
            let values: Vec<f32> =
                (random([outer, inner]).into_data().try_into_vec()).expect("f32");
            all.push(Arc::new(Quantised::nf4([outer, inner], &values)));
            all.push(Arc::new(Quantised::int8([outer, inner], &values)));
            let more: Vec<f32> = [&values[..inner], &values].concat();
            let slice = Quantised::nf4([outer + 1, inner], &more).rows(1..outer + 1);
            all.push(Arc::new(slice));
        }
        all.into_iter().map(Weight::from).collect()
    }

    #[test]
    fn a_layer_in_few_bits_agrees_with_its_composition() {
        for weight in in_few_bits() {
            let [inner, outer] = weight.dense(&burn::tensor::Device::flex()).dims();
            for rows in [1, 70] {
                agree([random([2, rows, inner])], |[x]| {
                    linear(x, weight.clone(), Some(random([outer])), None)
                });
            }
            let rank = 3;
            agree(
                [
                    random([1, 40, inner]),
                    random([1, rank, inner]),
                    random([1, outer, rank]),
                ],
                |[x, a, b]| {
                    let adapter = LowRank {
                        a: a.squeeze_dim(0),
                        b: b.squeeze_dim(0),
                        scale: 0.7,
                        mask: None,
                    };
                    linear(x, weight.clone(), None, Some(adapter))
                },
            );
        }
    }

    #[test]
    fn a_layer_in_few_bits_has_the_same_bits_with_any_threads_and_vectors() {
        let (weights, mut x) = (in_few_bits(), Vec::new());
        for weight in &weights {
            let [inner, _] = weight.dense(&burn::tensor::Device::flex()).dims();
            x.push(random([70, inner]));
        }
        same_bits_with_any_threads_and_vectors(|| {
            let pairs = weights.iter().zip(&x);
            let all = pairs.flat_map(|(weight, x)| {
                let x = x.clone().require_grad();
                let y = linear(x.clone(), weight.clone(), None, None);
                let gradients = y.clone().square().sum().backward();
                let dx = x.grad(&gradients).expect("a gradient");
                [y.inner(), dx].map(|t| t.into_data().try_into_vec::<f32>().expect("f32"))
            });
            all.flatten().collect()
        });
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

    #[test]
    fn a_weight_of_halves_is_trained_where_it_is_composed() {
        let x = random([5, 19]).require_grad();
        let weight = random([19, 7]).cast(DType::BF16).require_grad();
        let y = crate::ops::composed(|| linear(x.clone(), weight.clone(), None, None));
        let gradients = y.sum().backward();
        let gradient = weight.grad(&gradients).expect("a gradient");
        let expected = x.clone().inner().sum_dim(0).transpose().expand([19, 7]);
        assert_eq!(gradient.dtype(), DType::BF16);
        let distance = (gradient.cast(DType::F32) - expected).abs().max();
        assert!(distance.into_scalar::<f32>() < 0.02);
        assert!(x.grad(&gradients).is_some());
    }
}
