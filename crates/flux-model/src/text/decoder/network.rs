//! The network: a token embedding, layers of attention and a gated MLP, a norm that nothing here runs.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear};
use burn::tensor::{Device, Tensor};
use lora_core::linear;

use super::rotary::HalfSplitRotary;
use super::{DecoderConfig, ModelType};
use crate::layers::{RmsNorm, linear_layer, split_heads};
use crate::ops::attention::attention;
use crate::ops::silu::silu;

/// All of the network but the output head; of use for the names and shapes of its tensors.
#[derive(Module, Debug)]
pub struct DecoderText {
    model: Stack,
}

#[derive(Module, Debug)]
struct Stack {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
}

#[derive(Module, Debug)]
pub(super) struct Layer {
    input_layernorm: RmsNorm,
    self_attn: SelfAttention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
}

#[derive(Module, Debug)]
struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    /// Qwen3 has these.
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    key_value_heads: usize,
}

#[derive(Module, Debug)]
struct GatedMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl DecoderText {
    /// A network with lazily initialised weights.
    pub fn new(config: &DecoderConfig, device: &Device) -> Self {
        Self {
            model: Stack {
                embed_tokens: EmbeddingConfig::new(config.vocab_size, config.hidden_size)
                    .init(device),
                layers: (0..config.num_hidden_layers)
                    .map(|_| Layer::new(config, device))
                    .collect(),
                norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, device),
            },
        }
    }

    /// Paths of its parts that are read one at a time: the embedding, the norm, then the layers.
    pub(super) fn blocks(&self) -> Vec<String> {
        let mut blocks = vec!["model.embed_tokens".to_string(), "model.norm".to_string()];
        let layers = 0..self.model.layers.len();
        blocks.extend(layers.map(|i| format!("model.layers.{i}")));
        blocks
    }

    /// Layer `index`, and which of [`blocks`](Self::blocks) it is.
    pub(super) fn layer(&self, index: usize) -> (usize, Layer) {
        (2 + index, self.model.layers[index].clone())
    }
}

impl Layer {
    fn new(config: &DecoderConfig, device: &Device) -> Self {
        let (width, mlp, head) = (
            config.hidden_size,
            config.intermediate_size,
            config.head_width(),
        );
        let queries = config.num_attention_heads * head;
        let keys = config.num_key_value_heads * head;
        let layer = |inputs, outputs| linear_layer(inputs, outputs, false, device);
        let norm = |width| RmsNorm::new(width, config.rms_norm_eps, device);
        let head_norm = || (config.model_type == ModelType::Qwen3).then(|| norm(head));
        Self {
            input_layernorm: norm(width),
            self_attn: SelfAttention {
                q_proj: layer(width, queries),
                k_proj: layer(width, keys),
                v_proj: layer(width, keys),
                o_proj: layer(queries, width),
                q_norm: head_norm(),
                k_norm: head_norm(),
                heads: config.num_attention_heads,
                key_value_heads: config.num_key_value_heads,
            },
            post_attention_layernorm: norm(width),
            mlp: GatedMlp {
                gate_proj: layer(width, mlp),
                up_proj: layer(width, mlp),
                down_proj: layer(mlp, width),
            },
        }
    }

    /// # Shapes
    /// - `hidden`: `[batch, tokens, hidden_size]`, unchanged; `bias`: broadcast to `[batch, heads, tokens, tokens]`
    pub(super) fn forward(
        &self,
        hidden: Tensor<3>,
        rotary: &HalfSplitRotary,
        bias: &Tensor<4>,
    ) -> Tensor<3> {
        let x = self.input_layernorm.forward(hidden.clone());
        self.forward_alone(hidden + self.self_attn.forward(x, rotary, bias))
    }

    /// What [`forward`](Self::forward) is for tokens that may look at none, themselves included: attention adds nothing.
    pub(super) fn forward_alone(&self, hidden: Tensor<3>) -> Tensor<3> {
        let x = self.post_attention_layernorm.forward(hidden.clone());
        let mlp = &self.mlp;
        let gated = silu(linear(&mlp.gate_proj, x.clone())) * linear(&mlp.up_proj, x);
        hidden + linear(&mlp.down_proj, gated)
    }
}

impl SelfAttention {
    fn forward(&self, x: Tensor<3>, rotary: &HalfSplitRotary, bias: &Tensor<4>) -> Tensor<3> {
        let head = |layer: &Linear, heads, norm: Option<&RmsNorm>| {
            let x = split_heads(linear(layer, x.clone()), heads);
            match norm {
                Some(norm) => norm.forward(x),
                None => x,
            }
        };
        let q = head(&self.q_proj, self.heads, self.q_norm.as_ref());
        let k = head(&self.k_proj, self.key_value_heads, self.k_norm.as_ref());
        let v = head(&self.v_proj, self.key_value_heads, None);
        let scale = 1.0 / (q.dims()[3] as f64).sqrt();
        let out = attention(
            rotary.rotate(q.swap_dims(1, 2)),
            self.for_every_query(rotary.rotate(k.swap_dims(1, 2))),
            self.for_every_query(v.swap_dims(1, 2)),
            scale,
            Some(bias.clone()),
        );
        linear(&self.o_proj, out)
    }

    /// Repeats each head of keys or values for the query heads that share it.
    ///
    /// # Shapes
    /// - `x`: `[batch, key_value_heads, tokens, head_dim]`; returns `[batch, heads, tokens, head_dim]`
    fn for_every_query(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, heads, tokens, dim] = x.dims();
        let shared = self.heads / self.key_value_heads;
        x.unsqueeze_dim::<5>(2)
            .expand([batch, heads, shared, tokens, dim])
            .reshape([batch, self.heads, tokens, dim])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Layout, checkpoint_tensors};

    #[test]
    fn full_size_encoders_have_the_tensors_of_the_published_ones() {
        // The 8B's output head, 151936 x 4096, is a matrix of its own; the 4B's is the embedding. Of Mistral-Small's
        // 24,011,361,280 parameters the sight and its projector have 438,958,080 and the output head 131072 x 5120.
        for (config, inside, parameters, per_layer) in [
            (DecoderConfig::qwen3_4b(), "model", 4_022_468_096_usize, 11),
            (
                DecoderConfig::qwen3_8b(),
                "model",
                8_190_735_360 - 151_936 * 4096,
                11,
            ),
            (
                DecoderConfig::mistral_small(),
                "language_model.model",
                24_011_361_280 - 438_958_080 - 131_072 * 5120,
                9,
            ),
        ] {
            assert_eq!(config.problem(), None);
            let network = DecoderText::new(&config, &Device::flex());
            let tensors = checkpoint_tensors(&network, Layout::LanguageModel { inside });
            let numbers = tensors
                .values()
                .map(|shape| shape.iter().product::<usize>());
            assert_eq!(numbers.sum::<usize>(), parameters);
            let layers = config.num_hidden_layers;
            assert_eq!(tensors.len(), layers * per_layer + 2);
            let queries = tensors.get(&format!("{inside}.layers.0.self_attn.q_proj.weight"));
            assert_eq!(queries, Some(&vec![32 * 128, config.hidden_size]));
        }
    }
}
