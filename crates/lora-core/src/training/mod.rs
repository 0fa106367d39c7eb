//! What a training loop needs: optimizers by name, gradients and optimizer state by parameter path, saving, restoring in order, per-block recompute.

pub(crate) mod dropout;
pub(crate) mod ema;
pub(crate) mod gradients;
pub(crate) mod optimizer;
pub mod optimizers;
pub mod recompute;
pub(crate) mod record;
pub(crate) mod saved;

pub use dropout::DropoutScope;
pub use ema::Ema;
pub use gradients::Gradients;
pub use optimizer::{OptimizerScalars, OptimizerState, PathOptimizer};
pub use record::{AdaptersRestored, OptimizerRestored, Training, TrainingRecord};
