//! The architecture, as `config.json` says it: names and defaults are diffusers'; keys that do not shape it are ignored.

use serde::{Deserialize, Serialize};

use crate::sizes::{MAX_LAYERS, MAX_SIZE, out_of_range};

/// FLUX.1 transformer. Source: diffusers `FluxTransformer2DModel.__init__`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FluxConfig {
    /// Side of the patches cut inside the network; FLUX packs outside, so it is 1.
    pub patch_size: usize,
    /// Channels of a packed token: 64, or more where a condition is appended.
    pub in_channels: usize,
    /// Channels of the predicted velocity; as `in_channels` if absent.
    pub out_channels: Option<usize>,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Single-stream blocks.
    pub num_single_layers: usize,
    /// Width of an attention head.
    pub attention_head_dim: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of the text tokens (T5).
    pub joint_attention_dim: usize,
    /// Width of the pooled text vector (CLIP).
    pub pooled_projection_dim: usize,
    /// Whether the guidance strength is an input (dev, not schnell).
    pub guidance_embeds: bool,
    /// Rotary widths of the three position axes; they sum to the head width.
    pub axes_dims_rope: Vec<usize>,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
        }
    }
}

impl FluxConfig {
    /// FLUX.1-dev; Krea, Kontext and Redux have the same shape.
    pub fn dev() -> Self {
        Self {
            guidance_embeds: true,
            ..Self::default()
        }
    }

    /// FLUX.1-schnell.
    pub fn schnell() -> Self {
        Self::default()
    }

    /// FLUX.1-Canny-dev and FLUX.1-Depth-dev: the condition's latents are appended to the channels.
    pub fn control() -> Self {
        Self {
            in_channels: 128,
            out_channels: Some(64),
            ..Self::dev()
        }
    }

    /// FLUX.1-Fill-dev: masked image and mask are appended to the channels.
    pub fn fill() -> Self {
        Self {
            in_channels: 384,
            out_channels: Some(64),
            ..Self::dev()
        }
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of the output.
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        let sizes = [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels()),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
        ];
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if self.num_layers > MAX_LAYERS || self.num_single_layers > MAX_LAYERS {
            return Some(format!("more than {MAX_LAYERS} blocks"));
        }
        if self.patch_size != 1 {
            return Some(format!("`patch_size` is {}; FLUX.1 has 1", self.patch_size));
        }
        let is_axis = |width: &usize| width.is_multiple_of(2) && *width <= MAX_SIZE;
        if self.axes_dims_rope.len() != 3 || !self.axes_dims_rope.iter().all(is_axis) {
            return Some(format!(
                "`axes_dims_rope` must be three even numbers up to {MAX_SIZE}"
            ));
        }
        let sum: usize = self.axes_dims_rope.iter().sum();
        (sum != self.attention_head_dim).then(|| {
            format!(
                "`axes_dims_rope` sums to {sum}, `attention_head_dim` is {}",
                self.attention_head_dim
            )
        })
    }
}
