//! Text to image: embeddings, a seed and maybe a picture to start from in, an image out.

use burn::tensor::{Device, Tensor, TensorData};
use flux_model::WeightsError;
use flux_model::family::{Condition, Family};
use flux_model::sampler::{Denoise, Step};
use image::RgbImage;
use lora_core::random::Stream;
use lora_core::state::host_tensor;

use crate::data::bucket::to_chw_f32;

/// What an image is made with, besides the prompt.
#[derive(Debug, Clone)]
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
    /// What the image is made from, if not from noise alone.
    pub start: Option<Start>,
}

/// A picture to start from.
#[derive(Debug, Clone)]
pub struct Start {
    /// Its latents in model space, of the image's size.
    pub latents: Tensor<4>,
    /// How much of it is made anew, above 0 and at most 1: the share of the steps that are made.
    pub strength: f64,
}

/// How many of `steps` are left out at this strength.
///
/// # Source
/// diffusers 0.38 `FluxImg2ImgPipeline.get_timesteps`.
pub fn skipped_steps(steps: usize, strength: f64) -> usize {
    let steps = steps as f64;
    (steps - (steps * strength).min(steps)) as usize
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
    denoise(
        family, network, text, negative, condition, settings, noise, on_step,
    )
}

/// The same from given noise, `[1, channels, height, width]`.
///
/// # Errors
/// As above.
/// # Source
/// What a start picture is mixed with: diffusers 0.38 `FluxImg2ImgPipeline.prepare_latents`.
#[expect(
    clippy::too_many_arguments,
    reason = "each is another thing, given by every caller"
)]
pub(crate) fn denoise<F: Family>(
    family: &F,
    network: &F::Network,
    text: &F::Text,
    negative: Option<&F::Text>,
    condition: &Condition,
    settings: ImageSettings,
    noise: Tensor<4>,
    on_step: impl FnMut(Step<'_>),
) -> Result<Tensor<4>, WeightsError> {
    let [_, _, height, width] = noise.dims();
    let steps = settings.num_inference_steps;
    let strength = settings.start.as_ref().map_or(1.0, |start| start.strength);
    let denoise = Denoise {
        family,
        network,
        text,
        negative,
        condition,
        grid: [height, width],
        steps,
        skip: skipped_steps(steps, strength),
        guidance_scale: settings.guidance_scale,
    };
    let noise = F::pack(noise);
    let tokens = match settings.start {
        None => noise,
        Some(start) => {
            let sigma = denoise.first_sigma(noise.dims()[1]);
            noise * sigma + F::pack(start.latents) * (1.0 - sigma)
        }
    };
    let tokens = denoise.run(tokens, on_step)?;
    Ok(F::unpack(tokens, [height, width]))
}

/// A picture's latents in model space, drawn from what the autoencoder says of it with numbers of `seed`.
pub fn encode<F: Family>(
    family: &F,
    autoencoder: &F::Autoencoder,
    image: &RgbImage,
    seed: u64,
    device: &Device,
) -> Tensor<4> {
    let (height, width) = (image.height() as usize, image.width() as usize);
    let pixels = TensorData::new(to_chw_f32(image), [1, 3, height, width]);
    let draw = |count| Stream::new(seed, "start picture", 0, 0).normals(count);
    let pixels = Tensor::from_data(pixels, device);
    drawn_latents(family, autoencoder, pixels, draw, device)
}

/// The same of pixels in [-1, 1], `[1, 3, height, width]`; `draw` gives so many normal numbers.
pub(crate) fn drawn_latents<F: Family>(
    family: &F,
    autoencoder: &F::Autoencoder,
    pixels: Tensor<4>,
    draw: impl FnOnce(usize) -> Vec<f32>,
    device: &Device,
) -> Tensor<4> {
    let [_, _, height, width] = pixels.dims();
    let parts = F::encode_image(autoencoder, pixels);
    let latents = family.latents(&parts, draw);
    let [channels, height, width] = family.latent_shape(height, width);
    Tensor::from_data(
        TensorData::new(latents, [1, channels, height, width]),
        device,
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_left_out_as_diffusers_does() {
        // FluxImg2ImgPipeline.get_timesteps: int(max(steps - min(steps * strength, steps), 0))
        for (steps, strength, skipped) in [
            (28, 0.6, 11),
            (20, 0.6, 8),
            (20, 1.0, 0),
            (20, 0.01, 19),
            (4, 0.5, 2),
            (1, 0.3, 0),
        ] {
            assert_eq!(
                skipped_steps(steps, strength),
                skipped,
                "{steps} {strength}"
            );
        }
    }
}
