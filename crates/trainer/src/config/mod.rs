//! The run configuration: one TOML file, read strictly, kept with the run.
//!
//! Every section is a plain struct, and its `Default` is the only place where defaults live. [`RunConfig::load`] reads the
//! file, on a preset if one is named, applies `--set section.key=value`, checks the rules that types cannot hold and makes paths absolute. Each mistake
//! is one line that names the key and where it was written. The known keys are read from the structs themselves
//! (`fields::names_of`), so there is no second list to keep in step.

pub use self::change::Change;
pub(crate) use self::change::may_change_on_resume;
pub use self::checkpoint::CheckpointSection;
pub use self::dataset::{DatasetSection, FolderSection};
pub use self::ema::EmaSection;
pub use self::error::ConfigError;
pub use self::export::{ExportFormat, ExportSection};
pub use self::logging::LoggingSection;
pub use self::lora::{LoraSection, Loras};
pub use self::lr_scheduler::{LrSchedulerName, LrSchedulerSection};
pub use self::memory::{BasePlace, Bytes, MemorySection, Recompute};
pub use self::model::ModelSection;
pub use self::optimizer::OptimizerSection;
pub use self::run::RunConfig;
pub use self::sample::SampleSection;
pub use self::text_encoders::TextEncoderSection;
pub use self::train::{LossType, LossWeighting, TimestepSampling, TimestepShift, TrainSection};
pub use self::validation::ValidationSection;

mod change;
mod checkpoint;
mod dataset;
mod ema;
mod error;
mod export;
mod fields;
mod keys;
mod logging;
mod lora;
mod lr_scheduler;
mod memory;
mod model;
mod number_or;
mod optimizer;
pub mod preset;
mod read;
pub(crate) mod reference;
mod rules;
mod run;
mod sample;
mod schemas;
mod targets;
#[cfg(test)]
mod tests;
mod text_encoders;
mod train;
mod validation;
