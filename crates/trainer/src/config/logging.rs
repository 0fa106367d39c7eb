//! `[logging]`: what is written beside `metrics.jsonl`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is written beside `metrics.jsonl`, for programs that show curves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoggingSection {
    /// Write TensorBoard's event files, in `tensorboard` in the run folder. Default true.
    pub tensorboard: bool,
    /// Write `metrics.csv` in the run folder. Default true.
    pub csv: bool,
}

impl Default for LoggingSection {
    fn default() -> Self {
        Self {
            tensorboard: true,
            csv: true,
        }
    }
}
