//! PEFT's configuration, names and files.

pub(crate) mod config;
pub(crate) mod file;
pub(crate) mod folder;
pub(crate) mod form;
pub(crate) mod selection;

pub use config::{
    InitLoraWeights, LoraConfig, Matcher, OneOrMany, Patterns, PeftType, Targets, TrainBias,
};
pub use file::{AdapterFile, METADATA_KEY};
pub use form::SPLITTING;
