//! How a checkpoint names the tensors of a network.

use std::ops::Range;

use crate::flux1::keys::{self, BflModule};
use crate::flux2;

/// How a checkpoint names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As the network: diffusers and transformers.
    Diffusers,
    /// A T5 encoder, whose embedding may be stored under either or both of two names.
    T5,
    /// A CLIP text encoder, which may bring parts FLUX does not use.
    Clip,
    /// A language model, whose output head is not used.
    LanguageModel {
        /// Where its layers and its embedding are: `model`, or a part of a model that also sees, whose other parts are not used.
        inside: &'static str,
    },
    /// BFL's transformer, of this width.
    BflTransformer {
        /// `hidden_size` of the network.
        hidden: usize,
    },
    /// BFL's autoencoder, with this many resolutions.
    BflAutoencoder {
        /// Number of `block_out_channels`.
        levels: usize,
    },
    /// BFL's FLUX.2 transformer, of this width.
    BflFlux2Transformer {
        /// `hidden_size` of the network.
        hidden: usize,
    },
    /// diffusers' FLUX.2 autoencoder, which also counts the batches its statistics were taken from.
    Flux2Autoencoder,
    /// BFL's FLUX.2 autoencoder, with this many resolutions.
    BflFlux2Autoencoder {
        /// Number of `block_out_channels`.
        levels: usize,
    },
}

/// Where a parameter's values are in the checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Location {
    pub(super) key: String,
    pub(super) rows: Option<Range<usize>>,
    pub(super) swap_halves: bool,
    /// Stored as a 1x1 convolution.
    pub(super) pointwise: bool,
}

impl Layout {
    pub(super) fn locate(self, key: &str) -> Option<Location> {
        let (module, parameter) = key.rsplit_once('.')?;
        let whole = |key: String| Location {
            key,
            rows: None,
            swap_halves: false,
            pointwise: false,
        };
        let transformer = |bfl: BflModule| {
            let parameter = if bfl.name.ends_with("_norm") {
                "scale"
            } else {
                parameter
            };
            Some(Location {
                rows: bfl.rows,
                swap_halves: bfl.swap_halves,
                ..whole(format!("{}.{parameter}", bfl.name))
            })
        };
        let autoencoder = |name: String| {
            let pointwise =
                parameter == "weight" && name.contains(".attn_1.") && !name.ends_with("norm");
            Some(Location {
                pointwise,
                ..whole(format!("{name}.{parameter}"))
            })
        };
        match self {
            Self::Diffusers | Self::T5 | Self::Clip | Self::Flux2Autoencoder => {
                Some(whole(key.into()))
            }
            Self::LanguageModel { inside } => {
                let rest = key.strip_prefix("model.")?;
                Some(whole(format!("{inside}.{rest}")))
            }
            Self::BflTransformer { hidden } => {
                transformer(keys::bfl_transformer_module(module, hidden)?)
            }
            Self::BflFlux2Transformer { hidden } => {
                transformer(flux2::keys::bfl_transformer_module(module, hidden)?)
            }
            Self::BflAutoencoder { levels } => {
                autoencoder(keys::bfl_autoencoder_module(module, levels)?)
            }
            Self::BflFlux2Autoencoder { levels } => {
                autoencoder(flux2::keys::bfl_autoencoder_module(module, levels)?)
            }
        }
    }

    /// Tensors that may be in a checkpoint without being used.
    pub(super) fn ignores(self, key: &str) -> bool {
        match self {
            Self::T5 => key == "encoder.embed_tokens.weight", // the same tensor as shared.weight
            Self::Clip => {
                matches!(
                    key,
                    "text_model.embeddings.position_ids" | "text_projection.weight" | "logit_scale"
                )
            }
            Self::LanguageModel { inside: "model" } => key == "lm_head.weight",
            Self::LanguageModel { .. } => {
                let sight = ["vision_tower.", "multi_modal_projector."];
                let part = key.strip_prefix("model.").unwrap_or(key);
                sight.iter().any(|sight| part.starts_with(sight))
                    || matches!(key, "lm_head.weight" | "language_model.lm_head.weight")
            }
            Self::Flux2Autoencoder | Self::BflFlux2Autoencoder { .. } => {
                key == "bn.num_batches_tracked"
            }
            _ => false,
        }
    }
}
