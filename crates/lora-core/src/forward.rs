//! The fast path: a linear layer with adapters, without the dense sum.

use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::adapter::Lora;

/// `x W + b + sum of scale * (dropout(x) Aᵀ) Bᵀ` over the active adapters, or what the other kinds add.
///
/// Equals `layer.forward(x)` up to rounding, but neither forms `W + scale * B A` nor, in the backward pass, the gradient of
/// `W`. A layer without adapters is computed as always.
///
/// # Shapes
/// - `x`: `[..., in]`; returns `[..., out]`
pub fn linear<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    use burn::tensor::module::linear as plain;
    let bias = layer.bias.as_ref().map(|bias| bias.val());
    let lora = layer.weight.reparameterization::<Lora>();
    let base = match lora {
        None => layer.weight.base(),
        Some(lora) => lora.replaced(layer.weight.base()),
    };
    let result = plain(x.clone(), base.clone(), bias.clone());
    match lora {
        None => result,
        Some(lora) => lora.active().fold(result, |result, adapter| {
            adapter.forward(x.clone(), base.clone(), bias.clone(), result)
        }),
    }
}
