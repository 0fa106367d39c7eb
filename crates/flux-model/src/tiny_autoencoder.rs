//! The tiny image autoencoder (TAEF1, diffusers' AutoencoderTiny): convolutions alone, for quick previews.
//!
//! Its latents are those that the transformer sees, without noise: it says no variance.
//!
//! Source: diffusers 0.38 `autoencoder_tiny.py`, `vae.py` (`EncoderTiny`, `DecoderTiny`), `unet_2d_blocks.py`.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{PaddingConfig2d, Relu};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::autoencoder::conv;
use crate::ops::conv::{Then, conv2d, conv2d_of_doubled, conv2d_then, doubled};
use crate::sizes::out_of_range;

/// Latents are clamped softly to this before they are decoded.
const LATENT_BOUND: f64 = 3.0;

/// Source: diffusers `AutoencoderTiny.__init__`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TinyAutoencoderConfig {
    /// Channels of an image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// Channels per level of the encoder, full resolution first.
    pub encoder_block_out_channels: Vec<usize>,
    /// Channels per level of the decoder, full resolution last.
    pub decoder_block_out_channels: Vec<usize>,
    /// Between convolutions; only "relu".
    pub act_fn: String,
    /// How the decoder enlarges; only "nearest".
    pub upsample_fn: String,
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Enlargement from level to level; only 2.
    pub upsampling_scaling_factor: usize,
    /// Residual blocks per level of the encoder.
    pub num_encoder_blocks: Vec<usize>,
    /// Residual blocks per level of the decoder.
    pub num_decoder_blocks: Vec<usize>,
    /// Latents are `(z - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift_factor: f64,
}

impl Default for TinyAutoencoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            act_fn: "relu".into(),
            upsample_fn: "nearest".into(),
            latent_channels: 4,
            upsampling_scaling_factor: 2,
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            scaling_factor: 1.0,
            shift_factor: 0.0,
        }
    }
}

impl TinyAutoencoderConfig {
    /// TAEF1, for every FLUX.1 model.
    pub fn taef1() -> Self {
        Self {
            latent_channels: 16,
            ..Self::default()
        }
    }

    /// Pixels per latent element and side.
    pub fn downscale(&self) -> usize {
        1 << (self.num_encoder_blocks.len() - 1)
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        for (key, value, known) in [
            ("act_fn", self.act_fn.as_str(), "relu"),
            ("upsample_fn", self.upsample_fn.as_str(), "nearest"),
        ] {
            if value != known {
                return Some(format!(
                    "`{key}` is \"{value}\", and only \"{known}\" is read"
                ));
            }
        }
        if self.upsampling_scaling_factor != 2 {
            return Some(format!(
                "`upsampling_scaling_factor` is {}, not 2",
                self.upsampling_scaling_factor
            ));
        }
        let levels = self.num_encoder_blocks.len();
        let counts = [
            self.num_decoder_blocks.len(),
            self.encoder_block_out_channels.len(),
            self.decoder_block_out_channels.len(),
        ];
        if !(1..=8).contains(&levels) || counts.iter().any(|count| *count != levels) {
            return Some(
                "blocks and channels of encoder and decoder must be of the same one to eight levels"
                    .into(),
            );
        }
        let blocks = self
            .num_encoder_blocks
            .iter()
            .chain(&self.num_decoder_blocks);
        if blocks.into_iter().any(|count| *count > 100) {
            return Some("a level has more than 100 blocks".into());
        }
        // A convolution inside a level keeps its channels, so the next level cannot have others.
        for (key, channels) in [
            (
                "encoder_block_out_channels",
                &self.encoder_block_out_channels,
            ),
            (
                "decoder_block_out_channels",
                &self.decoder_block_out_channels,
            ),
        ] {
            if channels.windows(2).any(|pair| pair[0] != pair[1]) {
                return Some(format!("`{key}` must be the same at every level"));
            }
        }
        let sizes = [
            ("latent_channels", self.latent_channels),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            (
                "encoder_block_out_channels",
                self.encoder_block_out_channels[0],
            ),
            (
                "decoder_block_out_channels",
                self.decoder_block_out_channels[0],
            ),
        ];
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        let usable = self.scaling_factor.is_finite()
            && self.scaling_factor != 0.0
            && self.shift_factor.is_finite();
        (!usable).then(|| "`scaling_factor` or `shift_factor` is not usable".into())
    }
}

/// The autoencoder.
#[derive(Module, Debug)]
pub struct TinyAutoencoder {
    encoder: Layers,
    decoder: Layers,
    #[module(skip)]
    config: TinyAutoencoderConfig,
}

impl TinyAutoencoder {
    /// A network with lazily initialised weights.
    pub fn new(config: &TinyAutoencoderConfig, device: &Device) -> Self {
        Self {
            encoder: Layers::encoder(config, device),
            decoder: Layers::decoder(config, device),
            config: config.clone(),
        }
    }

    /// The architecture.
    pub fn config(&self) -> &TinyAutoencoderConfig {
        &self.config
    }

    /// # Shapes
    /// - `image`: `[batch, 3, height, width]` in `[-1, 1]`; returns `[batch, latent_channels, height / 8, width / 8]`
    pub fn encode(&self, image: Tensor<4>) -> Tensor<4> {
        self.encoder.forward((image + 1.0) / 2.0)
    }

    /// # Shapes
    /// - `z`: `[batch, latent_channels, h, w]`; returns `[batch, 3, 8 h, 8 w]`, roughly in `[-1, 1]`
    pub fn decode(&self, z: Tensor<4>) -> Tensor<4> {
        let z = (z / LATENT_BOUND).tanh() * LATENT_BOUND;
        self.decoder.forward(z) * 2.0 - 1.0
    }

    /// From the autoencoder's latents to those the transformer sees: `(z - shift) * scale`.
    pub fn to_model_space(&self, z: Tensor<4>) -> Tensor<4> {
        (z - self.config.shift_factor) * self.config.scaling_factor
    }

    /// The inverse of [`to_model_space`](Self::to_model_space).
    pub fn from_model_space(&self, latents: Tensor<4>) -> Tensor<4> {
        latents / self.config.scaling_factor + self.config.shift_factor
    }
}

/// Layers one after the other, numbered as in diffusers.
#[derive(Module, Debug)]
struct Layers {
    layers: Vec<Layer>,
}

#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "most of them are the large one")]
enum Layer {
    Conv(Conv2d),
    Block(TinyBlock),
    Relu(Relu),
    Double(Double),
}

/// Doubles the sides: nearest neighbour.
#[derive(Module, Debug)]
struct Double;

impl Layers {
    fn encoder(config: &TinyAutoencoderConfig, device: &Device) -> Self {
        let channels = config.encoder_block_out_channels[0];
        let mut layers = Vec::new();
        for (level, &blocks) in config.num_encoder_blocks.iter().enumerate() {
            let entry = match level {
                0 => conv(config.in_channels, channels, 3, device),
                _ => plain_conv(channels, 2, device),
            };
            layers.push(Layer::Conv(entry));
            layers.extend((0..blocks).map(|_| Layer::Block(TinyBlock::new(channels, device))));
        }
        let exit = conv(channels, config.latent_channels, 3, device);
        layers.push(Layer::Conv(exit));
        Self { layers }
    }

    fn decoder(config: &TinyAutoencoderConfig, device: &Device) -> Self {
        let channels = config.decoder_block_out_channels[0];
        let entry = conv(config.latent_channels, channels, 3, device);
        let mut layers = vec![Layer::Conv(entry), Layer::Relu(Relu::new())];
        let last = config.num_decoder_blocks.len() - 1;
        for (level, &blocks) in config.num_decoder_blocks.iter().enumerate() {
            layers.extend((0..blocks).map(|_| Layer::Block(TinyBlock::new(channels, device))));
            if level < last {
                layers.push(Layer::Double(Double));
                layers.push(Layer::Conv(plain_conv(channels, 1, device)));
            } else {
                layers.push(Layer::Conv(conv(channels, config.out_channels, 3, device)));
            }
        }
        Self { layers }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        forward(&self.layers, x)
    }
}

/// One layer after the other, or two where one operation does both.
fn forward(layers: &[Layer], x: Tensor<4>) -> Tensor<4> {
    let (x, rest) = match layers {
        [] => return x,
        [Layer::Conv(conv), Layer::Relu(_), rest @ ..] => {
            let then = Then {
                relu: true,
                ..Then::default()
            };
            (conv2d_then(conv, x, then), rest)
        }
        [Layer::Double(_), Layer::Conv(conv), rest @ ..] => (conv2d_of_doubled(conv, x), rest),
        [Layer::Conv(conv), rest @ ..] => (conv2d(conv, x), rest),
        [Layer::Block(block), rest @ ..] => (block.forward(x), rest),
        [Layer::Relu(_), rest @ ..] => (relu(x), rest),
        [Layer::Double(_), rest @ ..] => (doubled(x), rest),
    };
    forward(rest, x)
}

/// A convolution between levels, without bias.
fn plain_conv(channels: usize, stride: usize, device: &Device) -> Conv2d {
    Conv2dConfig::new([channels, channels], [3, 3])
        .with_stride([stride, stride])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .with_bias(false)
        .init(device)
}

/// Three convolutions beside the identity. Those in `conv` have the numbers 0, 2 and 4.
#[derive(Module, Debug)]
struct TinyBlock {
    conv: Vec<Layer>,
}

impl TinyBlock {
    fn new(channels: usize, device: &Device) -> Self {
        let layer = || Layer::Conv(conv(channels, channels, 3, device));
        let between = || Layer::Relu(Relu::new());
        Self {
            conv: vec![layer(), between(), layer(), between(), layer()],
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        match &self.conv[..] {
            [first @ .., Layer::Conv(last)] => {
                let then = Then {
                    plus: Some(x.clone()),
                    relu: true,
                };
                conv2d_then(last, forward(first, x), then)
            }
            layers => relu(forward(layers, x.clone()) + x),
        }
    }
}
