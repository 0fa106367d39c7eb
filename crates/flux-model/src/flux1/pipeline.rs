//! A FLUX.1 pipeline: its parts and the rules between them.
//!
//! Source: diffusers 0.38 `FluxPipeline`.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use crate::error::WeightsError;
use crate::family::{
    ComponentFile, Condition, Family, ReadsReferences, ReferenceFit, Sampling, TokenCount,
    TokenCounter, Tokenizer, transformer_config,
};
use crate::flux1::config::FluxConfig;
use crate::flux1::latent::{image_positions, pack, reference_positions, text_positions, unpack};
use crate::flux1::text::{CLIP_TOKENS, ClipAndT5, TextEmbedding, Tokenizers, Tokens, TrainedText};
use crate::flux1::transformer::{FluxInput, FluxTransformer};
use crate::flux1::vae::{self, Vae, VaeConfig};
use crate::lora::{Component, ModelShape};
use crate::network_config::NetworkConfig;
use crate::pipeline::{PipelineFolder, load_clip, load_t5};
use crate::scheduler::SchedulerConfig;
use crate::text::clip::{ClipConfig, ClipText};
use crate::text::t5::{T5Config, T5Encoder};
use crate::text::tokenizer::{ClipTokenizer, T5Tokenizer};
use crate::weights::{Layout, checkpoint_tensors};

/// An opened FLUX.1 pipeline.
#[derive(Debug)]
pub struct Flux1 {
    folder: PipelineFolder,
    autoencoder: VaeConfig,
    scheduler: SchedulerConfig,
}

/// Width and height of the pictures that FLUX.1 Kontext was trained on. Source: diffusers `PREFERRED_KONTEXT_RESOLUTIONS`.
const KONTEXT_SIZES: [[u32; 2]; 17] = [
    [672, 1568],
    [688, 1504],
    [720, 1456],
    [752, 1392],
    [800, 1328],
    [832, 1248],
    [880, 1184],
    [944, 1104],
    [1024, 1024],
    [1104, 944],
    [1184, 880],
    [1248, 832],
    [1328, 800],
    [1392, 752],
    [1456, 720],
    [1504, 688],
    [1568, 672],
];

fn kontext_size(width_px: u32, height_px: u32) -> [u32; 2] {
    let aspect = f64::from(width_px) / f64::from(height_px);
    let off = |[width, height]: &[u32; 2]| (aspect - f64::from(*width) / f64::from(*height)).abs();
    let nearest = KONTEXT_SIZES
        .into_iter()
        .min_by(|a, b| off(a).total_cmp(&off(b)));
    nearest.unwrap_or([1024; 2])
}

impl Flux1 {
    /// Channels of a token of latents.
    fn token_channels(&self) -> usize {
        4 * self.autoencoder.latent_channels()
    }

    fn tokenizers(&self) -> Result<Tokenizers, WeightsError> {
        let root = self.folder.root();
        let (clip, t5) = text_configs(&self.folder)?;
        Ok(Tokenizers {
            clip: (ClipTokenizer::load(&root.join("tokenizer"))?, clip),
            t5: (T5Tokenizer::load(&root.join("tokenizer_2"))?, t5),
        })
    }
}

fn text_configs(folder: &PipelineFolder) -> Result<(ClipConfig, T5Config), WeightsError> {
    Ok((
        folder.config("text_encoder/config.json", ClipConfig::problem)?,
        folder.config("text_encoder_2/config.json", T5Config::problem)?,
    ))
}

impl Family for Flux1 {
    type Network = FluxTransformer;
    type Config = FluxConfig;
    type TextEncoders = ClipAndT5;
    type TextModules = TrainedText;
    type Autoencoder = Vae;
    type Text = TextEmbedding;

    const NAME: &'static str = "FLUX.1";
    const TEXT_FOLDERS: &'static [&'static str] =
        &["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"];
    const TEXT: &'static [&'static str] = &["sequence", "pooled"];
    const TRAINABLE_TEXT: &'static [Component] = &[Component::ClipL, Component::T5];
    /// Of `train_dreambooth_lora_flux.py`.
    const TARGETS: &'static [&'static str] = &[
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ];
    const LATENTS: &'static [&'static str] = &["mean", "std"];

    fn open(folder: PipelineFolder) -> Result<Self, WeightsError> {
        Ok(Self {
            autoencoder: VaeConfig::of_folder(&folder)?,
            scheduler: folder
                .config("scheduler/scheduler_config.json", SchedulerConfig::problem)?,
            folder,
        })
    }

    fn shape(folder: &PipelineFolder) -> Result<ModelShape, WeightsError> {
        let (clip, t5) = text_configs(folder)?;
        Ok(ModelShape {
            transformer: Some(transformer_config(folder)?),
            clip: Some(clip),
            t5: Some(t5),
            ..ModelShape::default()
        })
    }

    fn weights(
        folder: &PipelineFolder,
        device: &Device,
    ) -> Result<Vec<ComponentFile>, WeightsError> {
        let (clip, t5) = text_configs(folder)?;
        let vae = folder.config("vae/config.json", VaeConfig::problem)?;
        let transformer = transformer_config::<FluxConfig>(folder)?.network(device);
        Ok(vec![
            (
                "transformer/diffusion_pytorch_model.safetensors",
                checkpoint_tensors(&transformer, Layout::Diffusers),
            ),
            (
                "vae/diffusion_pytorch_model.safetensors",
                checkpoint_tensors(&Vae::new(&vae, device), Layout::Diffusers),
            ),
            (
                "text_encoder/model.safetensors",
                checkpoint_tensors(&ClipText::new(&clip, device), Layout::Clip),
            ),
            (
                "text_encoder_2/model.safetensors",
                checkpoint_tensors(&T5Encoder::new(&t5, device), Layout::T5),
            ),
        ])
    }

    fn folder(&self) -> &PipelineFolder {
        &self.folder
    }

    fn describe(&self) -> Result<String, WeightsError> {
        let flux: FluxConfig = transformer_config(&self.folder)?;
        let guidance = match flux.guidance_embeds {
            true => "embedded",
            false => "not used",
        };
        let shift = match self.scheduler.use_dynamic_shifting {
            true => "by image size".to_string(),
            false => self.scheduler.shift.to_string(),
        };
        Ok(format!(
            "transformer:  {} double and {} single blocks, width {}, {} heads of {}, {} input channels, guidance {guidance}\n\
             autoencoder:  1:{} with {} channels\n\
             scheduler:    shift {shift}\n",
            flux.num_layers,
            flux.num_single_layers,
            flux.hidden_size(),
            flux.num_attention_heads,
            flux.attention_head_dim,
            flux.in_channels,
            self.autoencoder.downscale(),
            self.autoencoder.latent_channels(),
        ))
    }

    /// Few steps are for what is sampled without a shift by image size (schnell); guidance is what Black Forest Labs sample each
    /// model with.
    fn sampling(&self) -> Sampling {
        Sampling {
            num_inference_steps: if self.scheduler.use_dynamic_shifting {
                28
            } else {
                4
            },
            guidance_scale: match self.folder.class() {
                "FluxKontextPipeline" => 2.5,
                "FluxFillPipeline" => 30.0,
                _ => 3.5,
            },
        }
    }

    /// Fill: noisy tokens, those of the masked picture, and one channel for every pixel of the mask.
    fn reads_mask(&self, network: &FluxTransformer) -> bool {
        let pixels = self.pixel_step() * self.pixel_step();
        network.config().in_channels == 2 * self.token_channels() + pixels
    }

    fn reads_references(&self) -> ReadsReferences {
        match self.folder.class().starts_with("FluxKontext") {
            true => ReadsReferences::BehindNoise,
            false => ReadsReferences::NotTrained,
        }
    }

    /// Stretched to one of the sizes that Kontext was trained at: of those, the one whose aspect is nearest.
    fn reference_fit(&self, width_px: u32, height_px: u32) -> ReferenceFit {
        let step = self.pixel_step() as u32;
        let size = kontext_size(width_px, height_px).map(|side| side / step * step);
        ReferenceFit {
            resized: size,
            cropped: size,
        }
    }

    fn problem(&self, network: &FluxTransformer) -> Option<String> {
        let latent = self.token_channels();
        let (inputs, outputs) = (
            network.config().in_channels,
            network.config().out_channels(),
        );
        let known = inputs == latent || self.reads_mask(network);
        if !known || outputs != latent {
            return Some(format!(
                "this transformer reads {inputs} channels, the autoencoder gives {latent}: models that read another condition than Fill's (Canny, Depth) cannot be used yet"
            ));
        }
        let (clip, t5) = text_configs(&self.folder).ok()?; // where one is missing, loading it says so
        let read = network.config();
        let encoders = [
            ("CLIP", clip.hidden_size, read.pooled_projection_dim),
            ("T5", t5.d_model, read.joint_attention_dim),
        ];
        let (name, gives, reads) = encoders
            .into_iter()
            .find(|(_, gives, reads)| gives != reads)?;
        Some(format!(
            "this transformer reads {reads} numbers of {name}, which gives {gives}: take both from one model"
        ))
    }

    fn autoencoder_at(&self, path: &Path, device: &Device) -> Result<Vae, WeightsError> {
        Vae::load(path, &self.autoencoder, device)
    }

    fn preview_problem(&self, path: &Path) -> Result<Option<String>, WeightsError> {
        vae::preview_problem(&self.autoencoder, path)
    }

    fn text_encoders(&self, device: &Device) -> Result<ClipAndT5, WeightsError> {
        let root = self.folder.root();
        Ok(ClipAndT5 {
            tokenizers: self.tokenizers()?,
            clip: load_clip(&root.join("text_encoder"), device)?,
            t5: load_t5(&root.join("text_encoder_2"), device)?,
        })
    }

    fn text_modules(
        &self,
        components: &[Component],
        is_outline: bool,
        device: &Device,
    ) -> Result<TrainedText, WeightsError> {
        let root = self.folder.root();
        let (of_clip, of_t5) = text_configs(&self.folder)?;
        let clip = || match is_outline {
            true => Ok(ClipText::new(&of_clip, device)),
            false => load_clip(&root.join("text_encoder"), device),
        };
        let t5 = || match is_outline {
            true => Ok(T5Encoder::new(&of_t5, device)),
            false => load_t5(&root.join("text_encoder_2"), device)?.resident(),
        };
        let has = |component| components.contains(&component);
        Ok(TrainedText {
            text_encoder: has(Component::ClipL).then(clip).transpose()?,
            text_encoder_2: has(Component::T5).then(t5).transpose()?,
        })
    }

    fn tokenizer(&self) -> Result<Tokenizer<Tokens>, WeightsError> {
        let tokenizers = self.tokenizers()?;
        Ok(Box::new(move |prompt, max_sequence_length| {
            tokenizers.tokens(prompt, max_sequence_length)
        }))
    }

    fn token_counter(&self) -> Result<TokenCounter, WeightsError> {
        let Tokenizers {
            clip: (clip, _),
            t5: (t5, _),
        } = self.tokenizers()?;
        Ok(Box::new(move |prompt| {
            Ok(TokenCount {
                sequence: t5.count(prompt)?,
                beyond_pooled: (clip.count(prompt)? > CLIP_TOKENS).then_some(CLIP_TOKENS),
            })
        }))
    }

    fn text(parts: Vec<HostTensor>, device: &Device) -> TextEmbedding {
        TextEmbedding::of(&parts, device)
    }

    fn negative_prompt(&self, _: f32) -> Option<&'static str> {
        None // guidance is an input of the network
    }

    fn encode_image(autoencoder: &Vae, image: Tensor<4>) -> Vec<HostTensor> {
        let (mean, std) = autoencoder.encode(image);
        vec![host_tensor(mean), host_tensor(std)]
    }

    fn latents(&self, parts: &[HostTensor], normals: impl FnOnce(usize) -> Vec<f32>) -> Vec<f32> {
        let (shift, scale) = self.autoencoder.shift_and_scale();
        let (shift, scale) = (shift as f32, scale as f32);
        let (mean, std) = (parts[0].to_f32(), parts[1].to_f32());
        let normals = normals(mean.len());
        let draws = mean.iter().zip(&std).zip(&normals);
        draws
            .map(|((mean, std), normal)| (mean + std * normal - shift) * scale)
            .collect()
    }

    fn decode(autoencoder: &Vae, latents: Tensor<4>) -> Tensor<4> {
        autoencoder.decode(latents)
    }

    fn pixel_step(&self) -> usize {
        2 * self.autoencoder.downscale() // packing needs even sides
    }

    fn latent_shape(&self, height_px: usize, width_px: usize) -> [usize; 3] {
        let side = |px: usize| 2 * (px / self.pixel_step());
        [
            self.autoencoder.latent_channels(),
            side(height_px),
            side(width_px),
        ]
    }

    fn image_tokens([height, width]: [usize; 2]) -> usize {
        height * width / 4
    }

    fn pack(latents: Tensor<4>) -> Tensor<3> {
        pack(latents)
    }

    fn unpack(tokens: Tensor<3>, [height, width]: [usize; 2]) -> Tensor<4> {
        unpack(tokens, height, width)
    }

    fn input(
        tokens: Tensor<3>,
        [height, width]: [usize; 2],
        text: TextEmbedding,
        sigma: Vec<f32>,
        guidance: Vec<f32>,
        condition: Condition,
    ) -> FluxInput {
        let mut positions = text_positions(text.sequence.dims()[1]);
        positions.extend(image_positions(height, width));
        for (index, (_, [height, width])) in condition.references.iter().enumerate() {
            positions.extend(reference_positions(index, *height, *width));
        }
        FluxInput {
            reference_tokens: condition.reference_tokens(),
            img: condition.with(tokens),
            txt: text.sequence,
            pooled: text.pooled,
            sigma,
            guidance,
            positions,
        }
    }

    fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    fn sigmas(&self, steps: usize, image_tokens: usize) -> Vec<f32> {
        self.scheduler.sigmas(steps, image_tokens)
    }

    fn training_mu(&self, image_tokens: usize) -> f64 {
        self.scheduler.mu(image_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::kontext_size;

    #[test]
    fn a_reference_of_kontext_gets_the_size_of_the_nearest_aspect() {
        assert_eq!(kontext_size(1000, 1500), [832, 1248]);
        assert_eq!(kontext_size(640, 640), [1024, 1024]);
        assert_eq!(kontext_size(4000, 100), [1568, 672]);
    }
}
