//! A diffusers pipeline folder, and text to image with it.
//!
//! Source: diffusers 0.38 `FluxPipeline`.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use lora_core::files::strict_json::{parse_json, read_file};
use serde::de::DeserializeOwned;

use crate::autoencoder::{Autoencoder, AutoencoderConfig};
use crate::error::WeightsError;
use crate::flux1::config::FluxConfig;
use crate::flux1::latent::{image_positions, text_positions};
use crate::flux1::transformer::{FluxInput, FluxTransformer};
use crate::lora::ModelShape;
use crate::scheduler::{SchedulerConfig, euler_step};
use crate::text::clip::{ClipConfig, ClipText};
use crate::text::t5::{T5Config, T5Encoder};
use crate::text::tokenizer::{ClipTokenizer, T5Tokenizer};
use crate::weights::{Checkpoint, Layout};

/// Largest `config.json` read, in bytes; real ones stay below 10 KiB.
const MAX_CONFIG: u64 = 1 << 20;
/// Tokens CLIP reads: its tokenizer pads and truncates to this.
pub const CLIP_TOKENS: usize = 77;

/// Where the components of a pipeline are; loads each on request.
#[derive(Debug, Clone)]
pub struct PipelineFolder {
    root: PathBuf,
    transformer: PathBuf,
    autoencoder: PathBuf,
}

impl PipelineFolder {
    /// Opens a folder with `model_index.json`.
    ///
    /// # Errors
    /// No such folder, or one of another kind of pipeline.
    pub fn open(root: &Path) -> Result<Self, WeightsError> {
        let index = root.join("model_index.json");
        let read: serde_json::Value = read_json(&index)?;
        match read.get("_class_name").and_then(|name| name.as_str()) {
            Some(name) if name.starts_with("Flux") && !name.starts_with("Flux2") => {}
            other => {
                let reason = format!(
                    "a {} is not a FLUX.1 pipeline",
                    other.unwrap_or("file without `_class_name`")
                );
                return Err(WeightsError::Config {
                    path: index,
                    reason,
                });
            }
        }
        Ok(Self {
            root: root.into(),
            transformer: root.join("transformer"),
            autoencoder: root.join("vae"),
        })
    }

    /// Takes the transformer from a single file instead.
    #[must_use]
    pub fn with_transformer(self, file: &Path) -> Self {
        Self {
            transformer: file.into(),
            ..self
        }
    }

    /// Takes the autoencoder from a single file instead.
    #[must_use]
    pub fn with_autoencoder(self, file: &Path) -> Self {
        Self {
            autoencoder: file.into(),
            ..self
        }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The files whose bytes decide what the encoders return: autoencoder, text encoders, tokenizers.
    pub fn encoder_paths(&self) -> Vec<PathBuf> {
        let folders = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"];
        let mut paths: Vec<PathBuf> = folders.iter().map(|name| self.root.join(name)).collect();
        paths.push(self.autoencoder.clone());
        paths
    }

    /// Loads the transformer.
    ///
    /// # Errors
    /// A malformed file, or a tensor that is missing, left over or of another shape.
    pub fn transformer(&self, device: &Device) -> Result<FluxTransformer, WeightsError> {
        load_transformer(
            &self.transformer,
            self.transformer_config().ok().as_ref(),
            device,
        )
    }

    /// The architecture that `transformer/config.json` states.
    ///
    /// # Errors
    /// No such file, or one that describes no FLUX.1 transformer.
    pub fn transformer_config(&self) -> Result<FluxConfig, WeightsError> {
        read_config(
            &self.root.join("transformer/config.json"),
            FluxConfig::problem,
        )
    }

    /// Loads the autoencoder.
    ///
    /// # Errors
    /// As [`transformer`](Self::transformer).
    pub fn autoencoder(&self, device: &Device) -> Result<Autoencoder, WeightsError> {
        let config = self.autoencoder_config();
        if self.autoencoder.is_dir() {
            return load_autoencoder(&self.autoencoder, Some(&config?), device);
        }
        load_autoencoder(&self.autoencoder, config.ok().as_ref(), device)
    }

    /// The architecture that `vae/config.json` states.
    ///
    /// # Errors
    /// No such file, or one that describes no autoencoder.
    pub fn autoencoder_config(&self) -> Result<AutoencoderConfig, WeightsError> {
        read_config(
            &self.root.join("vae/config.json"),
            AutoencoderConfig::problem,
        )
    }

    /// Loads both text encoders and their tokenizers.
    ///
    /// # Errors
    /// As [`transformer`](Self::transformer), or a tokenizer that cannot be read.
    pub fn text_encoders(&self, device: &Device) -> Result<TextEncoders, WeightsError> {
        Ok(TextEncoders {
            clip: load_clip(&self.root.join("text_encoder"), device)?,
            clip_tokenizer: ClipTokenizer::load(&self.root.join("tokenizer"))?,
            t5: load_t5(&self.root.join("text_encoder_2"), device)?,
            t5_tokenizer: T5Tokenizer::load(&self.root.join("tokenizer_2"))?,
        })
    }

    /// The networks' architectures, as far as the folder states them: what a LoRA file is read against.
    ///
    /// # Errors
    /// A configuration that describes no network.
    pub fn shape(&self) -> Result<ModelShape, WeightsError> {
        Ok(ModelShape {
            transformer: Some(self.transformer_config()?),
            clip: Some(read_config(
                &self.root.join("text_encoder/config.json"),
                ClipConfig::problem,
            )?),
            t5: Some(read_config(
                &self.root.join("text_encoder_2/config.json"),
                T5Config::problem,
            )?),
        })
    }

    /// The scheduler's configuration.
    ///
    /// # Errors
    /// A malformed or missing `scheduler_config.json`.
    pub fn scheduler(&self) -> Result<SchedulerConfig, WeightsError> {
        read_config(
            &self.root.join("scheduler/scheduler_config.json"),
            SchedulerConfig::problem,
        )
    }
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
            let reason = format!(
                "its configuration says {stated:?}, but its tensors are those of {found:?}"
            );
            return Err(WeightsError::Config {
                path: checkpoint.path().into(),
                reason,
            });
        }
    }
    checkpoint.load(FluxTransformer::new(&inferred, device), layout, device)
}

fn normalized(config: &FluxConfig) -> FluxConfig {
    FluxConfig {
        out_channels: Some(config.out_channels()),
        ..config.clone()
    }
}

/// Loads an autoencoder from a component folder or a single file in either layout.
///
/// # Errors
/// As [`load_transformer`].
pub fn load_autoencoder(
    path: &Path,
    config: Option<&AutoencoderConfig>,
    device: &Device,
) -> Result<Autoencoder, WeightsError> {
    let own: Option<AutoencoderConfig> = match path.is_dir() {
        true => Some(read_config(
            &path.join("config.json"),
            AutoencoderConfig::problem,
        )?),
        false => None,
    };
    let checkpoint = Checkpoint::open(path)?;
    let (layout, config) = checkpoint.autoencoder(own.as_ref().or(config))?;
    checkpoint.load(Autoencoder::new(&config, device), layout, device)
}

/// Loads a CLIP text encoder from a component folder.
///
/// # Errors
/// As [`load_transformer`].
pub fn load_clip(folder: &Path, device: &Device) -> Result<ClipText, WeightsError> {
    let config = read_config(&folder.join("config.json"), ClipConfig::problem)?;
    Checkpoint::open(folder)?.load(ClipText::new(&config, device), Layout::Clip, device)
}

/// Loads a T5 encoder from a component folder.
///
/// # Errors
/// As [`load_transformer`].
pub fn load_t5(folder: &Path, device: &Device) -> Result<T5Encoder, WeightsError> {
    let config = read_config(&folder.join("config.json"), T5Config::problem)?;
    Checkpoint::open(folder)?.load(T5Encoder::new(&config, device), Layout::T5, device)
}

/// Parses a small JSON file.
///
/// # Errors
/// A file that cannot be read or parsed, repeats a key or is larger than 1 MiB.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, WeightsError> {
    let bytes = read_file(path, MAX_CONFIG).map_err(|source| WeightsError::Read {
        path: path.into(),
        source,
    })?;
    parse_json(&bytes).map_err(|source| WeightsError::Json {
        path: path.into(),
        source,
    })
}

/// Parses a component's `config.json` and checks it.
fn read_config<T: DeserializeOwned>(
    path: &Path,
    problem: impl Fn(&T) -> Option<String>,
) -> Result<T, WeightsError> {
    let config = read_json(path)?;
    match problem(&config) {
        None => Ok(config),
        Some(reason) => Err(WeightsError::Config {
            path: path.into(),
            reason,
        }),
    }
}

/// Both text encoders with their tokenizers.
#[derive(Debug)]
pub struct TextEncoders {
    clip: ClipText,
    clip_tokenizer: ClipTokenizer,
    t5: T5Encoder,
    t5_tokenizer: T5Tokenizer,
}

/// A prompt as the transformer reads it.
#[derive(Debug, Clone)]
pub struct TextEmbedding {
    /// T5's sequence, `[1, max_sequence_length, joint_attention_dim]`.
    pub sequence: Tensor<3>,
    /// CLIP's pooled vector, `[1, pooled_projection_dim]`.
    pub pooled: Tensor<2>,
}

impl TextEncoders {
    /// The CLIP encoder, mutable so that an adapter can be attached.
    pub fn map_clip<E>(self, f: impl FnOnce(ClipText) -> Result<ClipText, E>) -> Result<Self, E> {
        Ok(Self {
            clip: f(self.clip)?,
            ..self
        })
    }

    /// The T5 encoder, likewise.
    pub fn map_t5<E>(self, f: impl FnOnce(T5Encoder) -> Result<T5Encoder, E>) -> Result<Self, E> {
        Ok(Self {
            t5: f(self.t5)?,
            ..self
        })
    }

    /// Encodes one prompt, T5 padded to `max_sequence_length` tokens.
    ///
    /// # Errors
    /// A prompt the tokenizer refuses, or a token outside an encoder's vocabulary.
    pub fn encode(
        &self,
        prompt: &str,
        max_sequence_length: usize,
        device: &Device,
    ) -> Result<TextEmbedding, WeightsError> {
        let positions = self.clip.config().max_position_embeddings.min(CLIP_TOKENS);
        let clip_ids = self.clip_tokenizer.encode(prompt, positions)?;
        let t5_ids = self.t5_tokenizer.encode(prompt, max_sequence_length)?;
        for (name, ids, vocab) in [
            ("text_encoder", &clip_ids, self.clip.config().vocab_size),
            ("text_encoder_2", &t5_ids, self.t5.config().vocab_size),
        ] {
            if let Some(id) = ids.iter().find(|id| !(0..vocab as i64).contains(id)) {
                return Err(WeightsError::Config {
                    path: name.into(),
                    reason: format!(
                        "its tokenizer gives id {id}, but the encoder knows only {vocab}"
                    ),
                });
            }
        }
        Ok(TextEmbedding {
            pooled: self.clip.forward(&[clip_ids], device).pooled,
            sequence: self.t5.forward(&[t5_ids], device),
        })
    }
}

/// What one denoising run is asked for.
#[derive(Debug, Clone, Copy)]
pub struct DenoiseSettings {
    /// Sides of the latent.
    pub latent_height: usize,
    /// See `latent_height`.
    pub latent_width: usize,
    /// Steps from noise to image.
    pub num_inference_steps: usize,
    /// Guidance strength fed to models that take one.
    pub guidance_scale: f32,
}

/// Latent sides for an image of `height_px` x `width_px`: a multiple of two, as packing needs.
pub fn latent_size(height_px: usize, width_px: usize, downscale: usize) -> (usize, usize) {
    let side = |px: usize| 2 * (px / (2 * downscale));
    (side(height_px), side(width_px))
}

/// Runs the Euler steps on packed `latents`; `on_step(index, velocity, latents)` sees every step.
pub fn denoise(
    transformer: &FluxTransformer,
    scheduler: &SchedulerConfig,
    text: &TextEmbedding,
    latents: Tensor<3>,
    settings: DenoiseSettings,
    mut on_step: impl FnMut(usize, &Tensor<3>, &Tensor<3>),
) -> Tensor<3> {
    let [batch, image_tokens, _] = latents.dims();
    let sigmas = scheduler.sigmas(settings.num_inference_steps, image_tokens);
    let mut positions = text_positions(text.sequence.dims()[1]);
    positions.extend(image_positions(
        settings.latent_height,
        settings.latent_width,
    ));
    let mut latents = latents;
    for (step, pair) in sigmas.windows(2).enumerate() {
        let velocity = transformer.forward(FluxInput {
            img: latents.clone(),
            txt: text.sequence.clone(),
            pooled: text.pooled.clone(),
            sigma: vec![pair[0]; batch],
            guidance: vec![settings.guidance_scale; batch],
            positions: positions.clone(),
        });
        latents = euler_step(latents, velocity.clone(), pair[0], pair[1]);
        on_step(step, &velocity, &latents);
    }
    latents
}
