//! How FLUX.1 reads a prompt: CLIP gives one pooled vector, T5 the sequence.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use crate::error::WeightsError;
use crate::family::{Adapt, TextEncoders, TextModules};
use crate::lora::{Component, ModelShape};
use crate::text::clip::{ClipConfig, ClipText};
use crate::text::t5::{T5Config, T5Encoder};
use crate::text::tokenizer::{ClipTokenizer, T5Tokenizer};

/// Tokens CLIP reads: its tokenizer pads and truncates to this.
pub(super) const CLIP_TOKENS: usize = 77;

/// Both text encoders with their tokenizers.
#[derive(Debug)]
pub struct ClipAndT5 {
    pub(super) clip: ClipText,
    pub(super) t5: T5Encoder,
    pub(super) tokenizers: Tokenizers,
}

/// Both tokenizers, and what their encoders take.
#[derive(Debug)]
pub(super) struct Tokenizers {
    pub(super) clip: (ClipTokenizer, ClipConfig),
    pub(super) t5: (T5Tokenizer, T5Config),
}

/// A prompt as token ids.
#[derive(Debug, Clone)]
pub struct Tokens {
    clip: Vec<i64>,
    t5: Vec<i64>,
}

/// Prompts as the transformer reads them.
#[derive(Debug, Clone)]
pub struct TextEmbedding {
    /// T5's sequence, `[batch, max_sequence_length, joint_attention_dim]`.
    pub sequence: Tensor<3>,
    /// CLIP's pooled vector, `[batch, pooled_projection_dim]`.
    pub pooled: Tensor<2>,
}

impl TextEmbedding {
    /// From a sequence and a pooled vector for every prompt.
    pub(super) fn of(parts: &[HostTensor], device: &Device) -> Self {
        Self {
            sequence: upload(&parts[0], device),
            pooled: upload(&parts[1], device),
        }
    }
}

fn upload<const D: usize>(tensor: &HostTensor, device: &Device) -> Tensor<D> {
    Tensor::from_data(
        TensorData::new(tensor.to_f32(), tensor.shape.clone()),
        device,
    )
}

impl Tokenizers {
    /// Token ids of a prompt, which a longer one is cut to `max_sequence_length` of for T5.
    ///
    /// # Errors
    /// A prompt that a tokenizer refuses, a token that its encoder does not know.
    pub(super) fn tokens(
        &self,
        prompt: &str,
        max_sequence_length: usize,
    ) -> Result<Tokens, WeightsError> {
        let ((clip, of_clip), (t5, of_t5)) = (&self.clip, &self.t5);
        let positions = of_clip.max_position_embeddings.min(CLIP_TOKENS);
        let tokens = Tokens {
            clip: clip.encode(prompt, positions)?,
            t5: t5.encode(prompt, max_sequence_length)?,
        };
        check(&tokens.clip, "text_encoder", of_clip.vocab_size)?;
        check(&tokens.t5, "text_encoder_2", of_t5.vocab_size)?;
        Ok(tokens)
    }
}

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

impl TextEncoders for ClipAndT5 {
    const AT_ONCE: usize = 32;

    fn encode(
        &self,
        prompts: &[&str],
        max_sequence_length: usize,
        device: &Device,
    ) -> Result<Vec<Vec<HostTensor>>, WeightsError> {
        let (mut clip_ids, mut t5_ids) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let tokens = self.tokenizers.tokens(prompt, max_sequence_length)?;
            clip_ids.push(tokens.clip);
            t5_ids.push(tokens.t5);
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

/// The text encoders that are trained, by their folders.
#[derive(Module, Debug)]
pub struct TrainedText {
    pub(super) text_encoder: Option<ClipText>,
    pub(super) text_encoder_2: Option<T5Encoder>,
}

impl TextModules for TrainedText {
    type Tokens = Tokens;
    type Text = TextEmbedding;

    fn text(
        &self,
        tokens: &[Tokens],
        encoded: &[HostTensor],
        device: &Device,
    ) -> Result<TextEmbedding, WeightsError> {
        let ids = |of: fn(&Tokens) -> &Vec<i64>| -> Vec<Vec<i64>> {
            tokens.iter().map(|tokens| of(tokens).clone()).collect()
        };
        Ok(TextEmbedding {
            sequence: match &self.text_encoder_2 {
                Some(t5) => t5.forward(&ids(|tokens| &tokens.t5), device)?,
                None => upload(&encoded[0], device),
            },
            pooled: match &self.text_encoder {
                Some(clip) => clip.forward(&ids(|tokens| &tokens.clip), device).pooled,
                None => upload(&encoded[1], device),
            },
        })
    }

    fn adapt<C: Adapt>(self, change: &C) -> Result<Self, C::Error> {
        let clip = |clip| change.adapt(Component::ClipL, clip);
        let t5 = |t5| change.adapt(Component::T5, t5);
        Ok(Self {
            text_encoder: self.text_encoder.map(clip).transpose()?,
            text_encoder_2: self.text_encoder_2.map(t5).transpose()?,
        })
    }
    fn shape(&self) -> ModelShape {
        let (clip, t5) = (&self.text_encoder, &self.text_encoder_2);
        ModelShape {
            clip: clip.as_ref().map(|clip| clip.config().clone()),
            t5: t5.as_ref().map(|t5| t5.config().clone()),
            ..ModelShape::default()
        }
    }
}
