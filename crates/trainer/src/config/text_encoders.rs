//! `[lora.text_encoder]` and `[lora.text_encoder_2]`: adapters of the encoders that read prompts.

use flux_model::lora::Component;
use lora_core::LoraConfig;
use lora_core::peft::{Patterns, Targets, TrainBias};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schemas::one_or_many;

/// The adapter of a text encoder, which is trained where the section is there, be it empty. What it does not say is as in
/// `[lora]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TextEncoderSection {
    /// Rank of the update. Default: that of `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<usize>,
    /// Numerator of the scale. Default: that of `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Layers to adapt: a list of path endings, one regular expression for the whole path, or "all-linear". Default: the
    /// attention, of CLIP as diffusers' training script has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "one_or_many::<String>")]
    pub target_modules: Option<Targets>,
}

impl TextEncoderSection {
    /// The configuration of its adapter, beside one of the transformer that `[lora]` says.
    pub(super) fn config(&self, encoder: Component, transformer: LoraConfig) -> LoraConfig {
        let attention: &[&str] = match encoder {
            Component::T5 => &["q", "k", "v", "o"],
            _ => &["q_proj", "k_proj", "v_proj", "out_proj"],
        };
        let attention = || Targets::List(attention.iter().copied().map(String::from).collect());
        LoraConfig {
            r: self.r.unwrap_or(transformer.r),
            lora_alpha: self.lora_alpha.unwrap_or(transformer.lora_alpha),
            target_modules: self.target_modules.clone().unwrap_or_else(attention),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: Vec::new(),
            bias: TrainBias::None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            ..transformer
        }
    }
}
