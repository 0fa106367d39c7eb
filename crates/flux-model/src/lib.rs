//! FLUX in [Burn](https://burn.dev): the networks, their checkpoints, and text to image. Knows nothing of training.
//!
//! | file | idea |
//! |---|---|
//! | `family`, `families` | what training and sampling may ask of a model; which ones there are |
//! | `network` | the velocity network as a chain of blocks |
//! | `prompted` | the velocity network with the text encoders that are trained with it |
//! | `network_config` | loading a network: what is stated of it and what its tensors tell |
//! | `flux1/` | FLUX.1: the velocity network, latents as tokens, positions, the rules of its pipeline, names in BFL's layout |
//! | `flux2/` | FLUX.2 likewise, with its autoencoder and schedule |
//! | `bfl` | names in BFL's single files |
//! | `blocks` | the blocks of a network, one at a time |
//! | `autoencoder`, `tiny_autoencoder`, `tiles` | pixels to latents and back; of large images a tile at a time |
//! | `text/` | CLIP, T5, Qwen3, Mistral and their tokenizers |
//! | `scheduler` | noise levels and the Euler step |
//! | `pipeline`, `found` | a diffusers folder and its components; what is there in its place |
//! | `sampler` | noise to latents |
//! | `joint_attention`, `modulation` | what the blocks of both families consist of |
//! | `layers` | norms, rotary positions, sinusoidal embedding |
//! | `ops/` | attention, norms, activations: operations with handwritten gradients and kernels |
//! | `sizes` | what a configuration may say |
//! | `lora` | LoRA files of every format, read and written |
//! | `weights/` | loading, each tensor used or named in an error; what a stored tensor becomes in memory; blocks that stay on disk |
//!
//! Every linear layer is computed by [`lora_core::linear`], so adapters run without a dense sum.

pub mod autoencoder;
pub mod bfl;
pub mod blocks;
mod error;
pub mod families;
pub mod family;
pub mod flux1;
pub mod flux2;
mod found;
mod joint_attention;
pub mod layers;
pub mod lora;
mod modulation;
mod network;
pub mod network_config;
pub mod ops;
pub mod pipeline;
pub mod prompted;
pub mod sampler;
pub mod scheduler;
mod sizes;
pub mod text;
mod tiles;
pub mod tiny_autoencoder;
pub mod weights;

pub use error::WeightsError;
