//! An adapter as the folder that PEFT's `save_pretrained` writes and `from_pretrained` reads: `adapter_config.json` and
//! `adapter_model.safetensors`, whose keys start with `base_model.model.`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::LoraError;
use crate::files::replace::replace_file;
use crate::files::safetensors::{TensorFile, write_tensors};
use crate::files::strict_json::parse_json;
use crate::peft::file::AdapterFile;
use crate::peft::form;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

impl AdapterFile {
    /// Reads the folder `dir`.
    ///
    /// # Errors
    /// A file that is missing or malformed; tensors and configuration that disagree; a tensor that is no adapter parameter.
    pub fn load_peft(dir: &Path) -> Result<Self, LoraError> {
        let path = dir.join(CONFIG);
        let text = std::fs::read(&path).map_err(|source| io(&path, source))?;
        let json = |source| LoraError::Json {
            what: path.display().to_string(),
            source,
        };
        let fields: Map<String, Value> = parse_json(&text).map_err(json)?;
        form::check_is_update(&fields, &format!("`{}`", path.display()))?;
        let config = form::from_fields(fields).map_err(json)?;
        let config = config.ok_or_else(|| {
            LoraError::Config(format!("`{}` configures no adapter", path.display()))
        })?;
        config.validate()?;
        Self::parse(
            &TensorFile::open(&dir.join(TENSORS))?,
            PREFIX,
            Some(&config),
        )
    }

    /// Writes the folder `dir`, which is created if need be, with what [`to_plain`](Self::to_plain) gives; each file is
    /// replaced whole or not at all.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save_peft(&self, dir: &Path) -> Result<(), LoraError> {
        std::fs::create_dir_all(dir).map_err(|source| io(dir, source))?;
        let plain = self.to_plain();
        let mut fields: BTreeMap<String, Value> =
            form::fields(&plain.peft_config()).into_iter().collect();
        fields.insert("inference_mode".into(), true.into());
        let config = serde_json::to_vec_pretty(&fields).unwrap_or_default();
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let replace = |name: &str, write: &dyn Fn(&mut dyn Write) -> std::io::Result<()>| {
            let path = dir.join(name);
            replace_file(&path, write).map_err(|source| io(&path, source))
        };
        replace(CONFIG, &|file| file.write_all(&config))?;
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
