//! The files a LoRA consists of, and the configurations beside and inside them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_core::METADATA_KEY;
use lora_core::files::safetensors::TensorFile;
use lora_core::files::strict_json::{parse_json, read_file};
use serde_json::{Map, Value};

use super::Component;
use super::error::LoraFormatError;
use super::peft::{PeftConfig, header_config};

const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
const PEFT_CONFIG: &str = "adapter_config.json";
const DIFFUSERS_WEIGHTS: &str = "pytorch_lora_weights.safetensors";
/// Largest adapter configuration read, in bytes; one that names every module stays below one MiB.
const MAX_CONFIG: u64 = 16 << 20;

/// One file of the LoRA, with the configuration beside it.
pub(super) struct Source {
    pub file: Arc<TensorFile>,
    pub config: Option<PeftConfig>,
    /// Configurations in the header, by component.
    pub header: BTreeMap<Component, PeftConfig>,
}

impl Source {
    fn open(path: &Path, config: Option<&Path>) -> Result<Self, LoraFormatError> {
        let file = Arc::new(TensorFile::open(path)?);
        let config = config.map(read_config).transpose()?;
        let mut header = BTreeMap::new();
        if let Some(text) = file.metadata().get(METADATA_KEY) {
            let fields: Map<String, Value> =
                parse_json(text.as_bytes()).map_err(|source| LoraFormatError::Json {
                    path: path.into(),
                    part: METADATA_KEY,
                    source,
                })?;
            for component in Component::ALL {
                let config = header_config(&fields, component).map_err(config_error(path))?;
                header.extend(config.map(|config| (component, config)));
            }
        }
        Ok(Self {
            file,
            config,
            header,
        })
    }

    /// What says alpha for a component, apart from its tensors.
    pub(super) fn config(&self, component: Component) -> Option<&PeftConfig> {
        self.config.as_ref().or_else(|| self.header.get(&component))
    }
}

fn config_error(path: &Path) -> impl Fn(String) -> LoraFormatError {
    move |problem| LoraFormatError::Config {
        path: path.into(),
        problem,
    }
}

fn read_config(path: &Path) -> Result<PeftConfig, LoraFormatError> {
    let text = read_file(path, MAX_CONFIG).map_err(LoraFormatError::io(path))?;
    let fields: Map<String, Value> = parse_json(&text).map_err(|source| LoraFormatError::Json {
        path: path.into(),
        part: "adapter configuration",
        source,
    })?;
    PeftConfig::parse(&fields).map_err(config_error(path))
}

/// The files that make up the LoRA at `path`.
pub(super) fn locate(path: &Path) -> Result<Vec<Source>, LoraFormatError> {
    if !path.is_dir() {
        let is_pickle = |ext: &std::ffi::OsStr| {
            ["bin", "pt", "pth", "ckpt"]
                .iter()
                .any(|pickle| ext == *pickle)
        };
        if path.is_file() && path.extension().is_some_and(is_pickle) {
            return Err(LoraFormatError::Pickle { path: path.into() });
        }
        let beside = path.with_file_name(PEFT_CONFIG);
        let is_peft = path.file_name().is_some_and(|name| name == PEFT_WEIGHTS) && beside.is_file();
        return Ok(vec![Source::open(path, is_peft.then_some(&beside))?]);
    }
    let mut sources = Vec::new();
    let subfolders =
        [Component::ClipL, Component::T5].map(|component| path.join(component.to_string()));
    for folder in std::iter::once(path.to_path_buf()).chain(subfolders) {
        let (weights, config) = (folder.join(PEFT_WEIGHTS), folder.join(PEFT_CONFIG));
        if weights.is_file() {
            sources.push(Source::open(&weights, config.is_file().then_some(&config))?);
        } else if let Some(pickle) = pickle_in(&folder) {
            return Err(LoraFormatError::Pickle { path: pickle });
        }
    }
    let single = path.join(DIFFUSERS_WEIGHTS);
    if sources.is_empty() && single.is_file() {
        sources.push(Source::open(&single, None)?);
    }
    if sources.is_empty() {
        return Err(LoraFormatError::NoAdapter { path: path.into() });
    }
    Ok(sources)
}

fn pickle_in(folder: &Path) -> Option<PathBuf> {
    let names = ["adapter_model.bin", "pytorch_lora_weights.bin"];
    names
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
}
