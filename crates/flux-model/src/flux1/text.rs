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
    /// Refuses ids that an encoder does not know: its tokenizer is another's.
    fn check(ids: &[i64], encoder: &str, vocab: usize) -> Result<(), WeightsError> {
        match ids.iter().find(|id| !(0..vocab as i64).contains(id)) {
            None => Ok(()),
            Some(id) => Err(WeightsError::Config {
                path: encoder.into(),
                reason: format!("its tokenizer gives id {id}, but the encoder knows only {vocab}"),
            }),
        }
    }
}

impl TextEncoders for ClipAndT5 {
    const AT_ONCE: usize = 32;

    fn encode(
        &self,
        prompts: &[&str],
        max_sequence_length: usize,
        device: &Device,
    ) -> Result<Vec<Vec<HostTensor>>, WeightsError> {
        let clip = self.clip.config();
        let positions = clip.max_position_embeddings.min(CLIP_TOKENS);
        let (mut clip_ids, mut t5_ids) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let ids = self.clip_tokenizer.encode(prompt, positions)?;
            Self::check(&ids, "text_encoder", clip.vocab_size)?;
            clip_ids.push(ids);
            let ids = self.t5_tokenizer.encode(prompt, max_sequence_length)?;
            Self::check(&ids, "text_encoder_2", self.t5.config().vocab_size)?;
            t5_ids.push(ids);
        }
        let sequences = self.t5.forward(&t5_ids, device)?;
        let rows = clip_ids.into_iter().enumerate().map(|(row, ids)| {
            let pooled = host_tensor(self.clip.forward(&[ids], device).pooled);
            let sequence = sequences.clone().narrow(0, row, 1);
            vec![host_tensor(sequence), pooled]
        });
        Ok(rows.collect())
    }

    fn adapt<C: Adapt>(self, change: &C) -> Result<Self, C::Error> {
        let t5 = match change.changes_weights(Component::T5) {
            true => self.t5.resident()?,
            false => self.t5,
        };
        Ok(Self {
            clip: change.adapt(Component::ClipL, self.clip)?,
            t5: change.adapt(Component::T5, t5)?,
            ..self
        })
    }
}
