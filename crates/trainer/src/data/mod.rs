//! From a folder of pictures to micro-batches.

pub mod batch;
pub mod bucket;
pub mod cache;
pub mod digest;
pub mod error;
pub mod image;
pub mod scan;
mod text;

#[cfg(test)]
mod testing;
