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
use lora_core::files::quantised::Stored;
use lora_core::files::safetensors::TensorSet;
use lora_core::frozen::hold;

pub use self::layout::Layout;
use self::layout::Location;
use self::load::Load;
pub use self::parameters::{change_parameters, checkpoint_tensors, tensors_of};
pub use self::sizes::{BlockSize, Sizes};
pub use self::storage::BaseDtype;
use self::storage::{Read, Storage};
pub use self::stream::Stream;
use crate::error::WeightsError;
use crate::found;
use crate::network::Network;

mod architecture;
mod find;
mod layout;
mod load;
mod parameters;
mod sizes;
mod storage;
mod stream;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_base;
#[cfg(test)]
mod tests_few_bits;
mod walk;

/// How the base weights of a network are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Base {
    /// What the weights of linear layers are kept as.
    pub dtype: BaseDtype,
    /// Whether blocks are read from the checkpoint each time they are needed, and not kept.
    pub is_streamed: bool,
}

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

    /// What a tensor is stored as.
    fn storage(&self, key: &str) -> Option<Storage> {
        let name = format!("{}{key}", self.prefix);
        match self.quantised.get(&name) {
            Some(stored) => Some(Storage::FewBits(stored.bits())),
            None => Some(Storage::Dense(self.tensors.info(&name)?.dtype)),
        }
    }

    fn read(&self, location: &Location) -> Result<Read, WeightsError> {
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

    /// Fills `module` with this checkpoint's values on `device`, without gradients; the weights of linear layers are kept as
    /// `base` says.
    ///
    /// # Errors
    /// A tensor that is missing, left over, of another shape, or not finite.
    pub fn load<M: Module>(
        &self,
        module: M,
        layout: Layout,
        base: BaseDtype,
        device: &Device,
    ) -> Result<M, WeightsError> {
        self.fill(module, &mut Load::new(self, layout, base, device))
    }

    /// As [`load`](Self::load), but the parts of `module` at the paths `blocks` get no values; the stream has them, in this
    /// order.
    ///
    /// # Errors
    /// As [`load`](Self::load); the values in blocks are looked at when they are read.
    pub(crate) fn stream<M: Module>(
        self,
        module: M,
        blocks: Vec<String>,
        layout: Layout,
        base: BaseDtype,
        device: &Device,
    ) -> Result<(M, Stream), WeightsError> {
        let mut load = Load::new(&self, layout, base, device);
        load.streamed = blocks.into_iter().map(|path| (path, Vec::new())).collect();
        let module = self.fill(module, &mut load)?;
        let blocks = load.streamed.into_iter().map(|(_, found)| found).collect();
        Ok((module, Stream::new(self, base, device, blocks)))
    }

    /// A network whose blocks are streamed if `base` says so.
    ///
    /// # Errors
    /// As [`load`](Self::load) or [`stream`](Self::stream).
    pub(crate) fn load_network<N: Network>(
        self,
        network: N,
        layout: Layout,
        base: Base,
        device: &Device,
    ) -> Result<N, WeightsError> {
        if !base.is_streamed {
            return self.load(network, layout, base.dtype, device);
        }
        let blocks = (0..network.count()).map(|i| network.path(i)).collect();
        let (network, stream) = self.stream(network, blocks, layout, base.dtype, device)?;
        Ok(network.with_stream(stream))
    }

    fn fill<M: Module>(&self, module: M, load: &mut Load<'_>) -> Result<M, WeightsError> {
        let module = module.map(load);
        if let Some(error) = load.error.take() {
            return Err(error);
        }
        let unused: Vec<&str> = self.names().filter(|key| !load.is_used(key)).collect();
        match unused.first() {
            None => Ok(hold(module, std::mem::take(&mut load.held))
                .expect("they are of the network's shapes")),
            Some(key) => Err(WeightsError::Leftover {
                path: self.path.clone(),
                key: key.to_string(),
                count: unused.len(),
            }),
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
