//! How a step is made: what those who share its micro-batches and the step itself go by.

/// How a step is made.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Micro-batches.
    pub accumulation: usize,
    /// Blocks, from the first on, of which only the input is kept.
    pub recomputed: usize,
    /// Seed of the dropout masks.
    pub seed: u64,
    /// Norm that all gradients together are clipped to.
    pub max_grad_norm: Option<f64>,
    /// Learning rate of this step.
    pub lr: f64,
    /// A run is stopped where its loss is so many times that of predicting 0.
    pub divergence_factor: Option<f64>,
}
