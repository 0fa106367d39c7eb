//! What a training loop needs: gradients and optimizer state by parameter path, restoring in order, per-block recompute.

pub(crate) mod gradients;
pub(crate) mod optimizer;
pub mod recompute;
pub(crate) mod record;
