//! FLUX.1 in [Burn](https://burn.dev): the networks, their checkpoints, and text to image. Knows nothing of training.
//!
//! | file | idea |
//! |---|---|
//! | `flux1/` | the velocity network: double and single stream blocks; latents as tokens, positions; names in BFL's layout |
//! | `autoencoder` | pixels to latents and back |
//! | `text/` | CLIP, T5 and their tokenizers |
//! | `scheduler` | noise levels and the Euler step |
//! | `pipeline` | a diffusers folder; prompt to latents |
//! | `layers` | norms, rotary attention, sinusoidal embedding |
//! | `sizes` | what a configuration may say |
//! | `lora` | LoRA files of every format, read and written |
//! | `weights` | loading, each tensor used or named in an error |
//!
//! Every linear layer is computed by [`lora_core::linear`], so adapters run without a dense sum.

pub mod autoencoder;
mod error;
pub mod flux1;
pub mod layers;
pub mod lora;
pub mod pipeline;
pub mod scheduler;
mod sizes;
pub mod text;
pub mod weights;

pub use error::WeightsError;
