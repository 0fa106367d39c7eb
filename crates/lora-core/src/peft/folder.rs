//! An adapter as the folder that PEFT's `save_pretrained` writes and `from_pretrained` reads: `adapter_config.json` and
//! `adapter_model.safetensors`, whose keys start with `base_model.model.`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::LoraError;
use crate::files::replace::replace_file;
use crate::files::safetensors::{TensorFile, write_tensors};
use crate::peft::config::LoraConfig;
use crate::peft::file::AdapterFile;

/// The configuration's file in a folder.
pub const CONFIG: &str = "adapter_config.json";
/// The tensors' file in a folder.
pub const TENSORS: &str = "adapter_model.safetensors";
/// What every key starts with.
pub const PREFIX: &str = "base_model.model.";

/// The text of the configuration's file, for inference; `more` are fields that describe the model.
pub fn config_json(
    config: &LoraConfig,
    more: impl IntoIterator<Item = (&'static str, Value)>,
) -> String {
    let mut fields: BTreeMap<String, Value> = config.to_peft("").into_iter().collect();
    fields.insert("inference_mode".into(), true.into());
    fields.extend(
        more.into_iter()
            .map(|(key, value)| (key.to_string(), value)),
    );
    // Numbers, strings and lists always have a text form.
    serde_json::to_string_pretty(&fields).unwrap_or_default() + "\n"
}

impl AdapterFile {
    /// Reads the folder `dir`.
    ///
    /// # Errors
    /// A file that is missing or malformed; tensors and configuration that disagree; a tensor that is no adapter parameter.
    pub fn load_peft(dir: &Path) -> Result<Self, LoraError> {
        let config = LoraConfig::from_peft(&dir.join(CONFIG))?;
        let tensors = TensorFile::open(&dir.join(TENSORS))?;
        Self::parse(&tensors, tensors.names(), PREFIX, Some(&config))
    }

    /// Writes the folder `dir`, which is created if need be, with what [`to_plain`](Self::to_plain) gives; each file is
    /// replaced whole or not at all.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save_peft(&self, dir: &Path) -> Result<(), LoraError> {
        std::fs::create_dir_all(dir).map_err(|source| io(dir, source))?;
        let plain = self.to_plain();
        let config = config_json(&plain.peft_config(), []);
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let replace = |name: &str, write: &dyn Fn(&mut dyn Write) -> std::io::Result<()>| {
            let path = dir.join(name);
            replace_file(&path, write).map_err(|source| io(&path, source))
        };
        replace(CONFIG, &|file| file.write_all(config.as_bytes()))?;
        replace(TENSORS, &|file| {
            write_tensors(file, &plain.tensors(PREFIX), &metadata)
        })
    }
}

fn io(path: &Path, source: std::io::Error) -> LoraError {
    LoraError::Io {
        path: PathBuf::from(path),
        source,
    }
}
