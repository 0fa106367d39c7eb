//! Safetensors files, read as if written by an adversary.
//!
//! The format is <https://huggingface.co/docs/safetensors>: a `u64` header length, a JSON header, the data. The
//! `safetensors` crate keeps the last of two equal keys, takes any tensor name and wants the whole file in memory, so
//! the header is parsed here instead:
//!
//! - Everything is checked when a file is opened: what the header says must account for every byte of the file, once.
//!   Nothing is allocated from a length that has not been compared with the file first.
//! - Data is read on demand at its offset, so a file cut short later is an error, not a crash; only what is asked for as a map
//!   ([`TensorFile::map`]) can be cut short while it is used.
//! - Whether the *values* are finite is for the caller to ask ([`HostTensor::first_non_finite`](crate::files::host::HostTensor::first_non_finite)).
//! - Writing is deterministic: equal tensors and metadata give equal bytes.

mod check;
mod error;
mod header;
mod read;
mod shards;
mod write;

pub use check::TensorInfo;
pub use error::{FileError, TensorProblem};
pub use read::TensorFile;
pub use shards::TensorSet;
pub use write::{serialize, write_streaming, write_tensors};

#[cfg(test)]
mod tests;
