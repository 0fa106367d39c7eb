//! FLUX.2: the velocity network and its names in BFL's layout, the autoencoder, positions and schedule, and the pipeline
//! around them.

pub mod autoencoder;
pub mod config;
pub mod keys;
pub mod latent;
pub mod load;
mod pipeline;
pub mod schedule;
pub mod text;
pub mod transformer;

pub use pipeline::Flux2;
