//! The image autoencoder (AutoencoderKL): pixels to latents and back.
//!
//! Fields carry diffusers' names. The number of levels, blocks and channels is the configuration's.
//!
//! Source: diffusers 0.38 `autoencoder_kl.py`, `vae.py`; black-forest-labs/flux `modules/autoencoder.py` (802fb47).

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{GroupNorm, GroupNormConfig, Linear, PaddingConfig2d};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::layers::{linear_layer, packed};
use crate::ops::attention::attention;
use crate::ops::conv::{Then, conv2d, conv2d_of_doubled, conv2d_then};
use crate::ops::group_norm::{group_norm, group_norm_silu};
use crate::sizes::out_of_range;
use crate::tiles::{TILE_PX, by_tiles};

/// Of every group norm in this network.
const EPS: f64 = 1e-6;

/// Image autoencoder. Source: diffusers `AutoencoderKL.__init__`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderConfig {
    /// Channels of an image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// Channels per level, full resolution first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per encoder level; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Latents are `(z - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift_factor: Option<f64>,
    /// 1x1 convolution after the encoder (not in FLUX).
    pub use_quant_conv: bool,
    /// 1x1 convolution before the decoder (not in FLUX).
    pub use_post_quant_conv: bool,
    /// Attention in the middle block.
    pub mid_block_add_attention: bool,
}

impl Default for AutoencoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl AutoencoderConfig {
    /// The autoencoder of every FLUX.1 model.
    pub fn flux() -> Self {
        Self {
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            scaling_factor: 0.3611,
            shift_factor: Some(0.1159),
            use_quant_conv: false,
            use_post_quant_conv: false,
            ..Self::default()
        }
    }

    /// Pixels per latent element and side.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        if self.block_out_channels.is_empty() || self.block_out_channels.len() > 8 {
            return Some("`block_out_channels` must name one to eight levels".into());
        }
        let mut sizes = vec![
            ("norm_num_groups", self.norm_num_groups),
            ("latent_channels", self.latent_channels),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
        ];
        sizes.extend(
            self.block_out_channels
                .iter()
                .map(|&channels| ("block_out_channels", channels)),
        );
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if let Some(channels) = self
            .block_out_channels
            .iter()
            .find(|channels| !channels.is_multiple_of(self.norm_num_groups))
        {
            return Some(format!(
                "{channels} channels cannot be split into {} groups",
                self.norm_num_groups
            ));
        }
        if self.layers_per_block == 0 || self.layers_per_block > 100 {
            return Some("`layers_per_block` is out of range".into());
        }
        let usable = self.scaling_factor.is_finite()
            && self.scaling_factor != 0.0
            && self.shift_factor.is_none_or(f64::is_finite);
        (!usable).then(|| "`scaling_factor` or `shift_factor` is not usable".into())
    }
}

/// The autoencoder.
#[derive(Module, Debug)]
pub struct Autoencoder {
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    #[module(skip)]
    config: AutoencoderConfig,
}

/// What the encoder says about an image: a diagonal normal distribution over latents, `[batch, latent_channels, h, w]`.
#[derive(Debug, Clone)]
pub struct LatentDistribution {
    /// Mean.
    pub mean: Tensor<4>,
    /// Logarithm of the variance, clamped to `[-30, 20]`.
    pub logvar: Tensor<4>,
}

impl LatentDistribution {
    /// Splits the encoder's output `[batch, 2 * latent_channels, h, w]`, mean and log-variance.
    pub(crate) fn new(moments: Tensor<4>) -> Self {
        let channels = moments.dims()[1] / 2;
        Self {
            mean: moments.clone().narrow(1, 0, channels),
            logvar: moments.narrow(1, channels, channels).clamp(-30.0, 20.0),
        }
    }

    /// Standard deviation.
    pub fn std(&self) -> Tensor<4> {
        self.logvar.clone().mul_scalar(0.5).exp()
    }
}

impl Autoencoder {
    /// A network with lazily initialised weights.
    pub fn new(config: &AutoencoderConfig, device: &Device) -> Self {
        let latent = config.latent_channels;
        let pointwise = |channels| conv(channels, channels, 1, device);
        Self {
            encoder: Encoder::new(config, device),
            decoder: Decoder::new(config, device),
            quant_conv: config.use_quant_conv.then(|| pointwise(2 * latent)),
            post_quant_conv: config.use_post_quant_conv.then(|| pointwise(latent)),
            config: config.clone(),
        }
    }

    /// The architecture.
    pub fn config(&self) -> &AutoencoderConfig {
        &self.config
    }

    /// # Shapes
    /// - `image`: `[batch, 3, height, width]` in `[-1, 1]`; returns `[batch, 2 * latent_channels, height / 8, width / 8]`,
    ///   mean and log-variance
    pub fn moments(&self, image: Tensor<4>) -> Tensor<4> {
        let downscale = self.config.downscale();
        moments(&self.encoder, self.quant_conv.as_ref(), downscale, image)
    }

    /// Encodes an image, as [`moments`](Self::moments), and splits the result.
    pub fn encode(&self, image: Tensor<4>) -> LatentDistribution {
        LatentDistribution::new(self.moments(image))
    }

    /// # Shapes
    /// - `z`: `[batch, latent_channels, h, w]`; returns `[batch, 3, 8 h, 8 w]`, roughly in `[-1, 1]`
    pub fn decode(&self, z: Tensor<4>) -> Tensor<4> {
        let downscale = self.config.downscale();
        decoded(&self.decoder, self.post_quant_conv.as_ref(), downscale, z)
    }

    /// From the autoencoder's latents to those the transformer sees: `(z - shift) * scale`.
    pub fn to_model_space(&self, z: Tensor<4>) -> Tensor<4> {
        (z - self.config.shift_factor.unwrap_or(0.0)) * self.config.scaling_factor
    }

    /// The inverse of [`to_model_space`](Self::to_model_space).
    pub fn from_model_space(&self, latents: Tensor<4>) -> Tensor<4> {
        latents / self.config.scaling_factor + self.config.shift_factor.unwrap_or(0.0)
    }
}

/// What an encoder and the convolution behind it make of an image, tile by tile.
pub(crate) fn moments(
    encoder: &Encoder,
    quant_conv: Option<&Conv2d>,
    downscale: usize,
    image: Tensor<4>,
) -> Tensor<4> {
    by_tiles(image, TILE_PX, TILE_PX / downscale, |tile| {
        let moments = encoder.forward(tile);
        match quant_conv {
            Some(conv) => conv2d(conv, moments),
            None => moments,
        }
    })
}

/// What a decoder and the convolution before it make of latents, tile by tile.
pub(crate) fn decoded(
    decoder: &Decoder,
    post_quant_conv: Option<&Conv2d>,
    downscale: usize,
    z: Tensor<4>,
) -> Tensor<4> {
    by_tiles(z, TILE_PX / downscale, TILE_PX, |tile| {
        let tile = match post_quant_conv {
            Some(conv) => conv2d(conv, tile),
            None => tile,
        };
        decoder.forward(tile)
    })
}

pub(crate) fn conv(inputs: usize, outputs: usize, kernel: usize, device: &Device) -> Conv2d {
    let pad = kernel / 2;
    Conv2dConfig::new([inputs, outputs], [kernel, kernel])
        .with_padding(PaddingConfig2d::Explicit(pad, pad, pad, pad))
        .init(device)
}

fn norm(channels: usize, groups: usize, device: &Device) -> GroupNorm {
    GroupNormConfig::new(groups, channels)
        .with_epsilon(EPS)
        .init(device)
}

#[derive(Module, Debug)]
struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    fn new(inputs: usize, outputs: usize, groups: usize, device: &Device) -> Self {
        Self {
            norm1: norm(inputs, groups, device),
            conv1: conv(inputs, outputs, 3, device),
            norm2: norm(outputs, groups, device),
            conv2: conv(outputs, outputs, 3, device),
            conv_shortcut: (inputs != outputs).then(|| conv(inputs, outputs, 1, device)),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let hidden = conv2d(&self.conv1, group_norm_silu(&self.norm1, x.clone()));
        let hidden = group_norm_silu(&self.norm2, hidden);
        let plus = match &self.conv_shortcut {
            Some(shortcut) => conv2d(shortcut, x),
            None => x,
        };
        let then = Then {
            plus: Some(plus),
            relu: false,
        };
        conv2d_then(&self.conv2, hidden, then)
    }
}

/// Attention with one head over all positions.
#[derive(Module, Debug)]
struct AttentionBlock {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: [Linear; 1],
}

impl AttentionBlock {
    fn new(channels: usize, groups: usize, device: &Device) -> Self {
        let square = || linear_layer(channels, channels, true, device);
        Self {
            group_norm: norm(channels, groups, device),
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: [square()],
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let tokens = group_norm(&self.group_norm, x.clone())
            .reshape([batch, channels, height * width])
            .swap_dims(1, 2);
        let head = |layer: &Linear| layer.forward(tokens.clone()).unsqueeze_dim::<4>(1); // (b, 1 head, tokens, c)
        let (q, k, v) = (head(&self.to_q), head(&self.to_k), head(&self.to_v));
        let out = attention(q, k, v, 1.0 / (channels as f64).sqrt(), None);
        let out = self.to_out[0]
            .forward(out)
            .swap_dims(1, 2)
            .reshape([batch, channels, height, width]);
        x + packed(out) // the next norm reduces it
    }
}

#[derive(Module, Debug)]
struct MidBlock {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<AttentionBlock>,
}

impl MidBlock {
    fn new(channels: usize, config: &AutoencoderConfig, device: &Device) -> Self {
        let groups = config.norm_num_groups;
        let attentions = usize::from(config.mid_block_add_attention);
        Self {
            resnets: (0..2)
                .map(|_| ResnetBlock::new(channels, channels, groups, device))
                .collect(),
            attentions: (0..attentions)
                .map(|_| AttentionBlock::new(channels, groups, device))
                .collect(),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.resnets[0].forward(x);
        let x = self
            .attentions
            .iter()
            .fold(x, |x, attention| attention.forward(x));
        self.resnets[1].forward(x)
    }
}

/// Halves the sides: a convolution of stride 2, with zeros on the right and at the bottom.
#[derive(Module, Debug)]
struct Downsample {
    conv: Conv2d,
}

impl Downsample {
    fn new(channels: usize, device: &Device) -> Self {
        let conv = Conv2dConfig::new([channels, channels], [3, 3])
            .with_stride([2, 2])
            .with_padding(PaddingConfig2d::Explicit(0, 0, 1, 1))
            .init(device);
        Self { conv }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        conv2d(&self.conv, x)
    }
}

/// Doubles the sides: nearest neighbour, then a convolution.
#[derive(Module, Debug)]
struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        conv2d_of_doubled(&self.conv, x)
    }
}

#[derive(Module, Debug)]
struct DownBlock {
    resnets: Vec<ResnetBlock>,
    downsamplers: Vec<Downsample>,
}

#[derive(Module, Debug)]
struct UpBlock {
    resnets: Vec<ResnetBlock>,
    upsamplers: Vec<Upsample>,
}

/// A run of residual blocks of which the first changes the channels.
fn resnets(
    count: usize,
    inputs: usize,
    outputs: usize,
    groups: usize,
    device: &Device,
) -> Vec<ResnetBlock> {
    (0..count)
        .map(|i| {
            ResnetBlock::new(
                if i == 0 { inputs } else { outputs },
                outputs,
                groups,
                device,
            )
        })
        .collect()
}

/// Pixels to moments.
#[derive(Module, Debug)]
pub(crate) struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(crate) fn new(config: &AutoencoderConfig, device: &Device) -> Self {
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let last = channels.len() - 1;
        let down_blocks = (0..=last)
            .map(|level| DownBlock {
                resnets: resnets(
                    config.layers_per_block,
                    channels[level.saturating_sub(1)],
                    channels[level],
                    groups,
                    device,
                ),
                downsamplers: if level < last {
                    vec![Downsample::new(channels[level], device)]
                } else {
                    Vec::new()
                },
            })
            .collect();
        Self {
            conv_in: conv(config.in_channels, channels[0], 3, device),
            down_blocks,
            mid_block: MidBlock::new(channels[last], config, device),
            conv_norm_out: norm(channels[last], groups, device),
            conv_out: conv(channels[last], 2 * config.latent_channels, 3, device),
        }
    }

    pub(crate) fn forward(&self, image: Tensor<4>) -> Tensor<4> {
        let mut x = conv2d(&self.conv_in, image);
        for block in &self.down_blocks {
            x = block.resnets.iter().fold(x, |x, resnet| resnet.forward(x));
            x = block.downsamplers.iter().fold(x, |x, down| down.forward(x));
        }
        let x = self.mid_block.forward(x);
        conv2d(&self.conv_out, group_norm_silu(&self.conv_norm_out, x))
    }
}

/// Latents to pixels.
#[derive(Module, Debug)]
pub(crate) struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub(crate) fn new(config: &AutoencoderConfig, device: &Device) -> Self {
        let groups = config.norm_num_groups;
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let last = channels.len() - 1;
        let up_blocks = (0..=last)
            .map(|level| UpBlock {
                resnets: resnets(
                    config.layers_per_block + 1,
                    channels[level.saturating_sub(1)],
                    channels[level],
                    groups,
                    device,
                ),
                upsamplers: if level < last {
                    vec![Upsample {
                        conv: conv(channels[level], channels[level], 3, device),
                    }]
                } else {
                    Vec::new()
                },
            })
            .collect();
        Self {
            conv_in: conv(config.latent_channels, channels[0], 3, device),
            mid_block: MidBlock::new(channels[0], config, device),
            up_blocks,
            conv_norm_out: norm(channels[last], groups, device),
            conv_out: conv(channels[last], config.out_channels, 3, device),
        }
    }

    pub(crate) fn forward(&self, z: Tensor<4>) -> Tensor<4> {
        let mut x = self.mid_block.forward(conv2d(&self.conv_in, z));
        for block in &self.up_blocks {
            x = block.resnets.iter().fold(x, |x, resnet| resnet.forward(x));
            x = block.upsamplers.iter().fold(x, |x, up| up.forward(x));
        }
        conv2d(&self.conv_out, group_norm_silu(&self.conv_norm_out, x))
    }
}
