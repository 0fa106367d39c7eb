//! Architectures of FLUX.2, as the `config.json` of each component says them; names and defaults are those of diffusers.

use serde::{Deserialize, Serialize};

use crate::autoencoder::AutoencoderConfig;
use crate::sizes::{MAX_LAYERS, MAX_SIZE, out_of_range};

/// FLUX.2 transformer. Source: diffusers `Flux2Transformer2DModel.__init__`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Flux2Config {
    /// Side of the patches cut inside the network; the autoencoder cuts them outside, so it is 1.
    pub patch_size: usize,
    /// Channels of a token: 128, or more where a condition is appended.
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
    /// Width of the text tokens: three layers of the text encoder side by side.
    pub joint_attention_dim: usize,
    /// Channels of the sinusoidal embeddings of time and guidance.
    pub timestep_guidance_channels: usize,
    /// Width inside an MLP over the width of the network.
    pub mlp_ratio: f64,
    /// Rotary widths of the four position axes; they sum to the head width.
    pub axes_dims_rope: Vec<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Of every norm.
    pub eps: f64,
    /// Whether the guidance strength is an input (dev, not klein).
    pub guidance_embeds: bool,
}

impl Default for Flux2Config {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 128,
            out_channels: None,
            num_layers: 8,
            num_single_layers: 48,
            attention_head_dim: 128,
            num_attention_heads: 48,
            joint_attention_dim: 15360,
            timestep_guidance_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![32; 4],
            rope_theta: 2000.0,
            eps: 1e-6,
            guidance_embeds: true,
        }
    }
}

impl Flux2Config {
    /// FLUX.2-dev.
    pub fn dev() -> Self {
        Self::default()
    }

    /// FLUX.2 klein 9B, distilled and base.
    pub fn klein_9b() -> Self {
        Self {
            num_single_layers: 24,
            num_attention_heads: 32,
            joint_attention_dim: 12288,
            guidance_embeds: false,
            ..Self::default()
        }
    }

    /// FLUX.2 klein 4B, distilled and base.
    pub fn klein_4b() -> Self {
        Self {
            num_layers: 5,
            num_single_layers: 20,
            num_attention_heads: 24,
            joint_attention_dim: 7680,
            guidance_embeds: false,
            ..Self::default()
        }
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Width inside an MLP, after its gate.
    pub fn mlp_hidden(&self) -> usize {
        self.mlp_hidden_at(self.hidden_size())
    }

    /// The same in a network of width `hidden`.
    pub(crate) fn mlp_hidden_at(&self, hidden: usize) -> usize {
        (hidden as f64 * self.mlp_ratio) as usize
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
            (
                "timestep_guidance_channels",
                self.timestep_guidance_channels,
            ),
        ];
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if self.num_layers > MAX_LAYERS || self.num_single_layers > MAX_LAYERS {
            return Some(format!("more than {MAX_LAYERS} blocks"));
        }
        if self.patch_size != 1 {
            return Some(format!("`patch_size` is {}; FLUX.2 has 1", self.patch_size));
        }
        if !self.timestep_guidance_channels.is_multiple_of(2) {
            return Some("`timestep_guidance_channels` is odd".into());
        }
        if !(self.mlp_ratio > 0.0 && (1..=MAX_SIZE).contains(&self.mlp_hidden())) {
            return Some(format!(
                "`mlp_ratio` is {}, which gives no width",
                self.mlp_ratio
            ));
        }
        for (key, value) in [("rope_theta", self.rope_theta), ("eps", self.eps)] {
            if !(value.is_finite() && value > 0.0) {
                return Some(format!("`{key}` is {value}, not above 0"));
            }
        }
        let is_axis = |width: &usize| width.is_multiple_of(2) && *width <= MAX_SIZE;
        if self.axes_dims_rope.len() != 4 || !self.axes_dims_rope.iter().all(is_axis) {
            return Some(format!(
                "`axes_dims_rope` must be four even numbers up to {MAX_SIZE}"
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

/// FLUX.2 autoencoder. Source: diffusers `AutoencoderKLFlux2.__init__`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Flux2AutoencoderConfig {
    /// Channels of an image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// Channels per level of the encoder, full resolution first.
    pub block_out_channels: Vec<usize>,
    /// Channels per level of the decoder, full resolution first; the encoder's if absent.
    pub decoder_block_out_channels: Option<Vec<usize>>,
    /// Residual blocks per encoder level; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of the latent, before patches are cut.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// 1x1 convolution after the encoder.
    pub use_quant_conv: bool,
    /// 1x1 convolution before the decoder.
    pub use_post_quant_conv: bool,
    /// Attention in the middle blocks.
    pub mid_block_add_attention: bool,
    /// Added to the variance of the latents' channels.
    pub batch_norm_eps: f64,
    /// Sides of the patches the latent is cut into.
    pub patch_size: [usize; 2],
}

impl Default for Flux2AutoencoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![128, 256, 512, 512],
            decoder_block_out_channels: None,
            layers_per_block: 2,
            latent_channels: 32,
            norm_num_groups: 32,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            batch_norm_eps: 1e-4,
            patch_size: [2, 2],
        }
    }
}

impl Flux2AutoencoderConfig {
    /// With the decoder of three quarters of the width.
    pub fn small_decoder() -> Self {
        Self {
            decoder_block_out_channels: Some(vec![96, 192, 384, 384]),
            ..Self::default()
        }
    }

    /// Channels of the latent the transformer sees: four for every patch of 2 x 2.
    pub fn patch_channels(&self) -> usize {
        4 * self.latent_channels
    }

    /// Channels per level of the decoder.
    pub fn decoder_channels(&self) -> &[usize] {
        let decoder = self.decoder_block_out_channels.as_ref();
        decoder.unwrap_or(&self.block_out_channels)
    }

    /// Pixels per element and side of the latent before patches are cut.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// The part that FLUX.1's autoencoder has too, with the encoder's widths.
    pub(crate) fn encoder(&self) -> AutoencoderConfig {
        AutoencoderConfig {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            block_out_channels: self.block_out_channels.clone(),
            layers_per_block: self.layers_per_block,
            latent_channels: self.latent_channels,
            norm_num_groups: self.norm_num_groups,
            scaling_factor: 1.0,
            shift_factor: None,
            use_quant_conv: self.use_quant_conv,
            use_post_quant_conv: self.use_post_quant_conv,
            mid_block_add_attention: self.mid_block_add_attention,
        }
    }

    /// The same with the decoder's widths.
    pub(crate) fn decoder(&self) -> AutoencoderConfig {
        AutoencoderConfig {
            block_out_channels: self.decoder_channels().to_vec(),
            ..self.encoder()
        }
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        if let Some(problem) = self.encoder().problem() {
            return Some(problem);
        }
        if self.decoder_channels().len() != self.block_out_channels.len() {
            return Some(
                "`decoder_block_out_channels` and `block_out_channels` differ in length".into(),
            );
        }
        if let Some(problem) = self.decoder().problem() {
            return Some(format!("`decoder_block_out_channels`: {problem}"));
        }
        if self.patch_size != [2, 2] {
            return Some(format!(
                "`patch_size` is {:?}; FLUX.2 has [2, 2]",
                self.patch_size
            ));
        }
        let eps = self.batch_norm_eps;
        (!(eps.is_finite() && eps >= 0.0)).then(|| format!("`batch_norm_eps` is {eps}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_architectures_are_sound_and_nonsense_is_named() {
        for config in [
            Flux2Config::dev(),
            Flux2Config::klein_9b(),
            Flux2Config::klein_4b(),
        ] {
            assert_eq!(config.problem(), None);
        }
        assert_eq!(Flux2Config::klein_9b().hidden_size(), 4096);
        let wrong = |change: fn(&mut Flux2Config)| {
            let mut config = Flux2Config::klein_4b();
            change(&mut config);
            config.problem().expect("a problem")
        };
        assert!(wrong(|c| c.axes_dims_rope = vec![16, 56, 56]).contains("four even numbers"));
        assert!(wrong(|c| c.axes_dims_rope = vec![32, 32, 32, 16]).contains("sums to 112"));
        assert!(wrong(|c| c.rope_theta = 0.0).contains("rope_theta"));
        assert!(wrong(|c| c.mlp_ratio = f64::NAN).contains("mlp_ratio"));
        assert!(wrong(|c| c.num_attention_heads = 0).contains("num_attention_heads"));
    }

    #[test]
    fn a_decoder_has_widths_of_its_own() {
        let small = Flux2AutoencoderConfig::small_decoder();
        assert_eq!(small.problem(), None);
        assert_eq!(small.decoder_channels(), [96, 192, 384, 384]);
        assert_eq!(small.downscale(), 8);
        let wrong = |change: fn(&mut Flux2AutoencoderConfig)| {
            let mut config = Flux2AutoencoderConfig::default();
            change(&mut config);
            config.problem().expect("a problem")
        };
        assert!(wrong(|c| c.decoder_block_out_channels = Some(vec![96])).contains("in length"));
        assert!(wrong(|c| c.patch_size = [1, 1]).contains("patch_size"));
        assert!(
            wrong(|c| c.decoder_block_out_channels = Some(vec![90; 4])).contains("90 channels")
        );
    }
}
