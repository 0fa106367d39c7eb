//! A run in a folder, for a training loop of one's own: what it needs to go on in the same bits.
//!
//! `adapter.safetensors` holds every bit of the adapter; `optimizer.safetensors` the optimizer's tensors, and in its header the rest
//! of its state, the caller's progress and the digest of the other file, so that two files of different saves are not taken for
//! one run.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::LoraError;
use crate::files::digest::digest_file;
use crate::files::replace::replace_file;
use crate::files::safetensors::{TensorFile, write_tensors};
use crate::files::strict_json::parse_json;
use crate::peft::{AdapterFile, LoraConfig};
use crate::training::optimizer::OptimizerState;
use crate::training::record::{Training, TrainingRecord};

const ADAPTER: &str = "adapter.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
/// Keys in the header of [`OPTIMIZER`].
const SCALARS: &str = "optimizer";
const PROGRESS: &str = "progress";
const ADAPTER_SHA256: &str = "adapter_sha256";

impl<M: Module, P: Serialize> Training<M, P> {
    /// Saves the adapter `name`, the optimizer's state and the progress in the folder `dir`, which is created if need be. Each
    /// file is replaced whole or not at all; where a power loss may come between the two, save each step in a folder of its own.
    ///
    /// # Errors
    /// As [`AdapterFile::from_model`]; a weight that is not finite; a file that cannot be written.
    pub fn save(
        &self,
        dir: &Path,
        name: &str,
        config: Option<&LoraConfig>,
    ) -> Result<(), LoraError> {
        let adapter = AdapterFile::from_model(&self.model, name, config)?;
        adapter.check_finite()?;
        let state = self.optimizer.state();
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let path = dir.join(ADAPTER);
        replace_file(&path, |out| adapter.write("", out)).map_err(io(&path))?;
        let digest = digest_file(&path).map_err(io(&path))?;
        let path = dir.join(OPTIMIZER);
        let json = |what: &str, json: serde_json::Result<String>| {
            json.map_err(|source| LoraError::Json {
                what: format!("`{what}` for {}", path.display()),
                source,
            })
        };
        let metadata = BTreeMap::from([
            (
                SCALARS.to_string(),
                json(SCALARS, serde_json::to_string(&state.scalars))?,
            ),
            (
                PROGRESS.to_string(),
                json(PROGRESS, serde_json::to_string(&self.progress))?,
            ),
            (ADAPTER_SHA256.to_string(), digest),
        ]);
        replace_file(&path, |out| write_tensors(out, &state.tensors, &metadata)).map_err(io(&path))
    }
}

impl<P: DeserializeOwned> TrainingRecord<P> {
    /// What [`Training::save`] has saved in `dir`.
    ///
    /// # Errors
    /// A file that is missing, malformed or of another save.
    pub fn load(dir: &Path) -> Result<Self, LoraError> {
        let path = dir.join(OPTIMIZER);
        let file = TensorFile::open(&path)?;
        let header = |key: &str| {
            file.metadata().get(key).ok_or_else(|| {
                let path = path.display();
                LoraError::Config(format!(
                    "`{path}` has no `{key}` in its header: no run was saved there"
                ))
            })
        };
        let adapter = dir.join(ADAPTER);
        if *header(ADAPTER_SHA256)? != digest_file(&adapter).map_err(io(&adapter))? {
            return Err(LoraError::Config(format!(
                "`{}` is not the file that `{OPTIMIZER}` beside it was saved with: take both from one save",
                adapter.display()
            )));
        }
        let malformed = |key: &str| {
            let what = format!("`{key}` of {}", path.display());
            move |source| LoraError::Json { what, source }
        };
        let scalars = parse_json(header(SCALARS)?.as_bytes()).map_err(malformed(SCALARS))?;
        let progress = parse_json(header(PROGRESS)?.as_bytes()).map_err(malformed(PROGRESS))?;
        let state = OptimizerState::from_file(&file, scalars)?;
        Ok(Self::new(AdapterFile::load(&adapter, "")?, state, progress))
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> LoraError {
    move |source| LoraError::Io {
        path: path.into(),
        source,
    }
}
