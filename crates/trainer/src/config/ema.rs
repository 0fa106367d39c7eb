//! `[ema]`: a moving average of the weights.

use lora_core::training::optimizers::OptimizerConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{Invalid, Rule};

/// A moving average of the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EmaSection {
    /// Share of the average that is kept in a step, above 0 and below 1. In step `n` it is at most `n / (n + 9)`, 0 in the first,
    /// as in diffusers. Default 0.999.
    pub decay: f64,
    /// Make previews with the average. Default true.
    pub sample: bool,
    /// Write the average as the finished LoRA. Default true.
    pub export: bool,
}

impl Default for EmaSection {
    fn default() -> Self {
        Self {
            decay: 0.999,
            sample: true,
            export: true,
        }
    }
}

impl EmaSection {
    pub(super) fn check(&self, rule: &OptimizerConfig) -> Result<(), Invalid> {
        if matches!(rule, OptimizerConfig::ScheduleFreeAdamw(_)) {
            let problem = "cannot be used with optimizer.name = \"schedule_free_adamw\", which has an average of its own";
            return Err(("ema", problem.into()));
        }
        let between = Rule("above 0 and below 1", |x| x > 0.0 && x < 1.0);
        between.check("ema.decay", self.decay)
    }
}
