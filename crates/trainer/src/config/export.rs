//! `[export]`: what the finished LoRA is written as.

use lora_core::peft::PeftType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::Invalid;

/// What the finished LoRA is written as.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExportSection {
    /// `diffusers` (`lora.safetensors`, always written), `peft`, `kohya`, `comfyui` (`lora-kohya.safetensors` and so on, beside
    /// it). With `lora.peft_type` LOHA or LOKR, `lora.safetensors` has LyCORIS keys under diffusers' names, which ComfyUI and
    /// ai-toolkit read but diffusers does not, and `kohya` is refused. Default ["diffusers"].
    pub formats: Vec<ExportFormat>,
}

impl Default for ExportSection {
    fn default() -> Self {
        Self {
            formats: vec![ExportFormat::Diffusers],
        }
    }
}

impl ExportSection {
    pub(super) fn check(&self, kind: PeftType) -> Result<(), Invalid> {
        if kind != PeftType::Lora && self.formats.contains(&ExportFormat::Kohya) {
            let problem = format!(
                "cannot be \"kohya\" with lora.peft_type = \"{kind}\": it has query, key and value in one layer; use \"comfyui\" or \"peft\""
            );
            return Err(("export.formats", problem));
        }
        Ok(())
    }
}

/// A LoRA file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportFormat {
    /// diffusers.
    Diffusers,
    /// A PEFT folder.
    Peft,
    /// kohya sd-scripts.
    Kohya,
    /// ComfyUI.
    Comfyui,
}
