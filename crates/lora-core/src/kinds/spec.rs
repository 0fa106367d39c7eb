//! Rank, scale and dropout of one adapter of one layer.

use serde::{Deserialize, Serialize};

/// Numbers that belong to one adapter of one layer and are not trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdapterSpec {
    /// Rank of the factors; for a LoKr of two full matrices the one that its scale is computed with.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// Probability of zeroing an element of the input, in training.
    pub dropout: f64,
}

impl AdapterSpec {
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}
