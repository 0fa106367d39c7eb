//! `[validation]`: the loss on pictures that are not trained on.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::dataset::check_beside;
use super::rules::{Invalid, Rule, check_at_least_1, check_count, check_path, check_seed};

/// The loss on pictures that are not trained on, at noise and noise levels that never change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationSection {
    /// Folder of held-out images with captions, in the forms of `dataset.path`. This or `share` is required in this section.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Folder of the reference pictures of those in `path`, as `dataset.reference`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
    /// Folder of the masks of those in `path`, as `dataset.mask`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<PathBuf>,
    /// Share of the dataset to hold out, above 0 and below 1; the same samples whenever the run goes on. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Validate each time this many optimizer steps are done. Default 100.
    pub every: u64,
    /// Bands of equal width that the noise levels are cut into; each sample is tried once in each, at a level of its own. Default
    /// 4.
    pub bands: usize,
    /// Stop when the loss has not fallen for this many validations. Default: none, to go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// Seed of the noise, the levels and the share. Default 42.
    pub seed: u64,
}

impl Default for ValidationSection {
    fn default() -> Self {
        Self {
            path: None,
            reference: None,
            mask: None,
            share: None,
            every: 100,
            bands: 4,
            patience: None,
            seed: 42,
        }
    }
}

impl ValidationSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        match (&self.path, self.share) {
            (None, None) => {
                let problem = "or `validation.share` is required: name a folder of held-out pictures, or the share of the dataset to hold out";
                return Err(("validation.path", problem.into()));
            }
            (Some(_), Some(_)) => {
                let problem =
                    "cannot be given with `validation.path`: hold out a share, or name a folder";
                return Err(("validation.share", problem.into()));
            }
            (path, share) => {
                check_path("validation.path", path.as_deref())?;
                let rule = Rule("above 0 and below 1", |x| x > 0.0 && x < 1.0);
                share.map_or(Ok(()), |share| rule.check("validation.share", share))?;
            }
        }
        let (reference, mask) = (self.reference.as_deref(), self.mask.as_deref());
        match &self.path {
            Some(path) => {
                let keys = ["validation.path", "validation.reference", "validation.mask"];
                check_beside(keys, path, reference, mask)?;
            }
            None if reference.is_some() || mask.is_some() => {
                let key = if reference.is_some() {
                    "validation.reference"
                } else {
                    "validation.mask"
                };
                let problem = "has no effect without `validation.path`: a share of the dataset has what is beside it there";
                return Err((key, problem.into()));
            }
            None => {}
        }
        check_at_least_1("validation.every", self.every)?;
        check_count("validation.bands", self.bands, 64)?;
        (self.patience).map_or(Ok(()), |n| check_at_least_1("validation.patience", n))?;
        check_seed("validation.seed", self.seed)
    }
}
