//! Language models that read prompts: the residual stream after some of their layers, no output head.
//!
//! Qwen3 (FLUX.2 klein) and Mistral (FLUX.2 dev) are one network: pre-norm, grouped queries, rotary positions in half-split
//! form, gated MLP, causal. Qwen3 also has a norm on every query and key head.
//!
//! | file | idea |
//! |---|---|
//! | `config` | what `config.json` says |
//! | `network` | a layer |
//! | `rotary` | rotary positions in half-split form |
//! | `encoder` | the weights on disk, read layer by layer |
//!
//! Source: transformers 4.57 `modeling_qwen3.py`, `modeling_mistral.py`, `modeling_mistral3.py`.

mod config;
mod encoder;
mod network;
mod rotary;

pub use config::{DecoderConfig, ModelType, RopeParameters};
pub use encoder::DecoderEncoder;
pub use network::DecoderText;
