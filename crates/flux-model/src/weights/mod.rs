//! Loading: from a checkpoint's tensors into a network, each tensor used exactly or named in an error.
//!
//! A network's parameter path is its diffusers key, but for two things Burn does otherwise: norms call their parameters
//! `gamma` and `beta`, and a linear weight is `[in, out]`. Single files in BFL's layout are read through [`keys`].
//!
//! [`keys`]: mod@crate::flux1::keys

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use lora_core::files::host::HostTensor;
use lora_core::files::quantised::Stored;
use lora_core::files::safetensors::TensorSet;

pub use self::layout::Layout;
use self::layout::Location;
use self::load::Load;
pub use self::parameters::{change_parameters, checkpoint_tensors, tensors_of};
use crate::error::WeightsError;
use crate::found;

mod architecture;
mod layout;
mod load;
mod parameters;
#[cfg(test)]
mod tests;
mod walk;

/// A checkpoint opened for one network: its tensors, without the prefix that an all-in-one file puts before them.
pub struct Checkpoint {
    tensors: TensorSet,
    /// Weights in few bits, by their name with prefix.
    quantised: BTreeMap<String, Stored>,
    /// To which of them a tensor belongs.
    parts: BTreeMap<String, String>,
    prefix: &'static str,
    path: PathBuf,
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
        })
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

    fn read(&self, location: &Location) -> Result<HostTensor, WeightsError> {
        let name = format!("{}{}", self.prefix, location.key);
        if let Some(stored) = self.quantised.get(&name) {
            let tensor = stored.read(&self.tensors, location.rows.clone())?;
            return Ok(HostTensor::from_f32(tensor.shape(), &tensor.to_f32()));
        }
        Ok(match &location.rows {
            Some(rows) => self.tensors.read_rows(&name, rows.clone())?,
            None => self.tensors.read(&name)?,
        })
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

    /// Fills `module` with this checkpoint's values as f32 on `device`, without gradients.
    ///
    /// # Errors
    /// A tensor that is missing, left over, of another shape, or not finite.
    pub fn load<M: Module>(
        &self,
        module: M,
        layout: Layout,
        device: &Device,
    ) -> Result<M, WeightsError> {
        let mut load = Load::new(self, layout, device);
        let module = module.map(&mut load);
        if let Some(error) = load.error {
            return Err(error);
        }
        let unused: Vec<&str> = self.names().filter(|key| !load.is_used(key)).collect();
        match unused.first() {
            None => Ok(module),
            Some(key) => Err(WeightsError::Leftover {
                path: self.path.clone(),
                key: key.to_string(),
                count: unused.len(),
            }),
        }
    }

    /// Fills `module`, which is the part at `path` of the network in this checkpoint; other tensors are not looked at.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or not finite.
    pub(crate) fn load_part<M: Module>(
        &self,
        module: M,
        path: &str,
        device: &Device,
    ) -> Result<M, WeightsError> {
        let mut load = Load::new(self, Layout::Diffusers, device);
        load.walk.path.extend(path.split('.').map(String::from));
        let module = module.map(&mut load);
        match load.error {
            None => Ok(module),
            Some(error) => Err(error),
        }
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
        let values = self.read(&location)?.to_f32();
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
