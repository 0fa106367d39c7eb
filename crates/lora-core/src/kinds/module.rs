//! An adapter of one layer outside a model: its factors and the numbers beside them.

use serde::{Deserialize, Serialize};

use crate::files::host::HostTensor;
use crate::kinds::factors::Factors;
use crate::kinds::parts::{LORA_BIAS, MAGNITUDE};
use crate::peft::config::InitLoraWeights;

/// Numbers that belong to one adapter of one layer and are not trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdapterSpec {
    /// Rank of the factors; for a LoKr of two full matrices the one that its scale is computed with.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// Probability of zeroing an element of the input, in training.
    pub dropout: f64,
}

impl AdapterSpec {
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// Factors of one layer, as files store them.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleAdapter {
    /// Rank, alpha and the rest that is not trained.
    pub spec: AdapterSpec,
    /// What is trained.
    pub factors: Factors<HostTensor>,
    /// DoRA, even if the magnitude is still to be computed from the base weight.
    pub use_dora: bool,
    /// The layer is an embedding, whose factors have names of their own.
    pub embedding: bool,
    /// How the factors were split off the base weight, if they were: then they hold what they started from.
    pub split: Option<InitLoraWeights>,
}

impl ModuleAdapter {
    /// An adapter of a linear layer or a convolution that starts from nothing.
    pub fn new(spec: AdapterSpec, factors: Factors<HostTensor>) -> Self {
        Self {
            spec,
            use_dora: factors.get(MAGNITUDE).is_some(),
            factors,
            embedding: false,
            split: None,
        }
    }

    pub(crate) fn has_bias(&self) -> bool {
        self.factors.get(LORA_BIAS).is_some()
    }
}
