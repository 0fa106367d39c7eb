//! How FLUX.1 reads a prompt: CLIP gives one pooled vector, T5 the sequence.

use burn::tensor::{Device, Tensor};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use crate::error::WeightsError;
use crate::family::{Adapt, TextEncoders};
use crate::lora::Component;
use crate::text::clip::ClipText;
use crate::text::t5::T5Encoder;
use crate::text::tokenizer::{ClipTokenizer, T5Tokenizer};

/// Tokens CLIP reads: its tokenizer pads and truncates to this.
pub(super) const CLIP_TOKENS: usize = 77;

/// Both text encoders with their tokenizers.
#[derive(Debug)]
pub struct ClipAndT5 {
    pub(super) clip: ClipText,
    pub(super) clip_tokenizer: ClipTokenizer,
    pub(super) t5: T5Encoder,
    pub(super) t5_tokenizer: T5Tokenizer,
}

/// Prompts as the transformer reads them.
#[derive(Debug, Clone)]
pub struct TextEmbedding {
    /// T5's sequence, `[batch, max_sequence_length, joint_attention_dim]`.
    pub sequence: Tensor<3>,
    /// CLIP's pooled vector, `[batch, pooled_projection_dim]`.
    pub pooled: Tensor<2>,
}

impl ClipAndT5 {
    fn encode_one(
        &self,
        prompt: &str,
        max_sequence_length: usize,
        device: &Device,
    ) -> Result<Vec<HostTensor>, WeightsError> {
        let positions = self.clip.config().max_position_embeddings.min(CLIP_TOKENS);
        let clip_ids = self.clip_tokenizer.encode(prompt, positions)?;
        let t5_ids = self.t5_tokenizer.encode(prompt, max_sequence_length)?;
        for (name, ids, vocab) in [
            ("text_encoder", &clip_ids, self.clip.config().vocab_size),
            ("text_encoder_2", &t5_ids, self.t5.config().vocab_size),
        ] {
            if let Some(id) = ids.iter().find(|id| !(0..vocab as i64).contains(id)) {
                return Err(WeightsError::Config {
                    path: name.into(),
                    reason: format!(
                        "its tokenizer gives id {id}, but the encoder knows only {vocab}"
                    ),
                });
            }
        }
        let pooled = host_tensor(self.clip.forward(&[clip_ids], device).pooled);
        let sequence = host_tensor(self.t5.forward(&[t5_ids], device));
        Ok(vec![sequence, pooled])
    }
}

impl TextEncoders for ClipAndT5 {
    const AT_ONCE: usize = 1;

    fn encode(
        &self,
        prompts: &[&str],
        max_sequence_length: usize,
        device: &Device,
    ) -> Result<Vec<Vec<HostTensor>>, WeightsError> {
        let each = prompts.iter();
        each.map(|prompt| self.encode_one(prompt, max_sequence_length, device))
            .collect()
    }

    fn adapt<C: Adapt>(self, change: &C) -> Result<Self, C::Error> {
        Ok(Self {
            clip: change.adapt(Component::ClipL, self.clip)?,
            t5: change.adapt(Component::T5, self.t5)?,
            ..self
        })
    }
}
