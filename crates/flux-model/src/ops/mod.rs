//! The operations that FLUX's blocks and autoencoders spend their time in, besides linear layers: see [`lora_core::ops`].
//!
//! | file | operation |
//! |---|---|
//! | `activation` | what GELU and SiLU have in common |
//! | `attention` | `softmax(scale q kᵀ) v`, never holding the scores of all tokens |
//! | `attention_composed` | the same of Burn's operations, for GPUs and bf16 |
//! | `conv` | convolutions, of images that are doubled first too; no gradients |
//! | `gate` | `x + gate * y` |
//! | `gelu` | GELU by tanh, alone and behind another tensor |
//! | `group_norm` | group norm, alone and before SiLU; no gradients |
//! | `heads` | tokens to heads: RMS norm, rotary positions and layout |
//! | `layer_norm` | layer norm and modulation |
//! | `silu` | SiLU, alone and as a gate |
//! | `softmax` | softmax of scores and its gradient, for `attention_composed` |

#[cfg(feature = "flex")]
mod activation;
pub mod attention;
pub mod attention_composed;
pub mod conv;
pub mod gate;
pub mod gelu;
pub mod group_norm;
pub mod heads;
pub mod layer_norm;
pub mod silu;
mod softmax;

#[cfg(all(test, feature = "flex"))]
mod bits;
