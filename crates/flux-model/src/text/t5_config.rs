//! The architecture of T5, as `config.json` says it.

use serde::{Deserialize, Serialize};

use crate::sizes::{MAX_LAYERS, out_of_range};

/// T5 encoder. Source: transformers `T5Config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width.
    pub d_model: usize,
    /// Width of an attention head; heads times this need not equal `d_model`.
    pub d_kv: usize,
    /// Width inside the MLP.
    pub d_ff: usize,
    /// Layers.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Buckets of the relative position bias.
    pub relative_attention_num_buckets: usize,
    /// Distance from which all positions share a bucket.
    pub relative_attention_max_distance: usize,
    /// Added to the mean square.
    pub layer_norm_epsilon: f64,
    /// `gated-gelu` is the only form FLUX uses.
    pub feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".into(),
        }
    }
}

impl T5Config {
    /// T5-v1.1-XXL, as shipped with FLUX.1.
    pub fn xxl() -> Self {
        Self {
            d_model: 4096,
            d_ff: 10240,
            num_layers: 24,
            num_heads: 64,
            feed_forward_proj: "gated-gelu".into(),
            ..Self::default()
        }
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        if self.feed_forward_proj != "gated-gelu" {
            return Some(format!(
                "`feed_forward_proj` is {}; only gated-gelu (T5 v1.1) is supported",
                self.feed_forward_proj
            ));
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_heads", self.num_heads),
            (
                "relative_attention_num_buckets",
                self.relative_attention_num_buckets,
            ),
            (
                "relative_attention_max_distance",
                self.relative_attention_max_distance,
            ),
        ];
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if self.num_layers > MAX_LAYERS {
            return Some(format!("more than {MAX_LAYERS} layers"));
        }
        let (buckets, distance) = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        );
        (buckets < 4 || buckets % 4 != 0 || distance <= buckets / 4).then(|| {
            format!("{buckets} relative position buckets up to distance {distance} make no sense")
        })
    }
}
