//! The autoencoder of a FLUX.1 pipeline, which is one of two classes: AutoencoderKL, or the tiny one.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::autoencoder::{Autoencoder, AutoencoderConfig};
use crate::error::WeightsError;
use crate::pipeline::{PipelineFolder, load_autoencoder, read_config};
use crate::tiny_autoencoder::{TinyAutoencoder, TinyAutoencoderConfig};
use crate::weights::{BaseDtype, Checkpoint, Layout};

/// `vae/config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub enum VaeConfig {
    /// AutoencoderKL.
    Kl(AutoencoderConfig),
    /// AutoencoderTiny.
    Tiny(TinyAutoencoderConfig),
}

impl TryFrom<Value> for VaeConfig {
    type Error = serde_json::Error;

    fn try_from(value: Value) -> Result<Self, serde_json::Error> {
        match value.get("_class_name").and_then(Value::as_str) {
            Some("AutoencoderTiny") => serde_json::from_value(value).map(Self::Tiny),
            _ => serde_json::from_value(value).map(Self::Kl),
        }
    }
}

impl VaeConfig {
    /// The architecture of a pipeline's autoencoder, without its weights.
    ///
    /// # Errors
    /// A configuration that is missing or describes no autoencoder, a single file that cannot be opened.
    pub fn of_folder(folder: &PipelineFolder) -> Result<Self, WeightsError> {
        let stated = || folder.config("vae/config.json", Self::problem);
        let path = folder.autoencoder_path();
        if path == folder.root().join("vae") {
            return stated();
        }
        Ok(Self::at(path)?.unwrap_or(stated()?))
    }

    /// What a component folder, or a single file of the tiny class, says of itself; `None` for other single files.
    fn at(path: &Path) -> Result<Option<Self>, WeightsError> {
        if path.is_dir() {
            return read_config(&path.join("config.json"), Self::problem).map(Some);
        }
        let checkpoint = Checkpoint::open(path)?;
        Ok(match checkpoint.shape("decoder.layers.0.weight") {
            Some(&[_, latent_channels, _, _]) => Some(Self::Tiny(TinyAutoencoderConfig {
                latent_channels,
                ..TinyAutoencoderConfig::taef1()
            })),
            _ => None,
        })
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        match self {
            Self::Kl(config) => config.problem(),
            Self::Tiny(config) => config.problem(),
        }
    }

    /// Channels of the latent.
    pub fn latent_channels(&self) -> usize {
        match self {
            Self::Kl(config) => config.latent_channels,
            Self::Tiny(config) => config.latent_channels,
        }
    }

    /// Pixels per latent element and side.
    pub fn downscale(&self) -> usize {
        match self {
            Self::Kl(config) => config.downscale(),
            Self::Tiny(config) => config.downscale(),
        }
    }

    /// The transformer sees latents as `(z - shift) * scale`.
    pub fn shift_and_scale(&self) -> (f64, f64) {
        match self {
            Self::Kl(config) => (config.shift_factor.unwrap_or(0.0), config.scaling_factor),
            Self::Tiny(config) => (config.shift_factor, config.scaling_factor),
        }
    }
}

/// The autoencoder.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
pub enum Vae {
    /// AutoencoderKL.
    Kl(Autoencoder),
    /// AutoencoderTiny.
    Tiny(TinyAutoencoder),
}

impl Vae {
    /// A network with lazily initialised weights.
    pub fn new(config: &VaeConfig, device: &Device) -> Self {
        match config {
            VaeConfig::Kl(config) => Self::Kl(Autoencoder::new(config, device)),
            VaeConfig::Tiny(config) => Self::Tiny(TinyAutoencoder::new(config, device)),
        }
    }

    /// Loads a component folder or a single file; `config` says what a single file of AutoencoderKL does not.
    ///
    /// # Errors
    /// A malformed file, or a tensor that is missing, left over or of another shape.
    pub fn load(path: &Path, config: &VaeConfig, device: &Device) -> Result<Self, WeightsError> {
        match VaeConfig::at(path)? {
            Some(own @ VaeConfig::Tiny(_)) => {
                let network = Self::new(&own, device);
                Checkpoint::open(path)?.load(network, Layout::Diffusers, BaseDtype::F32, device)
            }
            _ => {
                let hint = match config {
                    VaeConfig::Kl(config) => Some(config),
                    VaeConfig::Tiny(_) => None,
                };
                load_autoencoder(path, hint, device).map(Self::Kl)
            }
        }
    }

    /// Mean and standard deviation of an image's latents; the tiny autoencoder is sure of them.
    ///
    /// # Shapes
    /// - `image`: `[batch, 3, height, width]` in `[-1, 1]`; returns `[batch, latent_channels, height / 8, width / 8]` twice
    pub fn encode(&self, image: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        match self {
            Self::Kl(vae) => {
                let distribution = vae.encode(image);
                let std = distribution.std();
                (distribution.mean, std)
            }
            Self::Tiny(vae) => {
                let latents = vae.encode(image);
                let std = latents.zeros_like();
                (latents, std)
            }
        }
    }

    /// # Shapes
    /// - `latents`: of model space, `[batch, latent_channels, h, w]`; returns `[batch, 3, 8 h, 8 w]`, roughly in `[-1, 1]`
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Kl(vae) => vae.decode(vae.from_model_space(latents)),
            Self::Tiny(vae) => vae.decode(vae.from_model_space(latents)),
        }
    }
}

/// Why latents of `own` are not what an autoencoder at `path` decodes, if so.
///
/// # Errors
/// As [`VaeConfig::of_folder`].
pub(super) fn preview_problem(
    own: &VaeConfig,
    path: &Path,
) -> Result<Option<String>, WeightsError> {
    let other = VaeConfig::at(path)?;
    let other = other.as_ref().unwrap_or(own);
    let (here, there) = (
        (own.latent_channels(), own.downscale()),
        (other.latent_channels(), other.downscale()),
    );
    Ok((here != there).then(|| {
        format!(
            "it decodes latents of {} channels at 1:{}, and the model's have {} at 1:{}",
            there.0, there.1, here.0, here.1
        )
    }))
}
