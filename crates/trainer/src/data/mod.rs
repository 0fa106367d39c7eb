//! From a folder of pictures to micro-batches.

pub mod batch;
pub mod bucket;
pub mod cache;
pub mod scan;
