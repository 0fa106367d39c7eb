//! LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353) and the bias of the up projection.

use burn::tensor::Tensor;

use crate::kinds::factors::{Factor, Factors, Layer};
use crate::kinds::parts::{INITIAL_A, INITIAL_B, LORA_A, LORA_B, LORA_BIAS, MAGNITUDE};
use crate::ops::matmul::{matmul, times};

/// `B A`, less where it started, `[out, in]`.
pub(super) fn delta(factors: &Factors<Factor>) -> Tensor<2> {
    let now = matmul(factors[LORA_B].matrix(), factors[LORA_A].matrix());
    match (factors.get(INITIAL_A), factors.get(INITIAL_B)) {
        (Some(a), Some(b)) => now - matmul(b.matrix(), a.matrix()),
        _ => now,
    }
}

/// Source: PEFT `lora.Linear.forward`, `DoraLinearLayer.forward`.
pub(super) fn forward<const D: usize>(
    factors: &Factors<Factor>,
    scale: f64,
    layer: Layer<D>,
    result: Tensor<D>,
) -> Tensor<D> {
    let Layer {
        x,
        base,
        bias,
        mask,
    } = layer;
    let through = |x: Tensor<D>, a: &Factor, b: &Factor, bias: Option<Tensor<1>>| {
        let hidden = times(x, a.matrix().transpose(), None);
        times(hidden, b.matrix().transpose(), bias).mul_scalar(scale)
    };
    // What the adapter started from is a part of the base weight: no dropout.
    let less_start =
        |x: Tensor<D>, result: Tensor<D>| match (factors.get(INITIAL_A), factors.get(INITIAL_B)) {
            (Some(a), Some(b)) => result - through(x, a, b, None),
            _ => result,
        };
    let result = less_start(x.clone(), result);
    let dropped = mask.is_some();
    let x = match mask {
        Some(mask) => x * mask,
        None => x,
    };
    let lora_bias = factors.get(LORA_BIAS).map(Factor::vector);
    let update = through(x.clone(), &factors[LORA_A], &factors[LORA_B], lora_bias);
    let Some(magnitude) = factors.get(MAGNITUDE) else {
        return result + update;
    };
    let delta = delta(factors).mul_scalar(scale);
    let base = base.cast(delta.dtype());
    let direction = base.clone().inner() + delta.inner().transpose();
    let norm = direction.square().sum_dim(0).sqrt(); // [1, out], a constant for the gradient
    let norm = Tensor::<2>::from_inner(norm).flatten::<1>(0, 1);
    let factor: Tensor<D> = (magnitude.vector() / norm).unsqueeze();
    let unadapted = match (dropped, bias) {
        (true, _) => less_start(x.clone(), times(x, base, None)),
        (false, Some(bias)) => result.clone() - bias.unsqueeze(),
        (false, None) => result.clone(),
    };
    result + (factor.clone() - 1.0) * unadapted + factor * update
}

/// The weight that a LoRA with the change `delta` makes of `weight`, both `[in, out]`: DoRA scales every output of the sum,
/// by a norm that is taken over `base`, the weight without any adapter.
pub(crate) fn changed(
    factors: &Factors<Factor>,
    weight: Tensor<2>,
    delta: Tensor<2>,
    base: &Tensor<2>,
) -> Tensor<2> {
    let Some(magnitude) = factors.get(MAGNITUDE) else {
        return weight + delta;
    };
    let direction = (base.clone() + delta.clone()).detach();
    let norm = direction.square().sum_dim(0).sqrt();
    let factor = magnitude.vector().unsqueeze::<2>() / norm;
    (weight + delta) * factor
}
