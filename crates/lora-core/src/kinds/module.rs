//! An adapter of one layer outside a model: its factors and the numbers beside them.

use crate::files::host::HostTensor;
use crate::kinds::factors::Factors;
use crate::kinds::parts::{LORA_BIAS, MAGNITUDE};
use crate::kinds::spec::AdapterSpec;
use crate::peft::config::InitLoraWeights;

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
