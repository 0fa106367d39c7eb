//! Text to image: embeddings and a seed in, an image out.

use burn::tensor::{Device, Tensor, TensorData};
use flux_model::WeightsError;
use flux_model::family::{Condition, Family};
use flux_model::sampler::{Denoise, Step};
use image::RgbImage;
use lora_core::random::Stream;
use lora_core::state::host_tensor;

/// What an image is made with, besides the prompt.
#[derive(Debug, Clone, Copy)]
pub struct ImageSettings {
    /// Height; rounded down to what the latent grid allows.
    pub height_px: usize,
    /// Width, likewise.
    pub width_px: usize,
    /// Steps from noise to image.
    pub num_inference_steps: usize,
    /// Guidance strength.
    pub guidance_scale: f32,
    /// Seed of the starting noise: the same image on every backend, up to rounding.
    pub seed: u64,
}

/// Denoises to latents in model space, `[1, channels, height, width]`.
///
/// # Errors
/// A block of the network that cannot be read.
#[expect(
    clippy::too_many_arguments,
    reason = "each is another thing, given by every caller"
)]
pub fn generate_latents<F: Family>(
    family: &F,
    network: &F::Network,
    text: &F::Text,
    negative: Option<&F::Text>,
    condition: &Condition,
    settings: ImageSettings,
    device: &Device,
    on_step: impl FnMut(Step<'_>),
) -> Result<Tensor<4>, WeightsError> {
    let [channels, height, width] = family.latent_shape(settings.height_px, settings.width_px);
    let noise = Stream::new(settings.seed, "latents", 0, 0).normals(channels * height * width);
    let noise = TensorData::new(noise, [1, channels, height, width]);
    let noise = Tensor::from_data(noise, device);
    let denoise = Denoise {
        family,
        network,
        text,
        negative,
        condition,
        grid: [height, width],
        steps: settings.num_inference_steps,
        guidance_scale: settings.guidance_scale,
    };
    let tokens = denoise.run(F::pack(noise), on_step)?;
    Ok(F::unpack(tokens, [height, width]))
}

/// Decodes latents of model space to pixels.
pub fn decode<F: Family>(autoencoder: &F::Autoencoder, latents: Tensor<4>) -> RgbImage {
    let image = F::decode(autoencoder, latents);
    let [_, _, height, width] = image.dims();
    let values = host_tensor(image).to_f32();
    let byte = |channel: usize, x: u32, y: u32| {
        let value = values[(channel * height + y as usize) * width + x as usize];
        (255.0 * (value / 2.0 + 0.5).clamp(0.0, 1.0)).round() as u8
    };
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        image::Rgb([byte(0, x, y), byte(1, x, y), byte(2, x, y)])
    })
}
