//! The files a LoRA consists of, and the configurations beside and inside them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_core::LoraConfig;
use lora_core::files::safetensors::TensorFile;
use lora_core::peft::folder::{CONFIG as PEFT_CONFIG, TENSORS as PEFT_WEIGHTS};

use super::Component;
use super::error::LoraFormatError;

const DIFFUSERS_WEIGHTS: &str = "pytorch_lora_weights.safetensors";
/// In the run folders and checkpoints of this project.
const RUN_WEIGHTS: &str = "lora.safetensors";
/// End of the name of the file that lists the shards of a checkpoint.
const INDEX: &str = ".safetensors.index.json";
const CHECKPOINT_ADVICE: &str =
    "a whole model is part of a pipeline folder (`--model`, `model.path`)";

/// One file of the LoRA, with the configuration beside it.
pub(super) struct Source {
    pub file: Arc<TensorFile>,
    pub config: Option<LoraConfig>,
    /// Configurations in the header, by component.
    pub header: BTreeMap<Component, LoraConfig>,
}

impl Source {
    fn open(path: &Path, config: Option<&Path>) -> Result<Self, LoraFormatError> {
        let file = Arc::new(TensorFile::open(path)?);
        let config = config.map(LoraConfig::from_peft).transpose()?;
        let mut header = BTreeMap::new();
        for component in Component::ALL {
            let config = LoraConfig::from_header(&file, &format!("{component}."))?;
            header.extend(config.map(|config| (component, config)));
        }
        if header.is_empty() {
            // Saved by the network itself, without a prefix.
            let config = LoraConfig::from_header(&file, "")?;
            header.extend(config.map(|config| (Component::Transformer, config)));
        }
        Ok(Self {
            file,
            config,
            header,
        })
    }

    /// What says alpha for a component, apart from its tensors.
    pub(super) fn config(&self, component: Component) -> Option<&LoraConfig> {
        self.config.as_ref().or_else(|| self.header.get(&component))
    }
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
        if path.is_file() && path.to_string_lossy().ends_with(INDEX) {
            return Err(LoraFormatError::OtherFolder {
                path: path.into(),
                what: "the index of a checkpoint in several files",
                advice: CHECKPOINT_ADVICE,
            });
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
    if sources.is_empty() {
        sources.push(Source::open(&single_file(path)?, None)?);
    }
    Ok(sources)
}

/// The one file of a folder that is meant: diffusers', that of a run of this program, or the only one.
fn single_file(folder: &Path) -> Result<PathBuf, LoraFormatError> {
    for name in [DIFFUSERS_WEIGHTS, RUN_WEIGHTS] {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    let other = |what, advice| LoraFormatError::OtherFolder {
        path: folder.into(),
        what,
        advice,
    };
    if folder.join("model_index.json").is_file() {
        let advice = "give it as `--model`, or as `model.path` in a run's configuration";
        return Err(other("a whole pipeline", advice));
    }
    let entries = std::fs::read_dir(folder).map_err(LoraFormatError::io(folder))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(LoraFormatError::io(folder))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    if names.iter().any(|name| name.ends_with(INDEX)) {
        return Err(other("a checkpoint in several files", CHECKPOINT_ADVICE));
    }
    if folder.join("snapshots").is_dir() && folder.join("blobs").is_dir() {
        let advice = "give the folder inside its `snapshots`";
        return Err(other("a cache folder of the Hugging Face Hub", advice));
    }
    if names.iter().any(|name| name.starts_with("ckpt-")) {
        let advice = "give one of its checkpoints, or train to the end";
        return Err(other("a run folder that has no finished LoRA", advice));
    }
    names.retain(|name| name.ends_with(".safetensors"));
    match names.as_slice() {
        [] => Err(LoraFormatError::NoAdapter {
            path: folder.into(),
        }),
        [name] => Ok(folder.join(name)),
        _ => Err(LoraFormatError::Several {
            path: folder.into(),
            count: names.len(),
            names: names.iter().take(3).cloned().collect(),
        }),
    }
}

fn pickle_in(folder: &Path) -> Option<PathBuf> {
    let names = ["adapter_model.bin", "pytorch_lora_weights.bin"];
    names
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
}
