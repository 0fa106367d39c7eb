//! `[lr_scheduler]`: how the learning rate changes over the run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{ABOVE_0, Invalid, Rule};

/// How the learning rate changes over the run; the rules of diffusers' `get_scheduler`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LrSchedulerSection {
    /// The shape of the curve. Default "constant".
    pub name: LrSchedulerName,
    /// Optimizer steps over which the rate rises from 0; not for "constant". Default 0.
    pub warmup_steps: u64,
    /// Periods of "cosine" over the run: 0.5 falls to 0 at the last step. For "cosine_with_restarts" how often the rate falls to
    /// 0, a whole number. Default: 0.5, for "cosine_with_restarts" 1.
    #[serde(default)]
    pub num_cycles: Option<f64>,
    /// Exponent of "polynomial". Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power: Option<f64>,
    /// Learning rate that "polynomial" ends at. Default: 1e-7.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_end: Option<f64>,
}

impl LrSchedulerSection {
    /// With the defaults that depend on the name.
    pub(super) fn resolved(self) -> Self {
        let polynomial = self.name == LrSchedulerName::Polynomial;
        Self {
            num_cycles: self.num_cycles.or(Some(self.name.num_cycles())),
            power: self.power.or(polynomial.then_some(1.0)),
            lr_end: self.lr_end.or(polynomial.then_some(1e-7)),
            ..self
        }
    }

    pub(super) fn check(&self, learning_rate: f64) -> Result<(), Invalid> {
        if self.name == LrSchedulerName::Constant && self.warmup_steps > 0 {
            let problem = format!(
                "has no effect with name = \"constant\", found {}: use \"constant_with_warmup\"",
                self.warmup_steps
            );
            return Err(("lr_scheduler.warmup_steps", problem));
        }
        if let Some(cycles) = self.num_cycles {
            let rule = match self.name {
                LrSchedulerName::CosineWithRestarts => Rule(
                    "a whole number of at least 1 with name = \"cosine_with_restarts\"",
                    |x| x >= 1.0 && x.fract() == 0.0,
                ),
                _ => ABOVE_0,
            };
            rule.check("lr_scheduler.num_cycles", cycles)?;
        }
        for (key, value) in [
            ("lr_scheduler.power", self.power),
            ("lr_scheduler.lr_end", self.lr_end),
        ] {
            let Some(value) = value else { continue };
            if self.name != LrSchedulerName::Polynomial {
                return Err((key, "has no effect but with name = \"polynomial\"".into()));
            }
            ABOVE_0.check(key, value)?;
        }
        match self.lr_end {
            Some(end) if end >= learning_rate => {
                let problem =
                    format!("must be below optimizer.learning_rate = {learning_rate}, found {end}");
                Err(("lr_scheduler.lr_end", problem))
            }
            _ => Ok(()),
        }
    }
}

impl Default for LrSchedulerSection {
    fn default() -> Self {
        Self {
            name: LrSchedulerName::default(),
            warmup_steps: 0,
            num_cycles: Some(0.5),
            power: None,
            lr_end: None,
        }
    }
}

/// Learning-rate curves, named as in diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerName {
    /// The same rate throughout.
    #[default]
    Constant,
    /// A rise, then the same rate throughout.
    ConstantWithWarmup,
    /// A rise, then a straight fall to 0 at the last step.
    Linear,
    /// A rise, then a cosine.
    Cosine,
    /// A rise, then several falls of a cosine to 0.
    CosineWithRestarts,
    /// A rise, then a fall by a power of what is left of the run.
    Polynomial,
    /// A rise, then a fall that is slow at first and fast at the end, arXiv:2107.04197.
    Rex,
}

impl LrSchedulerName {
    /// The default of [`LrSchedulerSection::num_cycles`].
    pub(crate) fn num_cycles(self) -> f64 {
        match self {
            Self::CosineWithRestarts => 1.0,
            _ => 0.5,
        }
    }
}
