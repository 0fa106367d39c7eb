//! What the shapes of its tensors say about the network in a checkpoint.

use super::{Checkpoint, Layout};
use crate::autoencoder::AutoencoderConfig;
use crate::error::WeightsError;
use crate::flux1::config::FluxConfig;

impl Checkpoint {
    /// Whether a transformer is in Black Forest Labs' layout.
    pub(crate) fn is_bfl(&self) -> bool {
        self.shape("img_in.weight").is_some()
    }

    /// Rows and columns of a matrix of a transformer, by its names in the two layouts.
    ///
    /// # Errors
    /// No such matrix, in words.
    pub(crate) fn matrix(&self, bfl: &str, diffusers: &str) -> Result<(usize, usize), String> {
        let key = if self.is_bfl() { bfl } else { diffusers };
        match self.shape(key) {
            Some(&[rows, columns]) => Ok((rows, columns)),
            _ => Err(format!("it has no matrix `{key}`")),
        }
    }

    /// Width of an attention head of a transformer whose tokens have this width.
    ///
    /// # Errors
    /// No norm of heads, in words.
    pub(crate) fn head_width(&self, hidden: usize) -> Result<usize, &'static str> {
        let norms = [
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "single_blocks.0.norm.query_norm.scale",
            "transformer_blocks.0.attn.norm_q.weight",
            "single_transformer_blocks.0.attn.norm_q.weight",
        ];
        match norms.iter().find_map(|key| self.shape(key)) {
            Some(&[width]) if hidden > 0 && hidden.is_multiple_of(width) => Ok(width),
            _ => Err("its attention heads cannot be told from its norms"),
        }
    }

    /// The transformer's layout, and its architecture as far as tensor shapes tell it.
    ///
    /// The rotary axes are in no tensor: they are those of `hint`, or FLUX's for a head width of 128.
    ///
    /// # Errors
    /// A file that holds no FLUX.1 transformer.
    pub fn transformer(
        &self,
        hint: Option<&FluxConfig>,
    ) -> Result<(Layout, FluxConfig), WeightsError> {
        let unknown = |reason: &str| WeightsError::UnknownLayout {
            path: self.path.clone(),
            what: "FLUX.1 transformer",
            reason: reason.into(),
        };
        for (key, model) in [
            ("double_stream_modulation_img.lin.weight", "it is FLUX.2"),
            ("distilled_guidance_layer.in_proj.weight", "it is Chroma"),
            ("input_blocks.0.0.weight", "it is Stable Diffusion"),
        ] {
            if self.shape(key).is_some() {
                return Err(unknown(model));
            }
        }
        let bfl = self.is_bfl();
        let dims = |bfl_key: &str, diffusers_key: &str| {
            let found = self.matrix(bfl_key, diffusers_key);
            found.map_err(|problem| unknown(&problem))
        };
        let (hidden, in_channels) = dims("img_in.weight", "x_embedder.weight")?;
        let (_, joint_attention_dim) = dims("txt_in.weight", "context_embedder.weight")?;
        let (_, pooled_projection_dim) = dims(
            "vector_in.in_layer.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        )?;
        let (out_channels, _) = dims("final_layer.linear.weight", "proj_out.weight")?;
        let attention_head_dim = self.head_width(hidden).map_err(unknown)?;
        let (double, single) = if bfl {
            ("double_blocks.", "single_blocks.")
        } else {
            ("transformer_blocks.", "single_transformer_blocks.")
        };
        let axes_dims_rope = match hint {
            Some(config) => config.axes_dims_rope.clone(),
            None if attention_head_dim == 128 => vec![16, 56, 56],
            None => {
                return Err(unknown(&format!(
                    "the rotary axes of a head width of {attention_head_dim} are not known"
                )));
            }
        };
        let config = FluxConfig {
            patch_size: 1,
            in_channels,
            out_channels: (out_channels != in_channels).then_some(out_channels),
            num_layers: self.blocks(double),
            num_single_layers: self.blocks(single),
            attention_head_dim,
            num_attention_heads: hidden / attention_head_dim,
            joint_attention_dim,
            pooled_projection_dim,
            guidance_embeds: self.shape("guidance_in.in_layer.weight").is_some()
                || self
                    .shape("time_text_embed.guidance_embedder.linear_1.weight")
                    .is_some(),
            axes_dims_rope,
        };
        if let Some(reason) = config.problem() {
            return Err(unknown(&reason));
        }
        Ok((
            if bfl {
                Layout::BflTransformer { hidden }
            } else {
                Layout::Diffusers
            },
            config,
        ))
    }

    /// The autoencoder's layout, and its architecture as far as tensor shapes tell it.
    ///
    /// Groups and scale factors are in no tensor: they are those of `hint`, or FLUX's.
    ///
    /// # Errors
    /// A file that holds no autoencoder.
    pub fn autoencoder(
        &self,
        hint: Option<&AutoencoderConfig>,
    ) -> Result<(Layout, AutoencoderConfig), WeightsError> {
        let unknown = |reason: String| WeightsError::UnknownLayout {
            path: self.path.clone(),
            what: "autoencoder",
            reason,
        };
        let known = hint.cloned().unwrap_or_else(AutoencoderConfig::flux);
        if self.shape("encoder.down.0.block.0.conv1.weight").is_none() {
            return match self.shape("encoder.down_blocks.0.resnets.0.conv1.weight") {
                Some(_) => Ok((Layout::Diffusers, known)),
                None => Err(unknown("it has no encoder".into())),
            };
        }
        let channels = |key: String, axis: usize| match self.shape(&key) {
            Some(shape @ [_, _, _, _]) => Ok(shape[axis]),
            _ => Err(unknown(format!("it has no convolution `{key}`"))),
        };
        let levels = self.blocks("encoder.down.");
        let config = AutoencoderConfig {
            in_channels: channels("encoder.conv_in.weight".into(), 1)?,
            out_channels: channels("decoder.conv_out.weight".into(), 0)?,
            block_out_channels: (0..levels)
                .map(|level| channels(format!("encoder.down.{level}.block.0.conv1.weight"), 0))
                .collect::<Result<_, _>>()?,
            layers_per_block: self.blocks("encoder.down.0.block."),
            latent_channels: channels("decoder.conv_in.weight".into(), 1)?,
            use_quant_conv: false,
            use_post_quant_conv: false,
            mid_block_add_attention: self.shape("encoder.mid.attn_1.q.weight").is_some(),
            ..known
        };
        match config.problem() {
            Some(reason) => Err(unknown(reason)),
            None => Ok((Layout::BflAutoencoder { levels }, config)),
        }
    }
}
