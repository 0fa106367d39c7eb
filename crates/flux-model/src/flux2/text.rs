//! How FLUX.2 reads a prompt: three layers of a language model side by side, Qwen3 (klein) or Mistral (dev).

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use crate::error::WeightsError;
use crate::family::{Adapt, TextEncoders, TextModules};
use crate::lora::ModelShape;
use crate::text::decoder::{DecoderConfig, DecoderEncoder, ModelType};
use crate::text::tokenizer::ChatTokenizer;

/// A language model with its tokenizer.
pub struct Flux2TextEncoder {
    /// The tokenizer.
    pub tokenizer: ChatTokenizer,
    /// The encoder.
    pub encoder: DecoderEncoder,
}

/// The tokenizer of the pipeline at `root`: that of the language model its text encoder is.
///
/// # Errors
/// A configuration or tokenizer that is missing or cannot be used.
pub fn tokenizer(root: &Path) -> Result<ChatTokenizer, WeightsError> {
    let config = DecoderConfig::read(&root.join("text_encoder/config.json"))?;
    let folder = root.join("tokenizer");
    Ok(match config.model_type {
        ModelType::Qwen3 => ChatTokenizer::qwen(&folder)?,
        ModelType::Mistral => ChatTokenizer::mistral(&folder)?,
    })
}

impl Flux2TextEncoder {
    /// Opens the folders `text_encoder` and `tokenizer` of a pipeline.
    ///
    /// # Errors
    /// A malformed file, a tensor that is missing, left over or of another shape, or an unusable tokenizer.
    pub fn open(root: &Path, device: &Device) -> Result<Self, WeightsError> {
        Ok(Self {
            tokenizer: tokenizer(root)?,
            encoder: DecoderEncoder::open(&root.join("text_encoder"), device)?,
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

impl TextEncoders for Flux2TextEncoder {
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

/// No text encoder is trained: no program loads a LoRA of one with that of the transformer.
#[derive(Module, Debug)]
pub struct NoTrainedText {}

impl TextModules for NoTrainedText {
    type Tokens = ();
    type Text = Tensor<3>;

    fn text(
        &self,
        _: &[()],
        encoded: &[HostTensor],
        device: &Device,
    ) -> Result<Tensor<3>, WeightsError> {
        Ok(sequence(&encoded[0], device))
    }

    fn adapt<C: Adapt>(self, _: &C) -> Result<Self, C::Error> {
        Ok(self)
    }

    fn shape(&self) -> ModelShape {
        ModelShape::default()
    }
}

/// A cached sequence on a device.
pub(super) fn sequence(encoded: &HostTensor, device: &Device) -> Tensor<3> {
    let data = TensorData::new(encoded.to_f32(), encoded.shape.clone());
    Tensor::from_data(data, device)
}
