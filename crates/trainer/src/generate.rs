//! Text to image: embeddings and a seed in, an image out.

use burn::tensor::{Device, Tensor, TensorData};
use flux_model::autoencoder::Autoencoder;
use flux_model::flux1::latent::{pack, unpack};
use flux_model::flux1::transformer::FluxTransformer;
use flux_model::pipeline::{DenoiseSettings, TextEmbedding, denoise, latent_size};
use flux_model::scheduler::SchedulerConfig;
use image::RgbImage;
use lora_core::host_tensor;
use lora_core::random::Stream;

/// What an image is made with, besides the prompt.
#[derive(Debug, Clone, Copy)]
pub struct ImageSettings {
    /// Height; rounded down to what the latent grid allows.
    pub height_px: usize,
    /// Width, likewise.
    pub width_px: usize,
    /// Steps from noise to image.
    pub num_inference_steps: usize,
    /// Guidance strength, for models that take one.
    pub guidance_scale: f32,
    /// Seed of the starting noise: the same image on every backend, up to rounding.
    pub seed: u64,
}

/// Denoises to packed latents.
pub fn generate_latents(
    transformer: &FluxTransformer,
    scheduler: &SchedulerConfig,
    downscale: usize,
    text: &TextEmbedding,
    settings: ImageSettings,
    on_step: impl FnMut(usize, &Tensor<3>, &Tensor<3>),
) -> (Tensor<3>, DenoiseSettings) {
    let device = text.pooled.device();
    let (latent_height, latent_width) =
        latent_size(settings.height_px, settings.width_px, downscale);
    let channels = transformer.config().out_channels() / 4;
    let noise = Stream::new(settings.seed, "latents", 0, 0)
        .normals(channels * latent_height * latent_width);
    let noise = Tensor::<4>::from_data(
        TensorData::new(noise, [1, channels, latent_height, latent_width]),
        &device,
    );
    let settings = DenoiseSettings {
        latent_height,
        latent_width,
        num_inference_steps: settings.num_inference_steps,
        guidance_scale: settings.guidance_scale,
    };
    (
        denoise(transformer, scheduler, text, pack(noise), settings, on_step),
        settings,
    )
}

/// Decodes packed latents to pixels.
pub fn decode(
    autoencoder: &Autoencoder,
    latents: Tensor<3>,
    settings: DenoiseSettings,
) -> RgbImage {
    let latents = unpack(latents, settings.latent_height, settings.latent_width);
    let image = autoencoder.decode(autoencoder.from_model_space(latents));
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

/// Moves cached embeddings to `device`.
pub fn text_embedding(text: &crate::data::cache::CachedText, device: &Device) -> TextEmbedding {
    let data = |tensor: &lora_core::files::host::HostTensor| {
        TensorData::new(tensor.to_f32(), tensor.shape.clone())
    };
    TextEmbedding {
        sequence: Tensor::from_data(data(&text.sequence), device),
        pooled: Tensor::from_data(data(&text.pooled), device),
    }
}
