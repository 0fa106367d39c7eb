//! A FLUX.1 pipeline: its parts and the rules between them.
//!
//! Source: diffusers 0.38 `FluxPipeline`.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;
use serde_json::Value;

use crate::autoencoder::{Autoencoder, AutoencoderConfig};
use crate::error::WeightsError;
use crate::family::{ComponentFile, Family, Sampling, TokenCount, TokenCounter};
use crate::flux1::config::FluxConfig;
use crate::flux1::latent::{image_positions, pack, text_positions, unpack};
use crate::flux1::text::{CLIP_TOKENS, ClipAndT5, TextEmbedding};
use crate::flux1::transformer::{FluxInput, FluxTransformer};
use crate::lora::ModelShape;
use crate::pipeline::{PipelineFolder, load_autoencoder, load_clip, load_t5, read_config};
use crate::scheduler::SchedulerConfig;
use crate::sizes::differences;
use crate::text::clip::{ClipConfig, ClipText};
use crate::text::t5::{T5Config, T5Encoder};
use crate::text::tokenizer::{ClipTokenizer, T5Tokenizer};
use crate::weights::{Checkpoint, Layout, checkpoint_tensors};

/// An opened FLUX.1 pipeline.
#[derive(Debug)]
pub struct Flux1 {
    folder: PipelineFolder,
    autoencoder: AutoencoderConfig,
    scheduler: SchedulerConfig,
}

fn transformer_config(folder: &PipelineFolder) -> Result<FluxConfig, WeightsError> {
    folder.config("transformer/config.json", FluxConfig::problem)
}

impl Flux1 {
    fn tokenizers(&self) -> Result<(ClipTokenizer, T5Tokenizer), WeightsError> {
        let root = self.folder.root();
        Ok((
            ClipTokenizer::load(&root.join("tokenizer"))?,
            T5Tokenizer::load(&root.join("tokenizer_2"))?,
        ))
    }
}

impl Family for Flux1 {
    type Network = FluxTransformer;
    type TextEncoders = ClipAndT5;
    type Autoencoder = Autoencoder;
    type Text = TextEmbedding;

    const NAME: &'static str = "FLUX.1";
    const TEXT_FOLDERS: &'static [&'static str] =
        &["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"];
    const TEXT: &'static [&'static str] = &["sequence", "pooled"];
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
            autoencoder: folder.config("vae/config.json", AutoencoderConfig::problem)?,
            scheduler: folder
                .config("scheduler/scheduler_config.json", SchedulerConfig::problem)?,
            folder,
        })
    }

    fn shape(folder: &PipelineFolder) -> Result<ModelShape, WeightsError> {
        Ok(ModelShape {
            transformer: Some(transformer_config(folder)?),
            clip: Some(folder.config("text_encoder/config.json", ClipConfig::problem)?),
            t5: Some(folder.config("text_encoder_2/config.json", T5Config::problem)?),
            ..ModelShape::default()
        })
    }

    fn weights(
        folder: &PipelineFolder,
        device: &Device,
    ) -> Result<Vec<ComponentFile>, WeightsError> {
        let clip: ClipConfig = folder.config("text_encoder/config.json", ClipConfig::problem)?;
        let t5: T5Config = folder.config("text_encoder_2/config.json", T5Config::problem)?;
        let vae: AutoencoderConfig =
            folder.config("vae/config.json", AutoencoderConfig::problem)?;
        let transformer = FluxTransformer::new(&transformer_config(folder)?, device);
        Ok(vec![
            (
                "transformer/diffusion_pytorch_model.safetensors",
                checkpoint_tensors(&transformer, Layout::Diffusers),
            ),
            (
                "vae/diffusion_pytorch_model.safetensors",
                checkpoint_tensors(&Autoencoder::new(&vae, device), Layout::Diffusers),
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
        let flux = transformer_config(&self.folder)?;
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
            self.autoencoder.latent_channels,
        ))
    }

    fn network(&self, device: &Device) -> Result<FluxTransformer, WeightsError> {
        let stated = transformer_config(&self.folder).ok();
        load_transformer(self.folder.transformer_path(), stated.as_ref(), device)
    }

    fn outline(&self, device: &Device) -> Result<FluxTransformer, WeightsError> {
        let stated = transformer_config(&self.folder).ok();
        let (_, _, config) = open_transformer(self.folder.transformer_path(), stated.as_ref())?;
        Ok(FluxTransformer::new(&config, device))
    }

    fn new_network(config: Value, device: &Device) -> Result<FluxTransformer, String> {
        let config = parse_config(config)?;
        Ok(FluxTransformer::new(&config, device))
    }

    fn network_at(
        path: &Path,
        config: Option<&Value>,
        device: &Device,
    ) -> Result<FluxTransformer, WeightsError> {
        let stated = config.cloned().map(parse_config).transpose();
        let stated = stated.map_err(|reason| mismatch(path, reason))?;
        let network = load_transformer(path, stated.as_ref(), device)?;
        match stated {
            Some(stated) if normalized(&stated) != normalized(network.config()) => {
                let found = normalized(network.config());
                Err(mismatch(path, differences(&normalized(&stated), &found)))
            }
            _ => Ok(network),
        }
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

    fn problem(&self, network: &FluxTransformer) -> Option<String> {
        let latent = 4 * self.autoencoder.latent_channels;
        let (inputs, outputs) = (
            network.config().in_channels,
            network.config().out_channels(),
        );
        (inputs != latent || outputs != latent).then(|| {
            format!(
                "this transformer reads {inputs} channels, the autoencoder gives {latent}: models that read a condition (Fill, Canny, Depth) cannot be used yet"
            )
        })
    }

    fn autoencoder(&self, device: &Device) -> Result<Autoencoder, WeightsError> {
        load_autoencoder(
            self.folder.autoencoder_path(),
            Some(&self.autoencoder),
            device,
        )
    }

    fn text_encoders(&self, device: &Device) -> Result<ClipAndT5, WeightsError> {
        let root = self.folder.root();
        let (clip_tokenizer, t5_tokenizer) = self.tokenizers()?;
        Ok(ClipAndT5 {
            clip: load_clip(&root.join("text_encoder"), device)?,
            clip_tokenizer,
            t5: load_t5(&root.join("text_encoder_2"), device)?,
            t5_tokenizer,
        })
    }

    fn token_counter(&self) -> Result<TokenCounter, WeightsError> {
        let (clip, t5) = self.tokenizers()?;
        Ok(Box::new(move |prompt| {
            Ok(TokenCount {
                sequence: t5.count(prompt)?,
                beyond_pooled: (clip.count(prompt)? > CLIP_TOKENS).then_some(CLIP_TOKENS),
            })
        }))
    }

    fn text(parts: Vec<HostTensor>, device: &Device) -> TextEmbedding {
        TextEmbedding {
            sequence: upload(&parts[0], device),
            pooled: upload(&parts[1], device),
        }
    }

    fn negative_prompt(&self, _: f32) -> Option<&'static str> {
        None // guidance is an input of the network
    }

    fn encode_image(autoencoder: &Autoencoder, image: Tensor<4>) -> Vec<HostTensor> {
        let distribution = autoencoder.encode(image);
        let std = host_tensor(distribution.std());
        vec![host_tensor(distribution.mean), std]
    }

    fn latents(&self, parts: &[HostTensor], normals: impl FnOnce(usize) -> Vec<f32>) -> Vec<f32> {
        let (shift, scale) = (
            self.autoencoder.shift_factor.unwrap_or(0.0) as f32,
            self.autoencoder.scaling_factor as f32,
        );
        let (mean, std) = (parts[0].to_f32(), parts[1].to_f32());
        let normals = normals(mean.len());
        let draws = mean.iter().zip(&std).zip(&normals);
        draws
            .map(|((mean, std), normal)| (mean + std * normal - shift) * scale)
            .collect()
    }

    fn decode(autoencoder: &Autoencoder, latents: Tensor<4>) -> Tensor<4> {
        autoencoder.decode(autoencoder.from_model_space(latents))
    }

    fn pixel_step(&self) -> usize {
        2 * self.autoencoder.downscale() // packing needs even sides
    }

    fn latent_shape(&self, height_px: usize, width_px: usize) -> [usize; 3] {
        let side = |px: usize| 2 * (px / self.pixel_step());
        [
            self.autoencoder.latent_channels,
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
    ) -> FluxInput {
        let mut positions = text_positions(text.sequence.dims()[1]);
        positions.extend(image_positions(height, width));
        FluxInput {
            img: tokens,
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

fn parse_config(config: Value) -> Result<FluxConfig, String> {
    let config: FluxConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
    match config.problem() {
        None => Ok(config),
        Some(problem) => Err(problem),
    }
}

fn mismatch(path: &Path, reason: String) -> WeightsError {
    WeightsError::Config {
        path: path.into(),
        reason,
    }
}

fn upload<const D: usize>(tensor: &HostTensor, device: &Device) -> Tensor<D> {
    Tensor::from_data(
        TensorData::new(tensor.to_f32(), tensor.shape.clone()),
        device,
    )
}

/// Loads a transformer from a component folder or a single file in either layout.
///
/// # Errors
/// A malformed file, shapes that disagree with `config`, a tensor missing or left over.
pub fn load_transformer(
    path: &Path,
    config: Option<&FluxConfig>,
    device: &Device,
) -> Result<FluxTransformer, WeightsError> {
    let (checkpoint, layout, config) = open_transformer(path, config)?;
    checkpoint.load(FluxTransformer::new(&config, device), layout, device)
}

fn open_transformer(
    path: &Path,
    config: Option<&FluxConfig>,
) -> Result<(Checkpoint, Layout, FluxConfig), WeightsError> {
    let own: Option<FluxConfig> = match path.is_dir() {
        true => Some(read_config(&path.join("config.json"), FluxConfig::problem)?),
        false => None,
    };
    let stated = own.as_ref().or(config);
    let checkpoint = Checkpoint::open(path)?;
    let (layout, inferred) = checkpoint.transformer(stated)?;
    if let Some(stated) = &own {
        let (stated, found) = (normalized(stated), normalized(&inferred));
        if stated != found {
            let reason = differences(&stated, &found);
            return Err(WeightsError::Config {
                path: checkpoint.path().into(),
                reason,
            });
        }
    }
    Ok((checkpoint, layout, inferred))
}

fn normalized(config: &FluxConfig) -> FluxConfig {
    FluxConfig {
        out_channels: Some(config.out_channels()),
        ..config.clone()
    }
}
