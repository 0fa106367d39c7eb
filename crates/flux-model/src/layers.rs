//! Pieces the networks share: norms, rotary positions, the sinusoidal embedding.
//!
//! Everything here runs in f32 but for what comes and goes through `in_f32`, and reductions see contiguous input only (see [`packed`]).

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, Tensor, TensorData};

/// A linear layer with lazily initialised weights.
pub(crate) fn linear_layer(inputs: usize, outputs: usize, bias: bool, device: &Device) -> Linear {
    LinearConfig::new(inputs, outputs)
        .with_bias(bias)
        .init(device)
}

/// A row-major copy, unless `x` is row-major already.
///
/// On cubecl backends (wgpu seen, CUDA by source) Burn 0.22.1 can reduce a permuted tensor of rank 4 and more to wrong
/// numbers, without an error. Reshaping to one dimension is what makes a real copy; on a contiguous tensor both reshapes
/// are free.
pub fn packed<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let shape = x.dims();
    x.reshape([shape.iter().product::<usize>()]).reshape(shape)
}

/// `f(x)` computed in f32, in the type of `x`; the casts are free where that is f32.
pub(crate) fn in_f32<const D: usize>(
    x: Tensor<D>,
    f: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    let dtype = x.dtype();
    f(x.cast(DType::F32)).cast(dtype)
}

/// Layer norm over the last dimension, without scale and shift.
pub fn layer_norm<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    let centered = x.clone() - x.mean_dim(D - 1);
    let variance = centered.clone().square().mean_dim(D - 1);
    centered / (variance + eps).sqrt()
}

/// One stream of tokens and its norm.
#[derive(Debug, Clone)]
pub struct Stream {
    /// `[batch, tokens, heads * head_dim]`.
    pub x: Tensor<3>,
    /// Weight, `[head_dim]`.
    pub norm: Tensor<1>,
    /// Added to the mean square.
    pub eps: f64,
}

/// `x / rms(x) * weight` over the last dimension.
#[derive(Module, Debug)]
pub struct RmsNorm {
    weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

impl RmsNorm {
    /// A norm over `width` elements.
    pub fn new(width: usize, eps: f64, device: &Device) -> Self {
        let weight = Param::uninitialized(
            burn::module::ParamId::new(),
            move |device, _| Tensor::ones([width], device),
            device.clone(),
            false,
            [width].into(),
        );
        Self { weight, eps }
    }

    /// # Shapes
    /// - `x`: `[..., width]`, unchanged
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms_norm(x, self.weight.val(), self.eps)
    }

    /// Tokens whose heads this norm is for.
    pub(crate) fn stream(&self, x: Tensor<3>) -> Stream {
        Stream {
            x,
            norm: self.weight.val(),
            eps: self.eps,
        }
    }
}

/// `x / rms(x) * weight` over the last dimension.
pub(crate) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let mean_square = x.clone().square().mean_dim(D - 1);
    x / (mean_square + eps).sqrt() * weight.unsqueeze()
}

/// Cosines and sines of the rotary position embedding, `[tokens, head_dim / 2]` each.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    /// `cos(position * frequency)`.
    pub cos: Tensor<2>,
    /// `sin(position * frequency)`.
    pub sin: Tensor<2>,
}

impl RotaryTable {
    /// The table for `positions`, with `axes` rotary dimensions for each of their coordinates; angles in f64.
    ///
    /// # Source
    /// diffusers `FluxPosEmbed`, `get_1d_rotary_pos_embed` (interleaved pairs).
    pub fn new<const N: usize>(
        positions: &[[f32; N]],
        axes: &[usize],
        theta: f64,
        device: &Device,
    ) -> Self {
        let half: usize = axes.iter().sum::<usize>() / 2;
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for (&coordinate, &dims) in position.iter().zip(axes) {
                for pair in 0..dims / 2 {
                    let frequency = theta.powf(-2.0 * pair as f64 / dims as f64);
                    let (s, c) = (f64::from(coordinate) * frequency).sin_cos();
                    cos.push(c as f32);
                    sin.push(s as f32);
                }
            }
        }
        let tensor =
            |values| Tensor::from_data(TensorData::new(values, [positions.len(), half]), device);
        Self {
            cos: tensor(cos),
            sin: tensor(sin),
        }
    }

    /// On the autodiff device, not tracked.
    pub(crate) fn lift(self) -> Self {
        Self {
            cos: self.cos.autodiff(),
            sin: self.sin.autodiff(),
        }
    }

    /// Off the autodiff device.
    pub(crate) fn inner(self) -> Self {
        Self {
            cos: self.cos.inner(),
            sin: self.sin.inner(),
        }
    }

    /// `1 / sqrt(head_dim)`: what attention multiplies scores with.
    pub(crate) fn scale(&self) -> f64 {
        1.0 / ((2 * self.cos.dims()[1]) as f64).sqrt()
    }
}

/// `[batch, tokens, heads * head_dim]` to `[batch, tokens, heads, head_dim]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, tokens, width] = x.dims();
    x.reshape([batch, tokens, heads, width / heads])
}

/// Sinusoidal embedding of `1000 * t`, `[batch, channels]`: cosines first.
///
/// The argument is rounded to f32 as diffusers does; cosine and sine are those of that argument.
///
/// # Source
/// diffusers `get_timestep_embedding(flip_sin_to_cos=True, downscale_freq_shift=0)`.
pub(crate) fn sinusoidal_embedding(t: &[f32], channels: usize, device: &Device) -> Tensor<2> {
    let half = channels / 2;
    let mut values = Vec::with_capacity(t.len() * 2 * half);
    for &t in t {
        let argument = t * 1000.0;
        let angles: Vec<f64> = (0..half)
            .map(|j| {
                let frequency =
                    f64::from(-(10000f64.ln() as f32) * j as f32 / half as f32).exp() as f32;
                f64::from(argument * frequency)
            })
            .collect();
        values.extend(angles.iter().map(|a| a.cos() as f32));
        values.extend(angles.iter().map(|a| a.sin() as f32));
    }
    Tensor::from_data(TensorData::new(values, [t.len(), 2 * half]), device)
}
