//! Cases of FLUX.1 from a picture to start from: every step that is made at each strength, and the image.

use anyhow::Context;
use burn::tensor::{Device, Tensor};
use flux_model::family::{Condition, Family, Network};
use flux_model::flux1::Flux1;
use flux_model::pipeline::PipelineFolder;
use flux_model::weights::Base;
use lora_core::state::host_tensor;

use super::case::{Case, Tensors};
use super::pipeline::prompts;
use super::report::Report;
use crate::generate::{ImageSettings, Start, denoise, drawn_latents, skipped_steps};

/// `img2img`.
pub(super) fn compute(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let family = Flux1::open(PipelineFolder::open(&case.path("/model/path")?)?)?;
    let text = prompts(case, &family, device)?;
    let network = family.network(Base::default(), device)?;
    let autoencoder = family.autoencoder(device)?;
    let noise: Tensor<4> = case.tensor("noise", device)?;
    let image_noise = case.input("image_noise")?.to_f32();
    let image = case.tensor("image", device)?;
    let latents = drawn_latents(&family, &autoencoder, image, |_| image_noise, device);
    let strengths = case.value("/call/strengths")?.as_array();
    let mut out = Tensors::new();
    for strength in strengths.context("`/call/strengths` of case.json is no list")? {
        let value = strength.as_f64();
        let value = value.context("`/call/strengths` of case.json is no list of numbers")?;
        let settings = ImageSettings {
            height_px: case.usize("/call/height")?,
            width_px: case.usize("/call/width")?,
            num_inference_steps: case.usize("/call/num_inference_steps")?,
            guidance_scale: match network.reads_guidance() {
                true => case.f64("/call/guidance_scale")? as f32,
                false => 0.0,
            },
            seed: 0, // the noise is given
            start: Some(Start {
                latents: latents.clone(),
                strength: value,
            }),
        };
        let skipped = skipped_steps(settings.num_inference_steps, value);
        let mut put = |name: String, tensor: Tensor<3>| {
            out.insert(format!("{strength}.{name}"), host_tensor(tensor));
        };
        let latents = denoise(
            &family,
            &network,
            &text,
            None,
            &Condition::default(),
            settings,
            noise.clone(),
            |step| {
                let made = step.index - skipped;
                put(format!("step{made}.velocity"), step.velocity.clone());
                put(format!("step{made}.latents"), step.tokens.clone());
            },
        )?;
        let decoded = Flux1::decode(&autoencoder, latents);
        let image = host_tensor((decoded / 2.0 + 0.5).clamp(0.0, 1.0));
        out.insert(format!("{strength}.image"), image);
    }
    Report::by_tensor(case, out)
}
