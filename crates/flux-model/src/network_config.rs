//! Loading a velocity network: what its configuration states, what its tensors tell, and that the two agree.

use std::path::Path;

use burn::tensor::Device;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::WeightsError;
use crate::network::Network;
use crate::pipeline::read_config;
use crate::sizes::differences;
use crate::weights::{Base, Checkpoint, Layout};

/// The configuration of a family's velocity network, as its `config.json` has it.
pub trait NetworkConfig: Clone + PartialEq + Serialize + DeserializeOwned {
    /// The network that it describes.
    type Network: Network;

    /// What is wrong with it, if anything.
    fn problem(&self) -> Option<String>;

    /// The layout of a checkpoint, and its architecture as far as tensor shapes tell it; what is in no tensor is `hint`'s.
    ///
    /// # Errors
    /// A file that holds no network of this family.
    fn of_tensors(
        checkpoint: &Checkpoint,
        hint: Option<&Self>,
    ) -> Result<(Layout, Self), WeightsError>;

    /// With what may be left out written down, so that two ways to state one architecture are equal.
    #[must_use]
    fn normalized(&self) -> Self;

    /// Every value in which this configuration is not `found`, that of the tensors, in words; none where they are one
    /// architecture.
    fn difference(&self, found: &Self) -> Option<String> {
        let (stated, found) = (self.normalized(), found.normalized());
        (stated != found).then(|| differences(&stated, &found))
    }

    /// The network, with lazily initialised weights: nothing is allocated until a weight is read or loaded.
    fn network(&self, device: &Device) -> Self::Network;

    /// From JSON.
    ///
    /// # Errors
    /// What describes no network of this family, in words.
    fn parse(config: Value) -> Result<Self, String> {
        let config: Self = serde_json::from_value(config).map_err(|error| error.to_string())?;
        match config.problem() {
            None => Ok(config),
            Some(problem) => Err(problem),
        }
    }

    /// Opens a component folder or a single file in either layout: its files, and the architecture that they hold. A folder
    /// states its own; for a file `stated` says what is in no tensor.
    ///
    /// # Errors
    /// A malformed file, or shapes that disagree with the folder's configuration.
    fn open(
        path: &Path,
        stated: Option<&Self>,
    ) -> Result<(Checkpoint, Layout, Self), WeightsError> {
        let own: Option<Self> = match path.is_dir() {
            true => Some(read_config(&path.join("config.json"), Self::problem)?),
            false => None,
        };
        let checkpoint = Checkpoint::open(path)?;
        let (layout, found) = Self::of_tensors(&checkpoint, own.as_ref().or(stated))?;
        match own.and_then(|own| own.difference(&found)) {
            None => Ok((checkpoint, layout, found)),
            Some(reason) => Err(WeightsError::Config {
                path: checkpoint.path().into(),
                reason,
            }),
        }
    }

    /// Loads a network from a component folder or a single file in either layout, its base weights held as `base` says.
    ///
    /// # Errors
    /// As [`open`](Self::open), or a tensor that is missing or left over.
    fn load(
        path: &Path,
        stated: Option<&Self>,
        base: Base,
        device: &Device,
    ) -> Result<Self::Network, WeightsError> {
        let (checkpoint, layout, config) = Self::open(path, stated)?;
        checkpoint.load_network(config.network(device), layout, base, device)
    }
}
