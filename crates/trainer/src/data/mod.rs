//! From a folder of pictures to micro-batches.

pub mod ahead;
pub mod batch;
pub mod beside;
pub mod bucket;
pub mod cache;
pub(crate) mod caption;
mod colour;
pub mod degradation;
pub mod digest;
pub mod error;
pub mod file_digests;
pub mod image;
pub mod metadata;
mod outputs;
pub mod reader;
pub mod sample;
pub(crate) mod samples;
pub mod scan;
mod text;

#[cfg(test)]
mod testing;
