//! From noise level, guidance and pooled text to the vectors that steer a block.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use lora_core::linear;

use crate::layers::linear_layer;
use crate::ops::silu::silu;

/// Two linear layers with SiLU between.
///
/// # Source
/// diffusers 0.38 `TimestepEmbedding`, `PixArtAlphaTextProjection`.
#[derive(Module, Debug)]
pub(crate) struct Embedder {
    linear_1: Linear,
    linear_2: Linear,
}

impl Embedder {
    pub(crate) fn new(inputs: usize, hidden: usize, bias: bool, device: &Device) -> Self {
        Self {
            linear_1: linear_layer(inputs, hidden, bias, device),
            linear_2: linear_layer(hidden, hidden, bias, device),
        }
    }

    /// # Shapes
    /// - `x`: `[batch, inputs]`; returns `[batch, hidden]`
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        linear(&self.linear_2, silu(linear(&self.linear_1, x)))
    }
}

/// Makes vectors of shift, scale and gate from the activated conditioning: the linear layer of an adaptive layer norm.
#[derive(Module, Debug)]
pub(crate) struct Modulation {
    linear: Linear,
}

impl Modulation {
    /// For `count` vectors.
    pub(crate) fn new(hidden: usize, count: usize, bias: bool, device: &Device) -> Self {
        Self {
            linear: linear_layer(hidden, count * hidden, bias, device),
        }
    }

    /// The vectors behind one another, for [`vectors`].
    ///
    /// # Shapes
    /// - `activated`: `[batch, hidden]`; returns `[batch, count * hidden]`
    pub(crate) fn forward(&self, activated: Tensor<2>) -> Tensor<2> {
        linear(&self.linear, activated)
    }
}

/// `[batch, N * hidden]` to N times `[batch, 1, hidden]`.
pub(crate) fn vectors<const N: usize>(modulation: Tensor<2>) -> [Tensor<3>; N] {
    let modulation = modulation.unsqueeze_dim::<3>(1);
    let hidden = modulation.dims()[2] / N;
    std::array::from_fn(|i| modulation.clone().narrow(2, i * hidden, hidden))
}
