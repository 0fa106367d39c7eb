//! A diffusers pipeline folder: where its components are, and how the ones that families share are loaded.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lora_core::files::strict_json::{parse_json, read_file};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::autoencoder::{Autoencoder, AutoencoderConfig};
use crate::error::WeightsError;
use crate::found::check_pipeline;
use crate::text::clip::{ClipConfig, ClipText};
use crate::text::t5::{T5Config, T5Encoder};
use crate::weights::{BaseDtype, Checkpoint, Layout};

/// Largest `config.json` read, in bytes; real ones stay below 10 KiB.
const MAX_CONFIG: u64 = 1 << 20;

/// Where the components of a pipeline are.
#[derive(Debug, Clone)]
pub struct PipelineFolder {
    root: PathBuf,
    index: Value,
    transformer: PathBuf,
    autoencoder: PathBuf,
}

impl PipelineFolder {
    /// Opens a folder with `model_index.json`.
    ///
    /// # Errors
    /// No such folder, something else than a pipeline, or an index that does not parse.
    pub fn open(root: &Path) -> Result<Self, WeightsError> {
        check_pipeline(root)?;
        Ok(Self {
            root: root.into(),
            index: read_json(&root.join("model_index.json"))?,
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

    /// `model_index.json`.
    pub fn index(&self) -> &Value {
        &self.index
    }

    /// The pipeline's class in diffusers, which tells its family.
    pub fn class(&self) -> &str {
        let class = self.index.get("_class_name").and_then(Value::as_str);
        class.unwrap_or("file without `_class_name`")
    }

    /// Folder or single file of the transformer.
    pub fn transformer_path(&self) -> &Path {
        &self.transformer
    }

    /// Folder or single file of the autoencoder.
    pub fn autoencoder_path(&self) -> &Path {
        &self.autoencoder
    }

    /// Parses `<component>/<file>` and checks it.
    ///
    /// # Errors
    /// No such file, or one that `problem` finds fault with.
    pub fn config<T: DeserializeOwned>(
        &self,
        file: &str,
        problem: impl Fn(&T) -> Option<String>,
    ) -> Result<T, WeightsError> {
        read_config(&self.root.join(file), problem)
    }
}

/// Loads an autoencoder from a component folder or a single file in either layout.
///
/// # Errors
/// A malformed file, or a tensor that is missing, left over or of another shape.
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
    let autoencoder = Autoencoder::new(&config, device);
    checkpoint.load(autoencoder, layout, BaseDtype::F32, device)
}

/// Loads a CLIP text encoder from a component folder.
///
/// # Errors
/// A malformed file, or a tensor that is missing, left over or of another shape.
pub fn load_clip(folder: &Path, device: &Device) -> Result<ClipText, WeightsError> {
    let config = read_config(&folder.join("config.json"), ClipConfig::problem)?;
    let clip = ClipText::new(&config, device);
    Checkpoint::open(folder)?.load(clip, Layout::Clip, BaseDtype::AsStored, device)
}

/// Opens a T5 encoder in a component folder.
///
/// # Errors
/// A malformed file, or a tensor that is missing, left over or of another shape.
pub fn load_t5(folder: &Path, device: &Device) -> Result<T5Encoder, WeightsError> {
    let config = read_config(&folder.join("config.json"), T5Config::problem)?;
    T5Encoder::open(&config, Checkpoint::open(folder)?, device)
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
pub(crate) fn read_config<T: DeserializeOwned>(
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
