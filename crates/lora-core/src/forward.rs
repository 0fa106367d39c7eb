//! The fast path: a linear layer with adapters, without the dense sum.

use burn::nn::Linear;
use burn::tensor::{DType, Tensor};

use crate::adapter::Adapter;
use crate::adapters::Adapters;
use crate::ops::linear::linear_of;

/// `x W + b + sum of scale * (dropout(x) Aᵀ) Bᵀ` over the active adapters, or what the other kinds add.
///
/// Equals `layer.forward(x)` up to rounding, but neither forms `W + scale * B A` nor, in the backward pass, the gradient of
/// `W`. The first adapter, where it is a plain LoRA, is computed in one operation with the layer. A weight in few bits is
/// decoded as a whole only for what is none.
///
/// # Shapes
/// - `x`: `[..., in]`; returns `[..., out]`
pub fn linear<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    compute(layer, x, false)
}

/// [`linear`] for the last layer of a block, whose result is added to others, perhaps times a constant, and is read by nothing
/// else. Where the block is computed again for its gradients
/// ([`recompute`](crate::training::recompute)) nobody reads that sum, and the result is zero, with the gradients of what it
/// stands for.
///
/// # Shapes
/// - `x`: `[..., in]`; returns `[..., out]`
pub fn last_linear<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    compute(layer, x, true)
}

fn compute<const D: usize>(layer: &Linear, x: Tensor<D>, is_last: bool) -> Tensor<D> {
    let bias = layer.bias.as_ref().map(|bias| bias.val());
    let Some(adapters) = layer.weight.reparameterization::<Adapters>() else {
        return linear_of(x, layer.weight.base().into(), bias, None, is_last);
    };
    let weight = adapters.weight(layer.weight.base());
    let mut active = adapters.active().peekable();
    let low_rank = active
        .peek()
        .and_then(|first: &&Adapter| first.low_rank(&x));
    if low_rank.is_some() {
        active.next();
    }
    let is_last = is_last && active.peek().is_none();
    let result = linear_of(x.clone(), weight.clone(), bias.clone(), low_rank, is_last);
    if active.peek().is_none() {
        return result;
    }
    let base = weight.dense(&x.device());
    let dtype = x.dtype();
    let [x, result] = [x, result].map(|tensor| tensor.cast(DType::F32)); // free where it is
    let forward =
        |result, adapter: &Adapter| adapter.forward(x.clone(), base.clone(), bias.clone(), result);
    active.fold(result, forward).cast(dtype)
}
