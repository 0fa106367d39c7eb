#![doc = include_str!("../README.md")]
//!
//! ## Modules
//!
//! At the root is what the common job needs: a configuration or a file, attaching, the training loop, merging. The rest is in the
//! module of its idea:
//!
//! | module | idea |
//! |---|---|
//! | `attach`, `scan`, `site` | `Plan`: checked first, attached after; factors are born from their source; which layers there are, what they sit on |
//! | `adapter`, `adapters`, `walk` | the adapter type on Burn's reparameterization; all of a parameter; one walk over a model by path |
//! | `forward`, `ops/` | the fast path; the operation under it, its handwritten gradient and kernels |
//! | `frozen` | weights that stay in few bits |
//! | `edit`, `combine`, `merge` | activate, weight, delete, detach; one adapter of several; into the base weights |
//! | `state` | the state of adapters alone, counts, values on the host |
//! | `kinds/` | LoRA, LoHa, LoKr, parameters trained in full: what they consist of and how they start |
//! | `peft/` | PEFT's configuration, rules, names, file and folder |
//! | `training/` | optimizers by name, gradients and optimizer state by parameter path, dropout as a function of (seed, step, layer), restoring in order, per-block recompute |
//! | `files/` | strict safetensors and JSON, tensors on the host, files replaced whole; no Burn |
//! | `linalg`, `random` | QR and SVD on the host; random numbers named by what they are for |

mod adapter;
mod adapters;
pub mod attach;
pub mod combine;
pub mod edit;
mod error;
pub mod files;
mod forward;
pub mod frozen;
pub mod kinds;
mod linalg;
pub mod merge;
pub mod ops;
pub mod peft;
pub mod random;
mod scan;
mod site;
pub mod state;
pub mod training;
mod walk;

pub use attach::attach;
pub use edit::{detach, set_adapters};
pub use error::LoraError;
pub use forward::{last_linear, linear};
pub use merge::merge;
pub use peft::{AdapterFile, LoraConfig};
pub use training::{Gradients, PathOptimizer, Training, TrainingRecord};

#[cfg(test)]
mod test_model;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_attach;
#[cfg(test)]
mod tests_frozen;
#[cfg(test)]
mod tests_initial;
#[cfg(test)]
mod tests_optimizers;
#[cfg(test)]
mod tests_peft;
