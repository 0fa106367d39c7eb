//! `[checkpoint]`: when the run is saved.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{Invalid, check_at_least_1};

/// When the run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSection {
    /// Save each time this many optimizer steps are done, and at the end. Default 100.
    pub every: u64,
    /// Newest checkpoints to keep, at least 2: one more than the one being trusted. Default 2.
    pub keep: usize,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self {
            every: 100,
            keep: 2,
        }
    }
}

impl CheckpointSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        check_at_least_1("checkpoint.every", self.every)?;
        if self.keep < 2 {
            let problem = format!(
                "must be at least 2, so that one is left when the newest is damaged, found {}",
                self.keep
            );
            return Err(("checkpoint.keep", problem));
        }
        Ok(())
    }
}
