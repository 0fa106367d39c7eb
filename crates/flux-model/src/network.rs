//! The velocity network as a chain of blocks, and its input by the names of diffusers.

use std::collections::BTreeMap;
use std::fmt::Debug;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::training::recompute::Blocks;

use crate::error::WeightsError;
use crate::lora::ModelShape;
use crate::weights::{Compute, Stream};

/// What a step of training runs: enter, the blocks one after the other, leave.
pub trait Velocity: Module + Blocks<Error = WeightsError> {
    /// All that one forward pass reads.
    type Input: Clone + Debug + Send;

    /// What the first block gets, and what every block reads.
    ///
    /// # Errors
    /// Weights that are not resident and cannot be read.
    fn enter(&self, input: Self::Input) -> Result<(Self::Carry, Self::Shared), WeightsError>;

    /// What the last block gave, as the velocity of the image tokens, `[batch, img_tokens, out_channels]`.
    fn leave(&self, carry: Self::Carry, shared: &Self::Shared) -> Tensor<3>;

    /// The velocity, `[batch, img_tokens, out_channels]`.
    ///
    /// # Errors
    /// A block that is not resident and cannot be read.
    fn forward(&self, input: Self::Input) -> Result<Tensor<3>, WeightsError> {
        let (mut carry, shared) = self.enter(input)?;
        for index in 0..self.count() {
            carry = Self::apply(&self.block(index)?, carry, &shared);
        }
        Ok(self.leave(carry, &shared))
    }
}

/// A velocity network.
pub trait Network: Velocity {
    /// Width of a token between blocks.
    fn width(&self) -> usize;

    /// Heads of its attention.
    fn heads(&self) -> usize;

    /// How many streams of tokens block `index` keeps apart, each with layers of its own.
    fn streams(&self, index: usize) -> usize;

    /// The same with its blocks in `stream`, which it then gets them from.
    #[must_use]
    fn with_stream(self, stream: Stream) -> Self;

    /// The same with blocks that compute in another type.
    #[must_use]
    fn with_compute(self, compute: Compute) -> Self;

    /// Its architecture, which LoRA files are read against.
    fn shape(&self) -> ModelShape;

    /// Whether the guidance strength is an input of it.
    fn reads_guidance(&self) -> bool;

    /// Its input from tensors under the names that diffusers' `forward` gives its arguments.
    ///
    /// # Errors
    /// What is missing or of another shape, in words.
    fn named_input(
        &self,
        tensors: &BTreeMap<String, HostTensor>,
        device: &Device,
    ) -> Result<Self::Input, String>;
}

/// The tokens that a linear layer is computed of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sees {
    /// None: the conditioning, once a picture.
    Conditioning,
    /// Those of the text.
    Text,
    /// Those of the image.
    Image,
    /// All.
    All,
}

impl Sees {
    /// Of the layer at `path`, by the names that both families have from diffusers.
    pub fn of(path: &str) -> Self {
        let has = |part| path.contains(part);
        match path {
            _ if has("norm") || has("time") || has("modulation") => Self::Conditioning,
            _ if has("context") || has("add_") => Self::Text,
            _ if path.starts_with("single_") => Self::All,
            _ => Self::Image,
        }
    }
}

/// An argument of diffusers' `forward`, see [`Network::named_input`].
pub(crate) fn argument<const D: usize>(
    tensors: &BTreeMap<String, HostTensor>,
    name: &str,
    device: &Device,
) -> Result<Tensor<D>, String> {
    let tensor = named(tensors, name)?;
    if tensor.shape.len() != D {
        let shape = &tensor.shape;
        return Err(format!(
            "input `{name}` has shape {shape:?}, not {D} dimensions"
        ));
    }
    let data = TensorData::new(tensor.to_f32(), tensor.shape.clone());
    Ok(Tensor::from_data(data, device))
}

/// Numbers, one for each row of the batch.
pub(crate) fn numbers(
    tensors: &BTreeMap<String, HostTensor>,
    name: &str,
) -> Result<Vec<f32>, String> {
    Ok(named(tensors, name)?.to_f32())
}

/// The guidance strength of each of so many rows; 0 where it is not read.
pub(crate) fn guidance(
    network: &impl Network,
    tensors: &BTreeMap<String, HostTensor>,
    rows: usize,
) -> Result<Vec<f32>, String> {
    match network.reads_guidance() {
        true => numbers(tensors, "guidance"),
        false => Ok(vec![0.0; rows]),
    }
}

/// Positions, `[tokens, N]`.
pub(crate) fn positions<const N: usize>(
    tensors: &BTreeMap<String, HostTensor>,
    name: &str,
) -> Result<Vec<[f32; N]>, String> {
    let tensor = named(tensors, name)?;
    match tensor.shape.as_slice() {
        &[_, axes] if axes == N => Ok(tensor.to_f32().as_chunks().0.to_vec()),
        shape => Err(format!(
            "input `{name}` has shape {shape:?}, not [tokens, {N}]"
        )),
    }
}

fn named<'a>(
    tensors: &'a BTreeMap<String, HostTensor>,
    name: &str,
) -> Result<&'a HostTensor, String> {
    tensors
        .get(name)
        .ok_or_else(|| format!("no input `{name}`"))
}

#[cfg(test)]
mod tests {
    use super::Sees;

    #[test]
    fn layers_see_the_tokens_of_their_stream() {
        for (path, sees) in [
            ("x_embedder", Sees::Image),
            ("context_embedder", Sees::Text),
            (
                "time_text_embed.timestep_embedder.linear_1",
                Sees::Conditioning,
            ),
            (
                "transformer_blocks.0.norm1_context.linear",
                Sees::Conditioning,
            ),
            ("transformer_blocks.0.attn.add_k_proj", Sees::Text),
            ("transformer_blocks.0.attn.to_add_out", Sees::Text),
            ("transformer_blocks.0.attn.to_out.0", Sees::Image),
            ("transformer_blocks.0.ff_context.net.2", Sees::Text),
            (
                "single_transformer_blocks.3.norm.linear",
                Sees::Conditioning,
            ),
            ("single_transformer_blocks.3.proj_mlp", Sees::All),
            (
                "single_transformer_blocks.3.attn.to_qkv_mlp_proj",
                Sees::All,
            ),
            ("double_stream_modulation_img.linear", Sees::Conditioning),
            ("proj_out", Sees::Image),
        ] {
            assert_eq!(Sees::of(path), sees, "{path}");
        }
    }
}
