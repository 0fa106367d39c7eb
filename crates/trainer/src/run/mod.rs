//! The run folder: checkpoints that survive anything. Each file uses only those above it.
//!
//! | file | idea |
//! |---|---|
//! | `error` | what can go wrong with a run folder |
//! | `vfs` | the file operations that write it, and their safe combinations |
//! | `manifest` | what a checkpoint folder must hold, and whether it does |
//! | `folder` | who may write, which checkpoint to resume, which ones to keep |
//! | `metrics` | the log, cut back on resume |
//! | `timings`, `logs`, `tfevents` | what steps took; tables and curves for other programs |
//! | `transaction` | a checkpoint is there, whole and verified, or it is not there |
//! | `adapter` | the adapter of a run, network by network |
//! | `checkpoint` | what the bytes of a checkpoint say, and a run restored from it |
//! | `space` | whether the disk has room for a run |
//! | `resume` | which checkpoint a run goes on from, and what is refused |
//! | `header` | what a finished LoRA says about how it was made |
//! | `save` | checkpoints while a run goes, the finished LoRA at its end |

pub mod adapter;
pub mod checkpoint;
pub mod error;
pub mod folder;
pub(crate) mod header;
pub(crate) mod logs;
pub mod manifest;
pub mod metrics;
pub mod resume;
pub(crate) mod save;
pub(crate) mod space;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod testing;
mod tfevents;
pub mod timings;
pub mod transaction;
pub mod vfs;
