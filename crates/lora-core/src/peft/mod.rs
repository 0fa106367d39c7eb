//! PEFT's configuration, names and files.

pub(crate) mod config;
pub(crate) mod file;
pub mod folder;
pub(crate) mod form;
pub(crate) mod pattern;
pub(crate) mod selection;
pub(crate) mod together;

pub use config::{InitLoraWeights, LoraConfig};
pub use file::AdapterFile;
pub use form::METADATA_KEY;
pub use pattern::{Matcher, Patterns, Targets};
pub use selection::{OneOrMany, PeftType, TrainBias, is_saved};
pub use together::{load_together, write_together};
