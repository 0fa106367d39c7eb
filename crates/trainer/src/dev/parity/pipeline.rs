//! Cases of FLUX.1's whole pipeline, from given latents: every embedding, every step, the image.

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use flux_model::family::{Family, Network, TextEncoders};
use flux_model::flux1::Flux1;
use flux_model::flux1::latent::{Position, image_positions, reference_positions, text_positions};
use flux_model::pipeline::PipelineFolder;
use flux_model::sampler::Denoise;
use flux_model::weights::Base;
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::TensorFile;
use lora_core::state::host_tensor;

use super::case::{Case, Tensors};
use super::pictures;
use super::report::{Line, Report};
use super::schedule::vector;
use crate::data::batch::stacked;

/// `pipeline`.
pub(super) fn compute(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let mut folder = PipelineFolder::open(&case.path("/model/path")?)?;
    if case.optional("/model/transformer").is_some() {
        folder = folder.with_transformer(&case.path("/model/transformer")?);
    }
    let family = Flux1::open(folder)?;
    let (height_px, width_px) = (case.usize("/call/height")?, case.usize("/call/width")?);
    let [_, height, width] = family.latent_shape(height_px, width_px);
    let steps = case.usize("/call/num_inference_steps")?;
    let text = prompts(case, &family, device)?;
    let network = family.network(Base::default(), device)?;
    let latents: Tensor<3> = case.tensor("latents_packed", device)?;
    if latents.dims()[0] != text.sequence.dims()[0] {
        bail!("`latents_packed` has not one row a prompt");
    }

    let mut out = Tensors::new();
    let batch = latents.dims()[0];
    let (condition, grids) = pictures::of_pipeline(case, &family, batch, device, &mut out)?;
    let positions = |p: Vec<Position>| HostTensor::from_f32([p.len(), 3], &p.concat());
    let mut put = |name: &str, tensor: HostTensor| {
        out.insert(name.to_string(), tensor);
    };
    put(
        "text_ids",
        positions(text_positions(text.sequence.dims()[1])),
    );
    put(
        "latent_image_ids",
        positions(image_positions(height, width)),
    );
    let references = grids.iter().enumerate();
    let references =
        references.flat_map(|(i, [height, width])| reference_positions(i, *height, *width));
    put("reference_ids", positions(references.collect()));
    put("prompt_embeds", host_tensor(text.sequence.clone()));
    put("pooled_prompt_embeds", host_tensor(text.pooled.clone()));
    let sigmas = family.sigmas(steps, latents.dims()[1]);
    put(
        "timesteps",
        vector(sigmas[..steps].iter().map(|s| s * 1000.0)),
    );
    put("sigmas", vector(sigmas));

    let denoise = Denoise {
        family: &family,
        network: &network,
        text: &text,
        negative: None,
        condition: &condition,
        grid: [height, width],
        steps,
        skip: 0,
        guidance_scale: match network.reads_guidance() {
            true => case.f64("/call/guidance_scale")? as f32,
            false => 0.0,
        },
    };
    let latents = denoise.run(latents, |step| {
        let index = step.index;
        put(
            &format!("step{index}.velocity"),
            host_tensor(step.velocity.clone()),
        );
        put(
            &format!("step{index}.latents"),
            host_tensor(step.tokens.clone()),
        );
    })?;
    put("final_latents_packed", host_tensor(latents.clone()));
    let unpacked = Flux1::unpack(latents, [height, width]);
    put("final_latents_unpacked", host_tensor(unpacked.clone()));
    let decoded = Flux1::decode(&family.autoencoder(device)?, unpacked);
    put("decoded", host_tensor(decoded.clone()));
    put("image", host_tensor((decoded / 2.0 + 0.5).clamp(0.0, 1.0)));
    with_image_bytes(case, Report::by_tensor(case, out)?)
}

/// The report with the image as bytes, where the case has them.
pub(super) fn with_image_bytes(case: &Case, mut report: Report) -> anyhow::Result<Report> {
    let bytes = case.dir.join("image_u8.safetensors");
    if bytes.is_file() {
        let lines = image_bytes(&TensorFile::open(&bytes)?, report.actual("image")?)?;
        report.lines.extend(lines);
    }
    Ok(report)
}

/// `call.prompt` as CLIP reads it, `call.prompt_2` (or the same) as T5 does; either may be a list.
pub(super) fn prompts(
    case: &Case,
    family: &Flux1,
    device: &Device,
) -> anyhow::Result<<Flux1 as Family>::Text> {
    let prompts = case.strings("/call/prompt")?;
    let seconds = match case.optional("/call/prompt_2") {
        None | Some(serde_json::Value::Null) => prompts.clone(),
        Some(_) => case.strings("/call/prompt_2")?,
    };
    if prompts.len() != seconds.len() {
        bail!("`/call/prompt` and `/call/prompt_2` of case.json differ in length");
    }
    let encoders = family.text_encoders(device)?;
    let length = case.usize("/call/max_sequence_length")?;
    let mut rows = encoders.encode(&prompts, length, device)?;
    if seconds != prompts {
        let for_t5 = encoders.encode(&seconds, length, device)?;
        for (row, mut second) in rows.iter_mut().zip(for_t5) {
            row[0] = second.swap_remove(0);
        }
    }
    Ok(Flux1::text(stacked(rows), device))
}

/// Bytes `[batch, height, width, 3]`, of which each may be off by one.
fn image_bytes(file: &TensorFile, image: &HostTensor) -> anyhow::Result<Vec<Line>> {
    let [batch, channels, height, width] = image.shape[..] else {
        bail!("image is not [batch, 3, h, w]")
    };
    let values = image.to_f32();
    let line = |name: &str| -> anyhow::Result<Line> {
        let expected = file.read(name)?;
        let fits = expected.shape == [batch, height, width, channels];
        let bytes = expected.to_i64().filter(|_| fits);
        let bytes = bytes.with_context(|| {
            format!("`{name}` of image_u8 is not {batch} x {height} x {width} x 3 bytes")
        })?;
        let off = bytes.iter().enumerate().map(|(i, &byte)| {
            let (pixel, channel) = (i / channels, i % channels);
            let (row, pixel) = (pixel / (height * width), pixel % (height * width));
            let value = values[(row * channels + channel) * height * width + pixel];
            (f64::from(255.0 * value).round() - byte as f64).abs()
        });
        let worse = |worst: f64, off: f64| {
            if off > worst || off.is_nan() {
                off
            } else {
                worst
            }
        };
        Ok(Line {
            name: format!("image_u8.{name} (levels off)"),
            error: off.fold(0.0, worse),
            bound: 1.0,
        })
    };
    file.names().map(line).collect()
}
