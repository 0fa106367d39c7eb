//! How FLUX.2 klein reads a prompt: three layers of Qwen3 side by side.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use crate::error::WeightsError;
use crate::family::{Adapt, TextEncoders};
use crate::text::qwen3::Qwen3Encoder;
use crate::text::tokenizer::QwenTokenizer;

/// Qwen3 with its tokenizer.
pub struct KleinTextEncoder {
    /// The tokenizer.
    pub tokenizer: QwenTokenizer,
    /// The encoder.
    pub encoder: Qwen3Encoder,
}

impl KleinTextEncoder {
    /// Opens the folders `text_encoder` and `tokenizer` of a pipeline.
    ///
    /// # Errors
    /// A malformed file, a tensor that is missing, left over or of another shape, or an unusable tokenizer.
    pub fn open(root: &Path, device: &Device) -> Result<Self, WeightsError> {
        Ok(Self {
            tokenizer: QwenTokenizer::load(&root.join("tokenizer"))?,
            encoder: Qwen3Encoder::open(&root.join("text_encoder"), device)?,
        })
    }

    /// Prompts, each padded to `max_sequence_length` tokens, by the outputs of `layers` side by side:
    /// `[prompts, max_sequence_length, layers * hidden_size]`. The encoder's weights are read once for all of them.
    ///
    /// # Errors
    /// A prompt the tokenizer refuses, a token outside the encoder's vocabulary, weights that cannot be read.
    pub fn encode_layers(
        &self,
        prompts: &[&str],
        max_sequence_length: usize,
        layers: &[usize],
    ) -> Result<Tensor<3>, WeightsError> {
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let tokens = self.tokenizer.encode(prompt, max_sequence_length)?;
            ids.push(tokens.ids);
            mask.push(tokens.mask);
        }
        let states = self.encoder.hidden_states(&ids, &mask, layers)?;
        Ok(Tensor::cat(states, 2))
    }
}

impl TextEncoders for KleinTextEncoder {
    const AT_ONCE: usize = 32;

    fn encode(
        &self,
        prompts: &[&str],
        max_sequence_length: usize,
        _: &Device,
    ) -> Result<Vec<Vec<HostTensor>>, WeightsError> {
        let layers = self.encoder.config().output_layers();
        let sequences = self.encode_layers(prompts, max_sequence_length, &layers)?;
        let rows = (0..prompts.len()).map(|i| sequences.clone().narrow(0, i, 1));
        Ok(rows.map(|sequence| vec![host_tensor(sequence)]).collect())
    }

    /// No LoRA names this encoder.
    fn adapt<C: Adapt>(self, _: &C) -> Result<Self, C::Error> {
        Ok(self)
    }
}
