//! The CLIP text encoder; FLUX uses its pooled vector.
//!
//! Pooled is the last hidden state at the end-of-text token, without projection. With `eos_token_id == 2`, which the
//! shipped configuration says and means nothing, that token is the largest id; otherwise it is the first `eos_token_id`.
//!
//! Source: transformers 4.57 `modeling_clip.py` (`CLIPTextTransformer`).

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear};
use burn::tensor::activation::{gelu, sigmoid};
use burn::tensor::{Device, Int, Tensor, TensorData};
use lora_core::linear;
use serde::{Deserialize, Serialize};

use crate::layers::{linear_layer, split_heads};
use crate::ops::attention::attention;
use crate::sizes::{MAX_LAYERS, out_of_range};

/// CLIP text encoder. Source: transformers `CLIPTextConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: Activation,
    /// Added to the variance.
    pub layer_norm_eps: f64,
    /// 2 selects the legacy pooling rule, see the top of this file.
    pub eos_token_id: i64,
}

/// `hidden_act` of a text encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// Exact GELU.
    Gelu,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

impl ClipConfig {
    /// CLIP-L, as shipped with FLUX.1.
    pub fn clip_l() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_attention_heads: 12,
            eos_token_id: 2,
            ..Self::default()
        }
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("num_attention_heads", self.num_attention_heads),
        ];
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if self.num_hidden_layers > MAX_LAYERS {
            return Some(format!("more than {MAX_LAYERS} layers"));
        }
        (!self.hidden_size.is_multiple_of(self.num_attention_heads)).then(|| {
            format!(
                "hidden size {} cannot be split into {} heads",
                self.hidden_size, self.num_attention_heads
            )
        })
    }
}

/// The encoder.
#[derive(Module, Debug)]
pub struct ClipText {
    text_model: TextModel,
    #[module(skip)]
    config: ClipConfig,
}

/// What the encoder returns.
#[derive(Debug, Clone)]
pub struct ClipOutput {
    /// `[batch, tokens, hidden_size]`, after the final norm.
    pub last_hidden_state: Tensor<3>,
    /// `[batch, hidden_size]`.
    pub pooled: Tensor<2>,
}

#[derive(Module, Debug)]
struct TextModel {
    embeddings: Embeddings,
    encoder: ClipEncoder,
    final_layer_norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Embeddings {
    token_embedding: Embedding,
    position_embedding: Embedding,
}

#[derive(Module, Debug)]
struct ClipEncoder {
    layers: Vec<ClipLayer>,
}

#[derive(Module, Debug)]
struct ClipLayer {
    self_attn: ClipAttention,
    layer_norm1: LayerNorm,
    mlp: ClipMlp,
    layer_norm2: LayerNorm,
}

#[derive(Module, Debug)]
struct ClipAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
}

#[derive(Module, Debug)]
struct ClipMlp {
    fc1: Linear,
    fc2: Linear,
}

impl ClipText {
    /// A network with lazily initialised weights.
    pub fn new(config: &ClipConfig, device: &Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let norm = || {
            LayerNormConfig::new(hidden)
                .with_epsilon(config.layer_norm_eps)
                .init(device)
        };
        let square = || linear_layer(hidden, hidden, true, device);
        let layers = (0..config.num_hidden_layers)
            .map(|_| ClipLayer {
                self_attn: ClipAttention {
                    q_proj: square(),
                    k_proj: square(),
                    v_proj: square(),
                    out_proj: square(),
                },
                layer_norm1: norm(),
                mlp: ClipMlp {
                    fc1: linear_layer(hidden, inner, true, device),
                    fc2: linear_layer(inner, hidden, true, device),
                },
                layer_norm2: norm(),
            })
            .collect();
        Self {
            text_model: TextModel {
                embeddings: Embeddings {
                    token_embedding: EmbeddingConfig::new(config.vocab_size, hidden).init(device),
                    position_embedding: EmbeddingConfig::new(
                        config.max_position_embeddings,
                        hidden,
                    )
                    .init(device),
                },
                encoder: ClipEncoder { layers },
                final_layer_norm: norm(),
            },
            config: config.clone(),
        }
    }

    /// The architecture.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Encodes `ids`, one row of token ids per prompt, all of one length.
    ///
    /// # Panics
    /// If rows differ in length or are longer than `max_position_embeddings`, or an id is outside the vocabulary.
    pub fn forward(&self, ids: &[Vec<i64>], device: &Device) -> ClipOutput {
        let (batch, tokens) = (ids.len(), ids.first().map_or(0, Vec::len));
        assert!(
            tokens <= self.config.max_position_embeddings,
            "{tokens} tokens are more than the encoder has positions"
        );
        let model = &self.text_model;
        let positions = Tensor::<1, Int>::arange(0..tokens as i64, device).unsqueeze::<2>();
        let mut hidden = model.embeddings.token_embedding.forward(id_tensor(
            ids,
            self.config.vocab_size,
            device,
        )) + model.embeddings.position_embedding.forward(positions);

        let heads = self.config.num_attention_heads;
        let scale = 1.0 / ((self.config.hidden_size / heads) as f64).sqrt();
        let causal = causal_bias(tokens, device);
        for layer in &model.encoder.layers {
            let x = layer.layer_norm1.forward(hidden.clone());
            let head =
                |layer: &Linear| split_heads(linear(layer, x.clone()), heads).swap_dims(1, 2);
            let attn = &layer.self_attn;
            let (q, k, v) = (head(&attn.q_proj), head(&attn.k_proj), head(&attn.v_proj));
            hidden = hidden
                + linear(
                    &attn.out_proj,
                    attention(q, k, v, scale, Some(causal.clone())),
                );

            let x = linear(&layer.mlp.fc1, layer.layer_norm2.forward(hidden.clone()));
            let x = match self.config.hidden_act {
                Activation::QuickGelu => x.clone() * sigmoid(x * 1.702),
                Activation::Gelu => gelu(x),
            };
            hidden = hidden + linear(&layer.mlp.fc2, x);
        }
        let last_hidden_state = model.final_layer_norm.forward(hidden);
        let rows: Vec<Tensor<3>> = ids
            .iter()
            .enumerate()
            .map(|(row, ids)| {
                let end = end_of_text(ids, self.config.eos_token_id);
                last_hidden_state
                    .clone()
                    .slice([row..row + 1, end..end + 1])
            })
            .collect();
        let pooled = Tensor::cat(rows, 0).reshape([batch, self.config.hidden_size]);
        ClipOutput {
            last_hidden_state,
            pooled,
        }
    }
}

/// Where the pooled vector is taken.
fn end_of_text(ids: &[i64], eos: i64) -> usize {
    if eos == 2 {
        let largest = ids.iter().max().copied().unwrap_or_default();
        return ids.iter().position(|&id| id == largest).unwrap_or(0);
    }
    ids.iter().position(|&id| id == eos).unwrap_or(0)
}

/// `[batch, tokens]` from rows of ids.
///
/// # Panics
/// If rows differ in length or an id is outside `0..vocab`.
pub(crate) fn id_tensor(ids: &[Vec<i64>], vocab: usize, device: &Device) -> Tensor<2, Int> {
    let tokens = ids.first().map_or(0, Vec::len);
    assert!(
        ids.iter().all(|row| row.len() == tokens),
        "prompts must be padded to one length"
    );
    let flat: Vec<i64> = ids.iter().flatten().copied().collect();
    assert!(
        flat.iter().all(|&id| (0..vocab as i64).contains(&id)),
        "a token id is outside the vocabulary of {vocab}"
    );
    Tensor::from_data(TensorData::new(flat, [ids.len(), tokens]), device)
}

/// 0 on and below the diagonal, -inf above (as the largest negative f32, which softmax turns into the same zeros).
fn causal_bias(tokens: usize, device: &Device) -> Tensor<4> {
    let values: Vec<f32> = (0..tokens)
        .flat_map(|row| (0..tokens).map(move |column| if column > row { f32::MIN } else { 0.0 }))
        .collect();
    Tensor::from_data(TensorData::new(values, [1, 1, tokens, tokens]), device)
}
