#![doc = include_str!("../README.md")]
//!
//! ## Files
//!
//! | file | idea |
//! |---|---|
//! | `attach`, `site` | `Plan`: checked first, attached after; factors are born from their source; what they sit on |
//! | `adapter` | the adapter type on Burn's reparameterization |
//! | `forward`, `dropout` | the fast path; masks as a function of (seed, step, layer) |
//! | `edit`, `combine`, `merge` | activate, weight, delete, detach; one adapter of several; into the base weights |
//! | `state` | the state of adapters alone |
//! | `kinds/` | LoRA, LoHa, LoKr, parameters trained in full: what they consist of and how they start |
//! | `peft/` | PEFT's configuration, rules, names, file and folder |
//! | `training/` | gradients and optimizer state by parameter path, restoring in order, per-block recompute |
//! | `files/` | strict safetensors and JSON, tensors on the host, files replaced whole; no Burn |
//! | `linalg`, `random` | QR and SVD on the host; random numbers named by what they are for |

mod adapter;
mod adapters;
mod attach;
mod combine;
mod dropout;
mod edit;
mod error;
pub mod files;
mod forward;
mod kinds;
mod linalg;
mod merge;
pub mod ops;
mod peft;
pub mod random;
mod scan;
mod site;
mod state;
pub mod training;
mod walk;

pub use adapter::Adapter;
pub use adapters::Adapters;
pub use attach::{DEFAULT_ADAPTER, NewAdapter, Plan, attach, targeted};
pub use combine::{Combination, add_weighted_adapter};
pub use dropout::DropoutScope;
pub use edit::{adapter_names, delete_adapter, detach, set_adapters};
pub use error::LoraError;
pub use files::replace::replace_file;
pub use forward::linear;
pub use kinds::factors::{Factors, Side};
pub use kinds::module::{AdapterSpec, ModuleAdapter};
pub use kinds::parts;
pub use merge::{merge, safe_merge};
pub use peft::config::{
    InitLoraWeights, LoraConfig, OneOrMany, Patterns, PeftType, Targets, TrainBias,
};
pub use peft::file::{AdapterFile, METADATA_KEY};
pub use peft::form::SPLITTING;
pub use state::{
    ParameterCount, adapter_state, check_finite, count_parameters, host as host_tensor,
    trainable_parameters,
};
pub use training::gradients::Gradients;
pub use training::optimizer::{OptimizerScalars, OptimizerState, PathOptimizer};
pub use training::record::{AdaptersRestored, OptimizerRestored, Training, TrainingRecord};

#[cfg(test)]
mod test_model;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_attach;
#[cfg(test)]
mod tests_initial;
#[cfg(test)]
mod tests_peft;
