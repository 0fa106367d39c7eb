//! A checkpoint opened for one network, and its tensors by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use lora_core::files::quantised::Stored;
use lora_core::files::safetensors::TensorSet;

use super::kept::KeptWeights;
use super::layout::Location;
use super::storage::{Read, Storage};
use crate::error::WeightsError;
use crate::found;

/// A checkpoint opened for one network: its tensors, without the prefix that an all-in-one file puts before them.
pub struct Checkpoint {
    tensors: TensorSet,
    /// Weights in few bits, by their name with prefix.
    quantised: BTreeMap<String, Stored>,
    /// To which of them a tensor belongs.
    parts: BTreeMap<String, String>,
    prefix: &'static str,
    pub(super) path: PathBuf,
    /// Weights that were made from it, in few bits.
    pub(super) kept: Option<KeptWeights>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, a shard index, or a component folder with either.
    ///
    /// # Errors
    /// Nothing to open, or a malformed file.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let file = if path.is_dir() {
            found::component_file(path)?
        } else {
            path.to_path_buf()
        };
        let tensors = TensorSet::open(&file)?;
        if let Some(program) = found::quantised(tensors.names()) {
            return Err(WeightsError::Unusable {
                path: file,
                what: format!(
                    "is quantised by {program}, which is not read here; take the bf16 or fp8 checkpoint, or one by bitsandbytes"
                ),
            });
        }
        let quantised = Stored::all(&tensors)?;
        let parts = quantised.iter().flat_map(|(weight, stored)| {
            stored
                .parts()
                .map(|part| (part.to_string(), weight.clone()))
        });
        let prefix = ["model.diffusion_model.", "diffusion_model."]
            .into_iter()
            .find(|prefix| tensors.names().any(|name| name.starts_with(prefix)))
            .unwrap_or_default();
        Ok(Self {
            tensors,
            parts: parts.collect(),
            quantised,
            prefix,
            path: file,
            kept: None,
        })
    }

    /// Takes what `kept` has from there; it was made from this checkpoint.
    pub(crate) fn keeping(self, kept: Option<KeptWeights>) -> Self {
        Self { kept, ..self }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, without prefix.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors
            .names()
            .filter_map(|name| name.strip_prefix(self.prefix))
    }

    /// Shape of a tensor, by its name without prefix; of one in few bits, the shape that it stands for.
    pub(crate) fn shape(&self, key: &str) -> Option<&[usize]> {
        let name = format!("{}{key}", self.prefix);
        match self.quantised.get(&name) {
            Some(stored) => Some(stored.shape()),
            None => Some(&self.tensors.info(&name)?.shape),
        }
    }

    /// What a tensor is stored as.
    pub(super) fn storage(&self, key: &str) -> Option<Storage> {
        let name = format!("{}{key}", self.prefix);
        match self.quantised.get(&name) {
            Some(stored) => Some(Storage::FewBits(stored.bits())),
            None => Some(Storage::Dense(self.tensors.info(&name)?.dtype)),
        }
    }

    pub(super) fn read(&self, location: &Location) -> Result<Read, WeightsError> {
        let name = format!("{}{}", self.prefix, location.key);
        if let Some(stored) = self.quantised.get(&name) {
            let tensor = stored.read(&self.tensors, location.rows.clone())?;
            return Ok(Read::FewBits(tensor));
        }
        Ok(Read::Dense(match &location.rows {
            Some(rows) => self.tensors.read_rows(&name, rows.clone())?,
            None => self.tensors.read(&name)?,
        }))
    }

    /// The bytes of a tensor that is not in few bits where the file is mapped, if that can be.
    pub(super) fn map(&self, location: &Location) -> Result<Option<Bytes>, WeightsError> {
        let name = format!("{}{}", self.prefix, location.key);
        Ok(self.tensors.map(&name, location.rows.clone())?)
    }

    /// The weight in few bits that a tensor belongs to, both without prefix.
    pub(crate) fn owner(&self, key: &str) -> Option<&str> {
        let weight = self.parts.get(&format!("{}{key}", self.prefix))?;
        weight.strip_prefix(self.prefix)
    }

    /// One more than the largest index after `prefix`.
    pub(crate) fn blocks(&self, prefix: &str) -> usize {
        self.names()
            .filter_map(|name| {
                name.strip_prefix(prefix)?
                    .split('.')
                    .next()?
                    .parse::<usize>()
                    .ok()
            })
            .max()
            .map_or(0, |index| index.saturating_add(1))
    }

    /// One row of the matrix `key`, as f32.
    ///
    /// # Errors
    /// No such row, or a value that is not finite.
    pub(crate) fn row(&self, key: &str, row: usize) -> Result<Vec<f32>, WeightsError> {
        let location = Location {
            key: key.into(),
            rows: Some(row..row + 1),
            swap_halves: false,
            pointwise: false,
        };
        let values = self.read(&location)?.dense().to_f32();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(WeightsError::NotFinite {
                path: self.path.clone(),
                key: key.into(),
                index: row * values.len() + index,
            }),
        }
    }
}
