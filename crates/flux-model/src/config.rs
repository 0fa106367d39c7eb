//! Architectures, as the `config.json` of each component says them.
//!
//! Field names and defaults are those of diffusers and transformers, so that a component folder's `config.json` parses as
//! it is; keys that do not shape the network are ignored.

use serde::{Deserialize, Serialize};

/// No width, count of tokens or channel of a known model comes near; products of two fit anywhere.
const MAX_SIZE: usize = 1 << 20;
/// No network is deeper.
const MAX_LAYERS: usize = 1000;

/// The first of these sizes that is 0 or absurd, in words.
fn out_of_range(sizes: &[(&str, usize)]) -> Option<String> {
    let (key, size) = sizes
        .iter()
        .find(|(_, size)| !(1..=MAX_SIZE).contains(size))?;
    Some(format!("`{key}` is {size}, not between 1 and {MAX_SIZE}"))
}

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

/// Image autoencoder. Source: diffusers `AutoencoderKL.__init__`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderConfig {
    /// Channels of an image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// Channels per level, full resolution first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per encoder level; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Latents are `(z - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift_factor: Option<f64>,
    /// 1x1 convolution after the encoder (not in FLUX).
    pub use_quant_conv: bool,
    /// 1x1 convolution before the decoder (not in FLUX).
    pub use_post_quant_conv: bool,
    /// Attention in the middle block.
    pub mid_block_add_attention: bool,
}

impl Default for AutoencoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl AutoencoderConfig {
    /// The autoencoder of every FLUX.1 model.
    pub fn flux() -> Self {
        Self {
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            scaling_factor: 0.3611,
            shift_factor: Some(0.1159),
            use_quant_conv: false,
            use_post_quant_conv: false,
            ..Self::default()
        }
    }

    /// Pixels per latent element and side.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        if self.block_out_channels.is_empty() || self.block_out_channels.len() > 8 {
            return Some("`block_out_channels` must name one to eight levels".into());
        }
        let mut sizes = vec![
            ("norm_num_groups", self.norm_num_groups),
            ("latent_channels", self.latent_channels),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
        ];
        sizes.extend(
            self.block_out_channels
                .iter()
                .map(|&channels| ("block_out_channels", channels)),
        );
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if let Some(channels) = self
            .block_out_channels
            .iter()
            .find(|channels| !channels.is_multiple_of(self.norm_num_groups))
        {
            return Some(format!(
                "{channels} channels cannot be split into {} groups",
                self.norm_num_groups
            ));
        }
        if self.layers_per_block == 0 || self.layers_per_block > 100 {
            return Some("`layers_per_block` is out of range".into());
        }
        let usable = self.scaling_factor.is_finite()
            && self.scaling_factor != 0.0
            && self.shift_factor.is_none_or(f64::is_finite);
        (!usable).then(|| "`scaling_factor` or `shift_factor` is not usable".into())
    }
}

/// CLIP text encoder. Source: transformers `CLIPTextConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: Activation,
    /// Added to the variance.
    pub layer_norm_eps: f64,
    /// 2 selects the legacy pooling rule, see [`crate::text::clip`].
    pub eos_token_id: i64,
}

/// `hidden_act` of a text encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// Exact GELU.
    Gelu,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

impl ClipConfig {
    /// CLIP-L, as shipped with FLUX.1.
    pub fn clip_l() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_attention_heads: 12,
            eos_token_id: 2,
            ..Self::default()
        }
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("num_attention_heads", self.num_attention_heads),
        ];
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if self.num_hidden_layers > MAX_LAYERS {
            return Some(format!("more than {MAX_LAYERS} layers"));
        }
        (!self.hidden_size.is_multiple_of(self.num_attention_heads)).then(|| {
            format!(
                "hidden size {} cannot be split into {} heads",
                self.hidden_size, self.num_attention_heads
            )
        })
    }
}

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
