//! Kinds of FLUX.2 that are not those of a velocity network.

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use flux_model::family::Family;
use flux_model::flux2::Flux2;
use flux_model::flux2::config::Flux2AutoencoderConfig;
use flux_model::flux2::latent::{Position, image_positions, reference_positions, text_positions};
use flux_model::flux2::load::load_autoencoder;
use flux_model::pipeline::PipelineFolder;
use flux_model::sampler::Denoise;
use flux_model::text::decoder::{DecoderConfig, DecoderEncoder};
use flux_model::text::tokenizer::{ChatTokenizer, ChatTokens};
use flux_model::weights::Base;
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use super::autoencoder;
use super::case::{Case, Tensors};
use super::pictures;
use super::pipeline::with_image_bytes;
use super::report::Report;
use super::schedule::vector;
use super::text::rows_of;

/// `vae` and `single_file_vae`: the file does not say its architecture, but must agree with the one stated.
pub(super) fn autoencoder(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let vae = if case.kind == "vae" {
        load_autoencoder(&case.path("/model/path")?, None, device)?
    } else {
        let stated: Flux2AutoencoderConfig = serde_json::from_value(case.value("/config")?.clone())
            .context("`/config` of case.json")?;
        let vae = load_autoencoder(&case.path("/checkpoint/file")?, Some(&stated), device)?;
        let written_out = |config: &Flux2AutoencoderConfig| Flux2AutoencoderConfig {
            decoder_block_out_channels: Some(config.decoder_channels().to_vec()),
            ..config.clone()
        };
        if written_out(vae.config()) != written_out(&stated) {
            let found = vae.config();
            bail!("its tensors are those of {found:?}, case.json says {stated:?}");
        }
        vae
    };
    let mut out = Tensors::new();
    if case.has_input("image") {
        let image: Tensor<4> = case.tensor("image", device)?;
        let latents = vae.encode(image.clone());
        let mean = latents.mean.clone();
        out = autoencoder::of_image(
            vae.moments(image),
            latents,
            vae.to_model_space(mean.clone()),
            vae.decode(mean),
        );
    }
    let mut put = |name: &str, tensor: Tensor<4>| {
        out.insert(name.into(), host_tensor(tensor));
    };
    if case.has_input("latent") {
        put("decoded", vae.decode(case.tensor("latent", device)?));
    }
    if case.has_input("model_latent") {
        let latent = vae.from_model_space(case.tensor("model_latent", device)?);
        put("latent_from_model_space", latent.clone());
        put("decoded_from_model_space", vae.decode(latent));
    }
    Report::by_tensor(case, out)
}

/// The layers of the text encoder that `pointer` of case.json names; where it does not, those of the pipeline.
fn output_layers(case: &Case, pointer: &str, config: &DecoderConfig) -> anyhow::Result<Vec<usize>> {
    match case.optional(pointer) {
        None => Ok(config.output_layers().to_vec()),
        Some(layers) => serde_json::from_value(layers.clone())
            .with_context(|| format!("`{pointer}` of case.json")),
    }
}

/// `qwen3_text`.
pub(super) fn qwen3(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let encoder = DecoderEncoder::open(&case.path("/model/path")?, device)?;
    let (ids, mask) = (
        rows_of(case, "input_ids")?,
        rows_of(case, "attention_mask")?,
    );
    let layers = output_layers(case, "/text_encoder_out_layers", encoder.config())?;
    let states = encoder.hidden_states(&ids, &mask, &layers)?;
    let named = layers.iter().zip(&states);
    let mut out: Tensors = named
        .map(|(layer, state)| {
            let name = format!("hidden_states.{layer}");
            (name, host_tensor(state.clone()))
        })
        .collect();
    out.insert("prompt_embeds".into(), host_tensor(Tensor::cat(states, 2)));
    Report::by_tensor(case, out)
}

/// `tokenizer`: ids and mask of every prompt at every length.
pub(super) fn tokenizer(case: &Case) -> anyhow::Result<Report> {
    let tokenizer = ChatTokenizer::qwen(&case.path("/tokenizers/qwen")?)?;
    let prompts = case.strings("/prompts")?;
    let lengths: Vec<usize> = serde_json::from_value(case.value("/qwen/max_lengths")?.clone())
        .context("`/qwen/max_lengths` of case.json")?;
    let mut out = Tensors::new();
    for length in lengths {
        let [ids, mask] = token_rows(&encoded(&tokenizer, &prompts, length)?);
        out.insert(format!("qwen_ids_{length}"), ids);
        out.insert(format!("qwen_mask_{length}"), mask);
    }
    Report::by_tensor(case, out)
}

fn encoded(
    tokenizer: &ChatTokenizer,
    prompts: &[&str],
    length: usize,
) -> anyhow::Result<Vec<ChatTokens>> {
    let each = prompts.iter();
    Ok(each
        .map(|prompt| tokenizer.encode(prompt, length))
        .collect::<Result<_, _>>()?)
}

/// Ids and mask, `[prompts, length]` each.
fn token_rows(tokens: &[ChatTokens]) -> [HostTensor; 2] {
    let rows = |of: fn(&ChatTokens) -> &[i64]| {
        let values: Vec<i64> = tokens.iter().flat_map(of).copied().collect();
        let length = tokens.first().map_or(0, |tokens| tokens.ids.len());
        HostTensor::from_i64([tokens.len(), length], &values)
    };
    [rows(|tokens| &tokens.ids), rows(|tokens| &tokens.mask)]
}

/// `pipeline`: from given latents to every embedding, every step, the image.
pub(super) fn pipeline(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let family = Flux2::open(PipelineFolder::open(&case.path("/model/path")?)?)?;
    let (height_px, width_px) = (case.usize("/call/height")?, case.usize("/call/width")?);
    let [_, rows, columns] = family.latent_shape(height_px, width_px);
    let steps = case.usize("/call/num_inference_steps")?;
    let guidance_scale = case.f64("/call/guidance_scale")? as f32;
    let length = case.usize("/call/max_sequence_length")?;
    let prompts = case.strings("/call/prompt")?;

    let mut out = Tensors::new();
    let (condition, grids) = pictures::of_pipeline(case, &family, prompts.len(), device, &mut out)?;
    let mut put = |name: &str, tensor: HostTensor| {
        out.insert(name.to_string(), tensor);
    };
    let encoder = family.text_encoders(device)?;
    let [ids, mask] = token_rows(&encoded(&encoder.tokenizer, &prompts, length)?);
    put("input_ids", ids);
    put("attention_mask", mask);
    let config = encoder.encoder.config();
    let layers = output_layers(case, "/call/text_encoder_out_layers", config)?;
    let text = encoder.encode_layers(&prompts, length, &layers)?;
    put("prompt_embeds", host_tensor(text.clone()));
    let negative = match family.negative_prompt(guidance_scale) {
        None => None,
        Some(prompt) => {
            let prompts = vec![prompt; prompts.len()];
            let negative = encoder.encode_layers(&prompts, length, &layers)?;
            put("negative_prompt_embeds", host_tensor(negative.clone()));
            Some(negative)
        }
    };
    let latents: Tensor<3> = case.tensor("latents_packed", device)?;
    if latents.dims()[0] != prompts.len() {
        bail!("`latents_packed` has not one row a prompt");
    }
    let positions = |p: Vec<Position>| HostTensor::from_f32([p.len(), 4], p.as_flattened());
    put("text_ids", positions(text_positions(length)));
    put(
        "latent_image_ids",
        positions(image_positions(rows, columns)),
    );
    let references = grids.iter().enumerate();
    let references =
        references.flat_map(|(i, [rows, columns])| reference_positions(i, *rows, *columns));
    put("reference_ids", positions(references.collect()));
    let sigmas = family.sigmas(steps, latents.dims()[1]);
    put(
        "timesteps",
        vector(sigmas[..steps].iter().map(|s| s * 1000.0)),
    );
    put("sigmas", vector(sigmas));

    let denoise = Denoise {
        family: &family,
        network: &family.network(Base::default(), device)?,
        text: &text,
        negative: negative.as_ref(),
        condition: &condition,
        grid: [rows, columns],
        steps,
        skip: 0,
        guidance_scale,
    };
    let latents = denoise.run(latents, |step| {
        let mut put = |name: &str, tensor: &Tensor<3>| {
            let name = format!("step{}.{name}", step.index);
            put(&name, host_tensor(tensor.clone()));
        };
        put("velocity", step.velocity);
        put("latents", step.tokens);
        if let Some((prompted, unprompted)) = step.sides {
            put("velocity_cond", prompted);
            put("velocity_uncond", unprompted);
        }
    })?;
    put("final_latents_packed", host_tensor(latents.clone()));
    let unpacked = Flux2::unpack(latents, [rows, columns]);
    put("final_latents_unpacked", host_tensor(unpacked.clone()));
    let vae = family.autoencoder(device)?;
    let latents = vae.from_model_space(unpacked);
    put("vae_latents", host_tensor(latents.clone()));
    let decoded = vae.decode(latents);
    put("decoded", host_tensor(decoded.clone()));
    put("image", host_tensor((decoded / 2.0 + 0.5).clamp(0.0, 1.0)));
    with_image_bytes(case, Report::by_tensor(case, out)?)
}
