//! FLUX.1 in [Burn](https://burn.dev): the networks, their checkpoints, and text to image. Knows nothing of training.
//!
//! | file | idea |
//! |---|---|
//! | `transformer` | the velocity network: double and single stream blocks |
//! | `autoencoder` | pixels to latents and back |
//! | `clip`, `t5`, `tokenizer` | text to embeddings |
//! | `latent` | packing latents into tokens; positions |
//! | `scheduler` | noise levels and the Euler step |
//! | `pipeline` | a diffusers folder; prompt to latents |
//! | `layers` | norms, rotary attention, sinusoidal embedding |
//! | `config` | architectures as `config.json` states them |
//! | `lora` | LoRA files of every format, read and written |
//! | `keys`, `weights` | names in both layouts; loading, each tensor used or named in an error |
//!
//! Every linear layer is computed by [`lora_core::linear`], so adapters run without a dense sum.

pub mod autoencoder;
pub mod clip;
pub mod config;
mod error;
pub mod keys;
pub mod latent;
pub mod layers;
pub mod lora;
pub mod pipeline;
pub mod scheduler;
pub mod t5;
pub mod tokenizer;
pub mod transformer;
pub mod weights;

pub use error::WeightsError;
