//! `[sample]`: preview images made while training.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{
    AT_LEAST_0, Invalid, MAX_COUNT, check_at_least_1, check_count, check_path, check_seed,
    check_side,
};

/// Preview images made while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SampleSection {
    /// Texts to make an image of, each time. Required.
    pub prompts: Vec<String>,
    /// Make previews each time this many optimizer steps are done. Default 100.
    pub every: u64,
    /// Make previews before the first step too, to compare with. Default true.
    pub at_start: bool,
    /// Denoising steps for an image. Default 20.
    pub num_inference_steps: usize,
    /// Guidance strength: told to a model that has it as an input (FLUX.1 dev, FLUX.2 dev), else how far to go from the empty prompt (FLUX.2
    /// klein base). Default 3.5.
    pub guidance_scale: f64,
    /// Height in pixels, a multiple of 16. Default 512.
    pub height: u32,
    /// Width in pixels, a multiple of 16. Default 512.
    pub width: u32,
    /// Seed of the previews' own noise. Default 42.
    pub seed: u64,
    /// Another autoencoder to decode previews with, a component folder or a single `.safetensors` file: TAEF1 is a hundredth of
    /// FLUX.1's own. Default: none.
    pub preview_vae: Option<PathBuf>,
}

impl Default for SampleSection {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            every: 100,
            at_start: true,
            num_inference_steps: 20,
            guidance_scale: 3.5,
            height: 512,
            width: 512,
            seed: 42,
            preview_vae: None,
        }
    }
}

impl SampleSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        if self.prompts.is_empty() {
            let problem = "required, but not given: list at least one prompt";
            return Err(("sample.prompts", problem.into()));
        }
        check_at_least_1("sample.every", self.every)?;
        check_count(
            "sample.num_inference_steps",
            self.num_inference_steps,
            MAX_COUNT,
        )?;
        AT_LEAST_0.check("sample.guidance_scale", self.guidance_scale)?;
        check_side("sample.height", self.height)?;
        check_side("sample.width", self.width)?;
        check_seed("sample.seed", self.seed)?;
        check_path("sample.preview_vae", self.preview_vae.as_deref())
    }
}
