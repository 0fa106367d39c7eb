//! FLUX.1: the velocity network, its names in BFL's layout, its latents and positions, and the pipeline around it.

pub mod config;
pub mod keys;
pub mod latent;
mod pipeline;
pub mod text;
pub mod transformer;
pub mod vae;

pub use pipeline::Flux1;
