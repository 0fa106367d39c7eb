//! What changes between a recorded configuration and a new one, and whether a resumed run may take it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use toml::Table;

use super::error::ConfigError;
use super::run::RunConfig;
use crate::nearest::one_line;

/// What may change between stopping and resuming: keys, or whole sections where the entry ends in a dot.
///
/// Steps already taken keep their meaning. Any other change would silently make the resumed run differ from one that was
/// never stopped.
pub(super) const MAY_CHANGE_ON_RESUME: [&str; 25] = [
    // Where things are; what they hold is compared by digest.
    "model.path",
    "model.transformer",
    "model.vae",
    "dataset.path",
    "dataset.reference",
    "dataset.mask",
    // Another way to the same bits.
    "memory.",
    // Stops a run, and changes none.
    "train.divergence_factor",
    "train.steps",
    "optimizer.learning_rate",
    "optimizer.text_encoder_lr",
    "lr_scheduler.",
    "checkpoint.",
    "export.",
    "logging.",
    "sample.",
    // Looks on, but for the share that is held out.
    "validation.path",
    "validation.reference",
    "validation.mask",
    "validation.every",
    "validation.bands",
    "validation.patience",
    "validation.seed",
    "ema.sample",
    "ema.export",
];

/// One key that differs between two configurations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// `section.key`.
    pub key: String,
    /// Value before, as TOML writes it, or `unset`.
    pub old: String,
    /// Value after, as TOML writes it, or `unset`.
    pub new: String,
    /// Whether a run may take the new value on resume and still be exact.
    pub allowed: bool,
}

impl RunConfig {
    /// What changes from this configuration, the recorded one, to `new`, in the order of the keys.
    ///
    /// What steps already taken do not depend on is `allowed`: how many there will be, the learning rate and its schedule,
    /// `checkpoint`, `memory`, `sample` and where files are. Any other change would make the resumed run differ
    /// silently from one that was never stopped.
    pub fn diff(&self, new: &Self) -> Result<Vec<Change>, ConfigError> {
        let (old, new) = (self.flatten()?, new.flatten()?);
        let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        let shown = |value: Option<&String>| value.cloned().unwrap_or_else(|| "unset".into());
        Ok(keys
            .into_iter()
            .filter(|key| old.get(*key) != new.get(*key))
            .map(|key| Change {
                key: key.clone(),
                old: shown(old.get(key)),
                new: shown(new.get(key)),
                allowed: may_change_on_resume(key),
            })
            .collect())
    }

    /// Every `section.key` with its value as TOML writes it; as text, so that the order of patterns counts.
    fn flatten(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let sections = Table::try_from(self).map_err(|error| ConfigError::Write {
            problem: one_line(&error.to_string()),
        })?;
        let mut flat = BTreeMap::new();
        for (section, keys) in sections {
            for (key, value) in keys.as_table().into_iter().flatten() {
                flat.insert(format!("{section}.{key}"), value.to_string());
            }
        }
        Ok(flat)
    }
}

/// Whether a run may take another value for `key` (`section.key`) on resume and still be exact.
pub(crate) fn may_change_on_resume(key: &str) -> bool {
    MAY_CHANGE_ON_RESUME
        .iter()
        .any(|entry| key == *entry || (entry.ends_with('.') && key.starts_with(entry)))
}
