#![doc = include_str!("../README.md")]
//!
//! ## Files
//!
//! | file | idea |
//! |---|---|
//! | `config`, `selection`, `peft_form` | `LoraConfig`: which layers, which rank and alpha, by PEFT's rules; as PEFT's JSON |
//! | `attach` | `Plan`: checked first, attached after; factors are born from their source |
//! | `adapter`, `site` | the adapter type on Burn's reparameterization; what it sits on |
//! | `factors`, `lycoris` | LoRA, LoHa, LoKr and parameters trained in full; how LoHa and LoKr start |
//! | `initial` | LoRA factors that start as a part of the base weight (`pissa`, `olora`) or orthogonal |
//! | `forward`, `dropout` | the fast path; masks as a function of (seed, step, layer) |
//! | `edit`, `combine`, `merge` | activate, weight, delete, detach; one adapter of several; into the base weights |
//! | `linalg` | QR and SVD on the host |
//! | `state`, `adapter_file` | adapter-only state; its safetensors file in PEFT's form |
//! | `peft_folder` | the folder that PEFT saves and loads |
//! | `replace` | a file is replaced whole or not at all |
//! | `gradients`, `optimizer` | gradients and optimizer state by parameter path |
//! | `recompute` | per-block recompute with the bits of plain autodiff |
//! | `record` | the chain in which a run is restored |
//! | `random` | random numbers named by what they are for |
//! | `host`, `tensor_file` | tensors on the host; strict safetensors reading |
//! | `strict_json` | bounded reads, JSON without repeated keys |

mod adapter;
mod adapter_file;
mod attach;
mod combine;
mod config;
mod dropout;
mod edit;
mod error;
mod factors;
mod forward;
mod gradients;
pub mod host;
mod initial;
mod linalg;
mod lycoris;
mod merge;
mod optimizer;
mod peft_folder;
mod peft_form;
pub mod random;
pub mod recompute;
mod record;
mod replace;
mod selection;
mod site;
mod state;
pub mod strict_json;
pub mod tensor_file;

pub use adapter::{Adapter, AdapterSpec, Lora};
pub use adapter_file::{AdapterFile, METADATA_KEY, ModuleAdapter};
pub use attach::{AdapterSource, DEFAULT_ADAPTER, ForwardPath, Plan};
pub use combine::{Combination, add_weighted_adapter};
pub use config::{InitLoraWeights, LoraConfig, OneOrMany, Patterns, PeftType, Targets, TrainBias};
pub use dropout::DropoutScope;
pub use edit::{adapter_names, delete_adapter, detach, set_adapters};
pub use error::LoraError;
pub use factors::{Factors, Initial, LoraFactors, Side};
pub use forward::linear;
pub use gradients::Gradients;
pub use merge::{merge, safe_merge};
pub use optimizer::{OptimizerScalars, OptimizerState, PathOptimizer};
pub use record::{AdaptersRestored, OptimizerRestored, Training, TrainingRecord};
pub use replace::replace_file;
pub use state::{
    ParameterCount, adapter_state, count_parameters, host as host_tensor, trainable_parameters,
};

#[cfg(test)]
mod test_model;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_initial;
#[cfg(test)]
mod tests_peft;
