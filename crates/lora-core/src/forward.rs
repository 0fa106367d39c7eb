//! The fast path: a linear layer with adapters, without the dense sum.

use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::adapter::Adapter;
use crate::adapters::Adapters;
use crate::ops::linear::linear as frozen_linear;

/// `x W + b + sum of scale * (dropout(x) Aᵀ) Bᵀ` over the active adapters, or what the other kinds add.
///
/// Equals `layer.forward(x)` up to rounding, but neither forms `W + scale * B A` nor, in the backward pass, the gradient of
/// `W`. The first adapter, where it is a plain LoRA, is computed in one operation with the layer. A weight in few bits is
/// decoded as a whole only for what is none.
///
/// # Shapes
/// - `x`: `[..., in]`; returns `[..., out]`
pub fn linear<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    let bias = layer.bias.as_ref().map(|bias| bias.val());
    let Some(adapters) = layer.weight.reparameterization::<Adapters>() else {
        return frozen_linear(x, layer.weight.base(), bias, None);
    };
    let weight = adapters.weight(layer.weight.base());
    let mut active = adapters.active().peekable();
    let low_rank = active
        .peek()
        .and_then(|first: &&Adapter| first.low_rank(&x));
    if low_rank.is_some() {
        active.next();
    }
    let result = frozen_linear(x.clone(), weight.clone(), bias.clone(), low_rank);
    if active.peek().is_none() {
        return result;
    }
    let base = weight.dense(&x.device());
    active.fold(result, |result, adapter| {
        adapter.forward(x.clone(), base.clone(), bias.clone(), result)
    })
}
