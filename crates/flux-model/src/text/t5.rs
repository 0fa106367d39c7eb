//! The T5 v1.1 encoder; FLUX uses the whole sequence, padding included.
//!
//! No mask (padding attends and is attended), no `1/sqrt(d)`, a relative position bias that block 0 owns and all blocks
//! share, RMS norms, gated GELU.
//!
//! T5-XXL takes 9.5 GB and is needed once per batch of prompts: its blocks are read one after the other and dropped, and of
//! the embedding only the rows that occur.
//!
//! Source: transformers 4.57 `modeling_t5.py` (`T5Stack`, `T5Attention._relative_position_bucket`).

#![allow(
    non_snake_case,
    reason = "fields are checkpoint keys, and the derive repeats them as variables"
)]

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use lora_core::edit::adapter_names;
use lora_core::linear;

use crate::error::WeightsError;
use crate::layers::{RmsNorm, linear_layer, split_heads};
use crate::ops::attention::attention;
use crate::ops::gelu::gelu_tanh;
use crate::text::clip::id_tensor;
use crate::text::embedding::{EMBEDDING, embed};
pub use crate::text::t5_config::T5Config;
use crate::weights::{BaseDtype, Checkpoint, Layout, Stream};

/// The encoder.
#[derive(Module, Debug)]
pub struct T5Encoder {
    shared: Embedding,
    encoder: Stack,
    #[module(skip)]
    config: T5Config,
    /// Where embedding and blocks are, if not in memory.
    #[module(skip)]
    stream: Option<Stream>,
}

/// The blocks are those of the stream from this one on.
const BLOCKS: usize = 1;

#[derive(Module, Debug)]
struct Stack {
    block: Vec<Block>,
    final_layer_norm: RmsNorm,
}

#[derive(Module, Debug)]
struct Block {
    layer: (AttentionLayer, FeedForwardLayer),
}

#[derive(Module, Debug)]
struct AttentionLayer {
    SelfAttention: SelfAttention,
    layer_norm: RmsNorm,
}

#[derive(Module, Debug)]
struct SelfAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    relative_attention_bias: Option<Embedding>,
}

#[derive(Module, Debug)]
struct FeedForwardLayer {
    DenseReluDense: GatedGelu,
    layer_norm: RmsNorm,
}

#[derive(Module, Debug)]
struct GatedGelu {
    wi_0: Linear,
    wi_1: Linear,
    wo: Linear,
}

impl T5Encoder {
    /// A network with lazily initialised weights.
    pub fn new(config: &T5Config, device: &Device) -> Self {
        let (width, inner) = (config.d_model, config.num_heads * config.d_kv);
        let layer = |inputs, outputs| linear_layer(inputs, outputs, false, device);
        let norm = || RmsNorm::new(width, config.layer_norm_epsilon, device);
        let block = (0..config.num_layers)
            .map(|i| Block {
                layer: (
                    AttentionLayer {
                        SelfAttention: SelfAttention {
                            q: layer(width, inner),
                            k: layer(width, inner),
                            v: layer(width, inner),
                            o: layer(inner, width),
                            relative_attention_bias: (i == 0).then(|| {
                                EmbeddingConfig::new(
                                    config.relative_attention_num_buckets,
                                    config.num_heads,
                                )
                                .init(device)
                            }),
                        },
                        layer_norm: norm(),
                    },
                    FeedForwardLayer {
                        DenseReluDense: GatedGelu {
                            wi_0: layer(width, config.d_ff),
                            wi_1: layer(width, config.d_ff),
                            wo: layer(config.d_ff, width),
                        },
                        layer_norm: norm(),
                    },
                ),
            })
            .collect();
        Self {
            shared: EmbeddingConfig::new(config.vocab_size, width).init(device),
            encoder: Stack {
                block,
                final_layer_norm: norm(),
            },
            config: config.clone(),
            stream: None,
        }
    }

    /// The encoder in a checkpoint, where its blocks and its embedding stay.
    ///
    /// # Errors
    /// A tensor that is missing, left over or of another shape.
    pub fn open(
        config: &T5Config,
        checkpoint: Checkpoint,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        let mut blocks = vec!["shared".to_string()];
        blocks.extend((0..config.num_layers).map(|i| format!("encoder.block.{i}")));
        let network = Self::new(config, device);
        let base = BaseDtype::AsStored;
        let (network, stream) = checkpoint.stream(network, blocks, Layout::T5, base, device)?;
        Ok(Self {
            stream: Some(stream),
            ..network
        })
    }

    /// The same with every weight in memory, so that weights can be changed.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn resident(mut self) -> Result<Self, WeightsError> {
        let Some(stream) = self.stream.take() else {
            return Ok(self);
        };
        self.shared = stream.fill(EMBEDDING, self.shared)?;
        let blocks = self.encoder.block.into_iter().enumerate();
        self.encoder.block = blocks
            .map(|(index, block)| stream.fill(BLOCKS + index, block))
            .collect::<Result<_, _>>()?;
        Ok(self)
    }

    /// The architecture.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// Encodes `ids`, one row of token ids per prompt, all of one length; returns `[batch, tokens, d_model]`. A block's weights
    /// are read once for all of them.
    ///
    /// # Errors
    /// Weights that cannot be read.
    /// # Panics
    /// If rows differ in length or an id is outside the vocabulary.
    pub fn forward(&self, ids: &[Vec<i64>], device: &Device) -> Result<Tensor<3>, WeightsError> {
        let tokens = ids.first().map_or(0, Vec::len);
        let mut rows = ids
            .iter()
            .map(|ids| self.embed(ids, device))
            .collect::<Result<Vec<_>, _>>()?;
        let mut bias = None;
        for index in 0..self.encoder.block.len() {
            let block = self.block(index)?;
            if let Some(table) = &block.layer.0.SelfAttention.relative_attention_bias {
                bias = Some(self.position_bias(table, tokens, device));
            }
            for hidden in &mut rows {
                *hidden = block.forward(hidden.clone(), self.config.num_heads, bias.clone()); // one prompt's scores at a time
            }
        }
        let hidden = Tensor::cat(rows, 0);
        Ok(self.encoder.final_layer_norm.forward(hidden))
    }

    fn block(&self, index: usize) -> Result<Block, WeightsError> {
        let block = self.encoder.block[index].clone();
        match &self.stream {
            None => Ok(block),
            Some(stream) => stream.fill(BLOCKS + index, block),
        }
    }

    /// `[1, tokens, d_model]`.
    fn embed(&self, ids: &[i64], device: &Device) -> Result<Tensor<3>, WeightsError> {
        let vocab = self.config.vocab_size;
        let table = match &self.stream {
            None => self.shared.clone(),
            Some(stream) if adapter_names(&self.shared).is_empty() => {
                return embed(stream, ids, vocab, device);
            }
            Some(stream) => stream.fill(EMBEDDING, self.shared.clone())?,
        };
        Ok(table.forward(id_tensor(&[ids.to_vec()], vocab, device)))
    }

    /// `[1, heads, tokens, tokens]`: the learned bias of every pair's distance bucket.
    fn position_bias(&self, table: &Embedding, tokens: usize, device: &Device) -> Tensor<4> {
        let config = &self.config;
        let buckets: Vec<i64> = (0..tokens as i64)
            .flat_map(|query| (0..tokens as i64).map(move |key| key - query))
            .map(|distance| {
                bucket(
                    distance,
                    config.relative_attention_num_buckets,
                    config.relative_attention_max_distance,
                )
            })
            .collect();
        let buckets =
            Tensor::<2, Int>::from_data(TensorData::new(buckets, [tokens, tokens]), device);
        table.forward(buckets).permute([2, 0, 1]).unsqueeze::<4>() // (q, k, heads) -> (1, heads, q, k)
    }
}

impl Block {
    /// # Shapes
    /// - `hidden`: `[batch, tokens, d_model]`, unchanged; `bias`: `[1, heads, tokens, tokens]`
    fn forward(&self, hidden: Tensor<3>, heads: usize, bias: Option<Tensor<4>>) -> Tensor<3> {
        let (attention_layer, mlp_layer) = &self.layer;
        let x = attention_layer.layer_norm.forward(hidden.clone());
        let attn = &attention_layer.SelfAttention;
        let head = |layer: &Linear| split_heads(linear(layer, x.clone()), heads).swap_dims(1, 2);
        let out = attention(head(&attn.q), head(&attn.k), head(&attn.v), 1.0, bias);
        let hidden = hidden + linear(&attn.o, out);

        let x = mlp_layer.layer_norm.forward(hidden.clone());
        let mlp = &mlp_layer.DenseReluDense;
        let gated = gelu_tanh(linear(&mlp.wi_0, x.clone())) * linear(&mlp.wi_1, x);
        hidden + linear(&mlp.wo, gated)
    }
}

/// Bucket of a signed distance: exact up to a quarter of the buckets, then logarithmic up to `max_distance`.
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> i64 {
    let half = buckets as i64 / 2;
    let exact = half / 2;
    let side = if distance > 0 { half } else { 0 };
    let n = distance.abs();
    if n < exact {
        return side + n;
    }
    let ratio = (n as f32 / exact as f32).ln() / ((max_distance as f64 / exact as f64).ln() as f32);
    side + (exact + (ratio * (half - exact) as f32) as i64).min(half - 1)
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_of_the_shipped_table() {
        let starts = [
            (0, 0),
            (7, 7),
            (8, 8),
            (11, 8),
            (12, 9),
            (15, 9),
            (16, 10),
            (22, 10),
            (23, 11),
            (31, 11),
            (32, 12),
        ];
        for (distance, expected) in starts.into_iter().chain([
            (45, 12),
            (46, 13),
            (63, 13),
            (64, 14),
            (90, 14),
            (91, 15),
            (500, 15),
        ]) {
            assert_eq!(bucket(-distance, 32, 128), expected, "distance {distance}");
            if distance > 0 {
                assert_eq!(
                    bucket(distance, 32, 128),
                    16 + expected,
                    "distance {distance}"
                );
            }
        }
    }
}
