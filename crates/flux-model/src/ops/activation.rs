//! Activations that scale their input by a gate of it, `y = x s(x)`, element by element.

use burn::backend::flex::FlexTensor;
use lora_core::ops::kernel::{CHUNK, owned, packed, simd, tensor, values};
use rayon::prelude::*;

/// What distinguishes one from another; both functions must be inlined.
pub trait Activation {
    /// `s(x)`.
    fn gate(x: f32) -> f32;

    /// `s(x) + x s'(x)`.
    fn derivative(x: f32) -> f32;
}

/// `x s(x)`, and `x` for the backward pass.
pub fn forward<A: Activation>(inputs: Vec<FlexTensor>) -> (FlexTensor, FlexTensor) {
    let [x] = <[_; 1]>::try_from(inputs).expect("one input").map(packed);
    let mut y = vec![0f32; values(&x).len()];
    let tasks = y.par_chunks_mut(CHUNK).zip(values(&x).par_chunks(CHUNK));
    tasks.for_each(|(y, x)| {
        simd(
            #[inline(always)]
            || {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = x * A::gate(x);
                }
            },
        )
    });
    (tensor(y, x.layout().shape().clone()), x)
}

/// The gradient of `x`.
pub fn backward<A: Activation>(x: &FlexTensor, grad: FlexTensor) -> FlexTensor {
    let mut grad = owned(grad);
    let grads = grad.storage_mut::<f32>().par_chunks_mut(CHUNK);
    let tasks = grads.zip(values(x).par_chunks(CHUNK));
    tasks.for_each(|(grad, x)| {
        simd(
            #[inline(always)]
            || {
                for (grad, &x) in grad.iter_mut().zip(x) {
                    *grad *= A::derivative(x);
                }
            },
        )
    });
    grad
}
