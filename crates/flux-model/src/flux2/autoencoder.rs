//! The image autoencoder of FLUX.2 (AutoencoderKLFlux2): that of FLUX.1 with 1x1 convolutions at the latent, whose channels
//! are normalised by stored statistics instead of one scale and shift.
//!
//! Source: diffusers 0.38 `autoencoder_kl_flux2.py`; black-forest-labs/flux2 `autoencoder.py`.

use burn::module::{Module, Param, ParamId};
use burn::nn::conv::Conv2d;
use burn::tensor::{Device, Tensor};

use crate::autoencoder::{Decoder, Encoder, LatentDistribution, conv, decoded, moments};
use crate::flux2::config::Flux2AutoencoderConfig;
use crate::flux2::latent::{patchify, unpatchify};

/// The autoencoder.
#[derive(Module, Debug)]
pub struct Flux2Autoencoder {
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    bn: Statistics,
    #[module(skip)]
    config: Flux2AutoencoderConfig,
}

/// Mean and variance of every channel of the patches, `[4 * latent_channels]` each.
#[derive(Module, Debug)]
struct Statistics {
    running_mean: Param<Tensor<1>>,
    running_var: Param<Tensor<1>>,
}

impl Statistics {
    fn new(channels: usize, device: &Device) -> Self {
        let filled = |value: f32| {
            Param::uninitialized(
                ParamId::new(),
                move |device, _| Tensor::full([channels], value, device),
                device.clone(),
                false,
                [channels].into(),
            )
        };
        Self {
            running_mean: filled(0.0),
            running_var: filled(1.0),
        }
    }

    /// Mean and standard deviation, `[1, channels, 1, 1]` each.
    fn mean_and_std(&self, eps: f64) -> (Tensor<4>, Tensor<4>) {
        let channels = self.running_mean.dims()[0];
        let column = |values: Tensor<1>| values.reshape([1, channels, 1, 1]);
        (
            column(self.running_mean.val()),
            column((self.running_var.val() + eps).sqrt()),
        )
    }
}

impl Flux2Autoencoder {
    /// A network with lazily initialised weights.
    pub fn new(config: &Flux2AutoencoderConfig, device: &Device) -> Self {
        let latent = config.latent_channels;
        let pointwise = |channels| conv(channels, channels, 1, device);
        Self {
            encoder: Encoder::new(&config.encoder(), device),
            decoder: Decoder::new(&config.decoder(), device),
            quant_conv: config.use_quant_conv.then(|| pointwise(2 * latent)),
            post_quant_conv: config.use_post_quant_conv.then(|| pointwise(latent)),
            bn: Statistics::new(config.patch_channels(), device),
            config: config.clone(),
        }
    }

    /// The architecture.
    pub fn config(&self) -> &Flux2AutoencoderConfig {
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

    /// From the autoencoder's latents to those the transformer sees: 2x2 patches as channels, each channel normalised.
    ///
    /// # Shapes
    /// - `z`: `[batch, latent_channels, 2 h, 2 w]`; returns `[batch, 4 * latent_channels, h, w]`
    pub fn to_model_space(&self, z: Tensor<4>) -> Tensor<4> {
        let (mean, std) = self.bn.mean_and_std(self.config.batch_norm_eps);
        (patchify(z) - mean) / std
    }

    /// The inverse of [`to_model_space`](Self::to_model_space).
    pub fn from_model_space(&self, latents: Tensor<4>) -> Tensor<4> {
        let (mean, std) = self.bn.mean_and_std(self.config.batch_norm_eps);
        unpatchify(latents * std + mean)
    }
}
