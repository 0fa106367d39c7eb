//! How a step is made: what those who share its micro-batches and the step itself go by.

use lora_core::training::recompute::Recomputed;

/// How a step is made.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Micro-batches.
    pub accumulation: usize,
    /// What is computed again in the backward pass.
    pub recomputed: Recomputed,
    /// Seed of the dropout masks.
    pub seed: u64,
    /// Norm that all gradients together are clipped to.
    pub max_grad_norm: Option<f64>,
    /// Learning rate of this step.
    pub lr: f64,
    /// A run is stopped where its loss is so many times that of predicting 0.
    pub divergence_factor: Option<f64>,
}
