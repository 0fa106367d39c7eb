//! FLUX.1: the velocity network, its names in BFL's layout, its latents and positions.

pub mod config;
pub mod keys;
pub mod latent;
pub mod transformer;
