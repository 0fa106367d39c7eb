//! `[model]`: the frozen base model.

use std::path::PathBuf;

use flux_model::weights::{BaseDtype, Compute};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{Invalid, check_path};

/// The frozen base model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// Folder of a diffusers pipeline (`transformer`, `vae`, `text_encoder`, `tokenizer`; FLUX.1 has `text_encoder_2` and
    /// `tokenizer_2` too), a single transformer file in such a folder, or a repository of the Hugging Face Hub, "owner/name" or
    /// "owner/name@revision", which is downloaded once ([runs.md](runs.md)). A distilled klein is refused without
    /// `--yes-distilled`. Required.
    pub path: PathBuf,
    /// A single `.safetensors` file, in Black Forest Labs' layout, to use for the transformer instead of the folder's. Default:
    /// none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transformer: Option<PathBuf>,
    /// An autoencoder to use instead of the folder's: a single `.safetensors` file, in Black Forest Labs' layout, or a component
    /// folder or single file of AutoencoderTiny. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
    /// What the transformer's frozen matrices are kept as in memory: "as-stored" (bf16, f16, fp8 and what bitsandbytes has
    /// quantised as the file has them, where the device has the type; what else a file has becomes f32), "f32", "bf16" (rounded
    /// where the file has more bits), "q8" (integers of 8 bits with a factor for every 64) or "nf4" (bitsandbytes' NF4 with
    /// double quantisation, as in QLoRA); what a file has in as few bits stays as it is. Default "as-stored".
    #[schemars(with = "String")]
    pub base_dtype: BaseDtype,
    /// What the blocks of the transformer compute in: "f32", or "bf16" where the device has it: activations and the products
    /// with base weights. Norms, softmax, activation functions, the conditioning and the loss are f32 either way, and so are
    /// adapters, their gradients and moments; the factors are rounded for their products. Default "f32".
    #[schemars(with = "String")]
    pub compute: Compute,
}

impl ModelSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        check_path("model.path", Some(&self.path))?;
        check_path("model.transformer", self.transformer.as_deref())?;
        check_path("model.vae", self.vae.as_deref())
    }
}
