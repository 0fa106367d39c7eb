//! The run folder: checkpoints that survive anything.

pub mod checkpoint;
pub mod folder;
pub mod manifest;
pub(crate) mod resume;
pub(crate) mod save;
pub mod vfs;
