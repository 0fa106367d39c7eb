//! A FLUX.2 pipeline, klein or dev: its parts and the rules between them.
//!
//! Source: diffusers 0.38 `Flux2KleinPipeline`, `Flux2Pipeline`.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use crate::error::WeightsError;
use crate::family::{
    ComponentFile, Condition, Family, ReadsReferences, ReferenceFit, Sampling, TokenCount,
    TokenCounter, Tokenizer, transformer_config,
};
use crate::flux2::autoencoder::Flux2Autoencoder;
use crate::flux2::config::{Flux2AutoencoderConfig, Flux2Config};
use crate::flux2::latent::{image_positions, pack, reference_positions, text_positions, unpack};
use crate::flux2::load::{autoencoder, load_autoencoder};
use crate::flux2::schedule::empirical_mu;
use crate::flux2::text::{Flux2TextEncoder, NoTrainedText, sequence, tokenizer};
use crate::flux2::transformer::{Flux2Input, Flux2Transformer};
use crate::lora::{Component, ModelShape};
use crate::network_config::NetworkConfig;
use crate::pipeline::PipelineFolder;
use crate::scheduler::SchedulerConfig;
use crate::text::decoder::{DecoderConfig, DecoderText, ModelType};
use crate::weights::{Checkpoint, Layout, checkpoint_tensors};

/// Most pixels of a reference picture. Source: diffusers `Flux2KleinPipeline`, `Flux2Pipeline`.
const REFERENCE_AREA: f64 = 1024.0 * 1024.0;
/// Steps whose shift training's `flux` shift takes: those that the networks that can be trained are sampled with.
const TRAINING_STEPS: usize = 50;

/// An opened FLUX.2 pipeline.
#[derive(Debug)]
pub struct Flux2 {
    folder: PipelineFolder,
    autoencoder: Flux2AutoencoderConfig,
    scheduler: SchedulerConfig,
}

impl Flux2 {
    /// The pipeline of FLUX.2 dev in diffusers; the others are klein's.
    pub(crate) const DEV: &str = "Flux2Pipeline";
    /// That of klein 9B-KV: a distilled klein 9B with weights for keeping keys and values of references.
    const KV: &str = "Flux2KleinKVPipeline";

    /// Whether the network was distilled to few steps without guidance.
    pub fn is_distilled(&self) -> bool {
        let stated = self.folder.index().get("is_distilled");
        stated == Some(&true.into()) || self.folder.class() == Self::KV
    }

    /// What the folder states of the language model that reads prompts.
    fn language_model(folder: &PipelineFolder) -> Result<DecoderConfig, WeightsError> {
        DecoderConfig::read(&folder.root().join("text_encoder/config.json"))
    }
}

impl Family for Flux2 {
    type Network = Flux2Transformer;
    type Config = Flux2Config;
    type TextEncoders = Flux2TextEncoder;
    type TextModules = NoTrainedText;
    type Autoencoder = Flux2Autoencoder;
    type Text = Tensor<3>;

    const NAME: &'static str = "FLUX.2";
    const TEXT_FOLDERS: &'static [&'static str] = &["text_encoder", "tokenizer"];
    const TEXT: &'static [&'static str] = &["prompt_embeds"];
    const TRAINABLE_TEXT: &'static [Component] = &[];
    /// Of `train_dreambooth_lora_flux2_klein.py` and `train_dreambooth_lora_flux2.py`; the last two are those of single-stream blocks.
    const TARGETS: &'static [&'static str] = &[
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    ];
    const LATENTS: &'static [&'static str] = &["latents"];

    fn open(folder: PipelineFolder) -> Result<Self, WeightsError> {
        Ok(Self {
            autoencoder: folder.config("vae/config.json", Flux2AutoencoderConfig::problem)?,
            scheduler: folder
                .config("scheduler/scheduler_config.json", SchedulerConfig::problem)?,
            folder,
        })
    }

    fn shape(folder: &PipelineFolder) -> Result<ModelShape, WeightsError> {
        Ok(ModelShape {
            flux2: Some(transformer_config(folder)?),
            ..ModelShape::default()
        })
    }

    fn weights(
        folder: &PipelineFolder,
        device: &Device,
    ) -> Result<Vec<ComponentFile>, WeightsError> {
        let vae = folder.config("vae/config.json", Flux2AutoencoderConfig::problem)?;
        let text = Self::language_model(folder)?;
        let inside = match text.model_type {
            ModelType::Qwen3 => "model",
            ModelType::Mistral => "language_model.model",
        };
        let transformer = transformer_config::<Flux2Config>(folder)?.network(device);
        let (vae, text) = (
            Flux2Autoencoder::new(&vae, device),
            DecoderText::new(&text, device),
        );
        Ok(vec![
            (
                "transformer/diffusion_pytorch_model.safetensors",
                checkpoint_tensors(&transformer, Layout::Diffusers),
            ),
            (
                "vae/diffusion_pytorch_model.safetensors",
                checkpoint_tensors(&vae, Layout::Diffusers),
            ),
            (
                "text_encoder/model.safetensors",
                checkpoint_tensors(&text, Layout::LanguageModel { inside }),
            ),
        ])
    }

    fn folder(&self) -> &PipelineFolder {
        &self.folder
    }

    fn describe(&self) -> Result<String, WeightsError> {
        let flux: Flux2Config = transformer_config(&self.folder)?;
        let guidance = match (self.is_distilled(), flux.guidance_embeds) {
            (true, _) => "distilled",
            (false, true) => "embedded",
            (false, false) => "by an empty negative prompt",
        };
        let text = match Self::language_model(&self.folder) {
            Err(_) => String::new(), // the folder's part in this description says so
            Ok(text) => {
                let [first, second, third] = text.output_layers();
                let (name, unread) = match text.model_type {
                    ModelType::Qwen3 => ("Qwen3", ""),
                    ModelType::Mistral => ("Mistral", "; vision tower and projector are not read"),
                };
                format!(
                    "text encoder: {name}, {} layers, width {}, read after layers {first}, {second}, {third}{unread}\n",
                    text.num_hidden_layers, text.hidden_size
                )
            }
        };
        Ok(format!(
            "transformer:  {} double and {} single blocks, width {}, {} heads of {}, {} input channels, guidance {guidance}\n\
             {text}autoencoder:  1:{} with {} channels, in patches of 2 x 2\n\
             scheduler:    shift by image size and steps\n",
            flux.num_layers,
            flux.num_single_layers,
            flux.hidden_size(),
            flux.num_attention_heads,
            flux.attention_head_dim,
            flux.in_channels,
            self.autoencoder.downscale(),
            self.autoencoder.latent_channels,
        ))
    }

    fn distilled_from(&self) -> Option<String> {
        if !self.is_distilled() {
            return None;
        }
        let size = match transformer_config::<Flux2Config>(&self.folder)
            .ok()?
            .hidden_size()
        {
            4096 => "9B",
            _ => "4B",
        };
        Some(format!("FLUX.2-klein-base-{size}"))
    }

    fn sampling(&self) -> Sampling {
        match self.is_distilled() {
            true => Sampling {
                num_inference_steps: 4,
                guidance_scale: 1.0,
            },
            false => Sampling {
                num_inference_steps: 50,
                guidance_scale: 4.0,
            },
        }
    }

    fn reads_references(&self) -> ReadsReferences {
        match self.folder.class() {
            Self::KV => ReadsReferences::OtherWay(
                "reads references by keys and values that it keeps from the first step, at noise level 0, which is not done here; \
                 FLUX.2-klein-9B reads them, and FLUX.2-klein-base-9B learns from them",
            ),
            _ => ReadsReferences::BehindNoise,
        }
    }

    /// As it is, but no larger than a square of 1024 px, and cut to whole tokens.
    fn reference_fit(&self, width_px: u32, height_px: u32) -> ReferenceFit {
        flux2_fit(width_px, height_px, self.pixel_step() as u32)
    }

    fn problem(&self, network: &Flux2Transformer) -> Option<String> {
        let latent = self.autoencoder.patch_channels();
        let (inputs, outputs) = (
            network.config().in_channels,
            network.config().out_channels(),
        );
        if inputs != latent || outputs != latent {
            return Some(format!(
                "this transformer reads {inputs} channels and gives {outputs}, the autoencoder has {latent}"
            ));
        }
        let text = Self::language_model(&self.folder).ok()?.output_width(); // where it is missing, loading it says so
        let width = network.config().joint_attention_dim;
        (text != width).then(|| {
            format!("this transformer reads text of width {width}, the text encoder gives {text}")
        })
    }

    fn autoencoder_at(
        &self,
        path: &Path,
        device: &Device,
    ) -> Result<Flux2Autoencoder, WeightsError> {
        load_autoencoder(path, Some(&self.autoencoder), device)
    }

    fn preview_problem(&self, path: &Path) -> Result<Option<String>, WeightsError> {
        let (_, other) = autoencoder(&Checkpoint::open(path)?, Some(&self.autoencoder))?;
        let (here, there) = (self.autoencoder.patch_channels(), other.patch_channels());
        Ok((here != there).then(|| {
            format!("it decodes patches of {there} channels, and the model's have {here}")
        }))
    }

    fn text_encoders(&self, device: &Device) -> Result<Flux2TextEncoder, WeightsError> {
        Flux2TextEncoder::open(self.folder.root(), device)
    }

    fn text_modules(
        &self,
        _: &[Component],
        _: bool,
        _: &Device,
    ) -> Result<NoTrainedText, WeightsError> {
        Ok(NoTrainedText {})
    }

    fn tokenizer(&self) -> Result<Tokenizer<()>, WeightsError> {
        Ok(Box::new(|_, _| Ok(())))
    }

    fn token_counter(&self) -> Result<TokenCounter, WeightsError> {
        let tokenizer = tokenizer(self.folder.root())?;
        Ok(Box::new(move |prompt| {
            Ok(TokenCount {
                sequence: tokenizer.count(prompt)?,
                beyond_pooled: None,
            })
        }))
    }

    fn text(parts: Vec<HostTensor>, device: &Device) -> Tensor<3> {
        sequence(&parts[0], device)
    }

    fn negative_prompt(&self, guidance_scale: f32) -> Option<&'static str> {
        let embedded = self.folder.class() == Self::DEV;
        (guidance_scale > 1.0 && !self.is_distilled() && !embedded).then_some("")
    }

    fn encode_image(autoencoder: &Flux2Autoencoder, image: Tensor<4>) -> Vec<HostTensor> {
        let mean = autoencoder.encode(image).mean; // FLUX.2 never draws from the distribution
        vec![host_tensor(autoencoder.to_model_space(mean))]
    }

    fn latents(&self, parts: &[HostTensor], _: impl FnOnce(usize) -> Vec<f32>) -> Vec<f32> {
        parts[0].to_f32()
    }

    fn decode(autoencoder: &Flux2Autoencoder, latents: Tensor<4>) -> Tensor<4> {
        autoencoder.decode(autoencoder.from_model_space(latents))
    }

    fn pixel_step(&self) -> usize {
        2 * self.autoencoder.downscale()
    }

    fn latent_shape(&self, height_px: usize, width_px: usize) -> [usize; 3] {
        let step = self.pixel_step();
        let channels = self.autoencoder.patch_channels();
        [channels, height_px / step, width_px / step]
    }

    fn image_tokens([rows, columns]: [usize; 2]) -> usize {
        rows * columns
    }

    fn pack(latents: Tensor<4>) -> Tensor<3> {
        pack(latents)
    }

    fn unpack(tokens: Tensor<3>, [rows, columns]: [usize; 2]) -> Tensor<4> {
        unpack(tokens, rows, columns)
    }

    fn input(
        tokens: Tensor<3>,
        [rows, columns]: [usize; 2],
        text: Tensor<3>,
        sigma: Vec<f32>,
        guidance: Vec<f32>,
        condition: Condition,
    ) -> Flux2Input {
        let mut positions = text_positions(text.dims()[1]);
        positions.extend(image_positions(rows, columns));
        for (index, (_, [rows, columns])) in condition.references.iter().enumerate() {
            positions.extend(reference_positions(index, *rows, *columns));
        }
        Flux2Input {
            reference_tokens: condition.reference_tokens(),
            img: condition.with(tokens),
            txt: text,
            sigma,
            guidance,
            positions,
        }
    }

    fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    fn sigmas(&self, steps: usize, image_tokens: usize) -> Vec<f32> {
        let mu = empirical_mu(image_tokens, steps);
        self.scheduler.sigmas_shifted(steps, mu)
    }

    fn training_mu(&self, image_tokens: usize) -> f64 {
        empirical_mu(image_tokens, TRAINING_STEPS)
    }
}

fn flux2_fit(width_px: u32, height_px: u32, step: u32) -> ReferenceFit {
    let area = f64::from(width_px) * f64::from(height_px);
    let scale = (REFERENCE_AREA / area).sqrt().min(1.0);
    let whole = |side: u32| (side / step * step).max(step);
    // a side of less than a token is enlarged to one
    let resized = [width_px, height_px].map(|side| ((f64::from(side) * scale) as u32).max(step));
    ReferenceFit {
        resized,
        cropped: resized.map(whole),
    }
}

#[cfg(test)]
mod tests {
    use super::flux2_fit;

    #[test]
    fn a_reference_of_flux2_keeps_its_size_up_to_a_megapixel() {
        for (size, resized, cropped) in [
            ([500, 300], [500, 300], [496, 288]),
            ([1024, 1024], [1024, 1024], [1024, 1024]),
            ([2000, 1000], [1448, 724], [1440, 720]),
            ([5, 4000], [16, 4000], [16, 4000]),
        ] {
            let fit = flux2_fit(size[0], size[1], 16);
            assert_eq!((fit.resized, fit.cropped), (resized, cropped));
        }
    }
}
