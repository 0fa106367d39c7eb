//! The Qwen3 language model as a text encoder: the residual stream after some of its layers, no output head.
//!
//! Pre-norm, grouped queries, a norm on every query and key head, rotary positions in half-split form, gated MLP, causal.
//!
//! The weights of a layer are needed once per batch and take gigabytes together, so none stays: a layer is read, run and
//! dropped, and of the embedding only the rows that occur are read.
//!
//! Source: transformers 4.57 `modeling_qwen3.py`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::linear;
use serde::{Deserialize, Serialize};

use crate::error::WeightsError;
use crate::layers::{RmsNorm, linear_layer, split_heads};
use crate::ops::attention::attention;
use crate::ops::silu::silu;
use crate::pipeline::read_config;
use crate::sizes::{MAX_LAYERS, out_of_range};
use crate::text::embedding::embed;
use crate::weights::{BaseDtype, Checkpoint, Layout, Stream};

/// Qwen3. Source: transformers `Qwen3Config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Qwen3Config {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Heads of keys and values, each shared by several query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; heads times this need not equal `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Where newer configurations write `rope_theta`.
    pub rope_parameters: Option<RopeParameters>,
    /// Another form of rotary positions, which no FLUX.2 encoder has.
    pub rope_scaling: Option<serde_json::Value>,
    /// Biases of q, k, v and o, which no FLUX.2 encoder has.
    pub attention_bias: bool,
    /// Attention to the last tokens only, which no FLUX.2 encoder has.
    pub use_sliding_window: bool,
    /// `silu` is the only one in use.
    pub hidden_act: String,
    /// Whether the output head, which is not used here, is the embedding.
    pub tie_word_embeddings: bool,
}

/// `rope_parameters` of transformers 5.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeParameters {
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// `default` is the only one in use.
    #[serde(default)]
    pub rope_type: Option<String>,
}

impl Default for Qwen3Config {
    fn default() -> Self {
        Self {
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
            rope_parameters: None,
            rope_scaling: None,
            attention_bias: false,
            use_sliding_window: false,
            hidden_act: "silu".into(),
            tie_word_embeddings: false,
        }
    }
}

impl Qwen3Config {
    /// Qwen3-4B, as shipped with FLUX.2 klein 4B.
    pub fn qwen3_4b() -> Self {
        Self {
            hidden_size: 2560,
            intermediate_size: 9728,
            num_hidden_layers: 36,
            num_key_value_heads: 8,
            rope_theta: 1e6,
            tie_word_embeddings: true,
            ..Self::default()
        }
    }

    /// Qwen3-8B, as shipped with FLUX.2 klein 9B.
    pub fn qwen3_8b() -> Self {
        Self {
            intermediate_size: 12288,
            num_hidden_layers: 36,
            num_key_value_heads: 8,
            rope_theta: 1e6,
            ..Self::default()
        }
    }

    fn rope_theta(&self) -> f64 {
        let newer = self.rope_parameters.as_ref();
        newer.map_or(self.rope_theta, |rope| rope.rope_theta)
    }

    /// The layers whose outputs FLUX.2 reads: 9, 18, 27 of 36. A shallower model, as tests use, is read after its quarters.
    pub fn output_layers(&self) -> [usize; 3] {
        match self.num_hidden_layers {
            layers @ 0..27 => [layers / 4, layers / 2, layers * 3 / 4],
            _ => [9, 18, 27],
        }
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ];
        if let Some(problem) = out_of_range(&sizes) {
            return Some(problem);
        }
        if self.num_hidden_layers > MAX_LAYERS {
            return Some(format!("more than {MAX_LAYERS} layers"));
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            return Some(format!(
                "{} heads cannot share {} heads of keys and values",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Some(format!("`head_dim` is {}, which is odd", self.head_dim));
        }
        for (key, value) in [
            ("rope_theta", self.rope_theta()),
            ("rms_norm_eps", self.rms_norm_eps),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Some(format!("`{key}` is {value}, not above 0"));
            }
        }
        let rope_type = self.rope_parameters.as_ref();
        let rope_type = rope_type.and_then(|rope| rope.rope_type.as_deref());
        for (unsupported, what) in [
            (self.attention_bias, "`attention_bias`"),
            (self.use_sliding_window, "`use_sliding_window`"),
            (self.rope_scaling.is_some(), "`rope_scaling`"),
            (self.hidden_act != "silu", "a `hidden_act` other than silu"),
            (
                rope_type.is_some_and(|name| name != "default"),
                "a `rope_type` other than default",
            ),
        ] {
            if unsupported {
                return Some(format!("{what} is not supported; no FLUX.2 encoder has it"));
            }
        }
        None
    }
}

/// All of the network but the output head; of use for the names and shapes of its tensors.
#[derive(Module, Debug)]
pub struct Qwen3Text {
    model: Stack,
}

#[derive(Module, Debug)]
struct Stack {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
}

#[derive(Module, Debug)]
struct Layer {
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
    q_norm: RmsNorm,
    k_norm: RmsNorm,
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

impl Qwen3Text {
    /// A network with lazily initialised weights.
    pub fn new(config: &Qwen3Config, device: &Device) -> Self {
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
}

impl Layer {
    fn new(config: &Qwen3Config, device: &Device) -> Self {
        let (width, mlp) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let layer = |inputs, outputs| linear_layer(inputs, outputs, false, device);
        let norm = |width| RmsNorm::new(width, config.rms_norm_eps, device);
        Self {
            input_layernorm: norm(width),
            self_attn: SelfAttention {
                q_proj: layer(width, queries),
                k_proj: layer(width, keys),
                v_proj: layer(width, keys),
                o_proj: layer(queries, width),
                q_norm: norm(config.head_dim),
                k_norm: norm(config.head_dim),
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
    fn forward(&self, hidden: Tensor<3>, rotary: &HalfSplitRotary, bias: &Tensor<4>) -> Tensor<3> {
        let x = self.input_layernorm.forward(hidden.clone());
        let hidden = hidden + self.self_attn.forward(x, rotary, bias);
        let x = self.post_attention_layernorm.forward(hidden.clone());
        let mlp = &self.mlp;
        let gated = silu(linear(&mlp.gate_proj, x.clone())) * linear(&mlp.up_proj, x);
        hidden + linear(&mlp.down_proj, gated)
    }
}

impl SelfAttention {
    fn forward(&self, x: Tensor<3>, rotary: &HalfSplitRotary, bias: &Tensor<4>) -> Tensor<3> {
        let head = |layer: &Linear, heads| split_heads(linear(layer, x.clone()), heads);
        let q = self.q_norm.forward(head(&self.q_proj, self.heads));
        let k = head(&self.k_proj, self.key_value_heads);
        let k = self.k_norm.forward(k);
        let v = head(&self.v_proj, self.key_value_heads);
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

/// Cosines and sines of positions 0, 1, 2 ..., `[1, 1, tokens, head_dim / 2]` each; frequency and angle rounded to f32, as
/// transformers has them.
struct HalfSplitRotary {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl HalfSplitRotary {
    fn new(tokens: usize, config: &Qwen3Config, device: &Device) -> Self {
        let half = config.head_dim / 2;
        let theta = config.rope_theta();
        let angles: Vec<f64> = (0..tokens)
            .flat_map(|position| {
                (0..half).map(move |pair| {
                    let frequency = theta.powf(-(pair as f64) / half as f64) as f32;
                    f64::from(position as f32 * frequency)
                })
            })
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Tensor::from_data(TensorData::new(values, [1, 1, tokens, half]), device)
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
        }
    }

    /// Rotates the pairs (k, k + head_dim / 2) of the last dimension.
    ///
    /// # Shapes
    /// - `x`: `[batch, heads, tokens, head_dim]`, unchanged
    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let (cos, sin) = (&self.cos, &self.sin);
        Tensor::cat(
            vec![
                first.clone() * cos.clone() - second.clone() * sin.clone(),
                second * cos.clone() + first * sin.clone(),
            ],
            3,
        )
    }
}

/// The encoder on disk.
pub struct Qwen3Encoder {
    /// Without values.
    network: Qwen3Text,
    stream: Stream,
    config: Qwen3Config,
    device: Device,
}

/// The layers are the blocks of the stream from this one on.
const LAYERS: usize = 2;

impl Qwen3Encoder {
    /// Opens a component folder, looks at the name and shape of every tensor, and reads no weight.
    ///
    /// # Errors
    /// A malformed file, or a tensor that is missing, left over or of another shape.
    pub fn open(folder: &Path, device: &Device) -> Result<Self, WeightsError> {
        let config = read_config(&folder.join("config.json"), Qwen3Config::problem)?;
        let mut blocks = vec!["model.embed_tokens".to_string(), "model.norm".to_string()];
        blocks.extend((0..config.num_hidden_layers).map(|i| format!("model.layers.{i}")));
        let (network, stream) = Checkpoint::open(folder)?.stream(
            Qwen3Text::new(&config, device),
            blocks,
            Layout::Qwen3,
            BaseDtype::AsStored,
            device,
        )?;
        Ok(Self {
            network,
            stream,
            config,
            device: device.clone(),
        })
    }

    /// The architecture.
    pub fn config(&self) -> &Qwen3Config {
        &self.config
    }

    /// The residual stream after each of `layers` layers, `[batch, tokens, hidden_size]`; 0 is the embedding.
    ///
    /// `ids` is one row of token ids per prompt, padded to one length; where `mask` is 0 no token is looked at, but its own
    /// row is computed as any other.
    ///
    /// # Errors
    /// Weights that cannot be read, an id outside the vocabulary, a layer that the network does not have, ragged rows.
    pub fn hidden_states(
        &self,
        ids: &[Vec<i64>],
        mask: &[Vec<i64>],
        layers: &[usize],
    ) -> Result<Vec<Tensor<3>>, WeightsError> {
        let config = &self.config;
        let tokens = ids.first().map_or(0, Vec::len);
        let rows = ids.iter().chain(mask);
        if tokens == 0 || ids.len() != mask.len() || rows.clone().any(|row| row.len() != tokens) {
            return Err(self.refuse("its token ids and mask must be rows of one length".into()));
        }
        let last = layers.iter().copied().max().unwrap_or(0);
        if last > config.num_hidden_layers {
            let count = config.num_hidden_layers;
            return Err(self.refuse(format!("it has {count} layers, {last} are asked for")));
        }
        let rotary = HalfSplitRotary::new(tokens, config, &self.device);
        let mut rows = ids
            .iter()
            .zip(mask)
            .map(|(ids, mask)| {
                let hidden = embed(&self.stream, ids, config.vocab_size, &self.device)?;
                Ok((hidden, attention_bias(mask, &self.device)))
            })
            .collect::<Result<Vec<_>, WeightsError>>()?;
        let mut states = BTreeMap::new();
        for done in 0..=last {
            if layers.contains(&done) {
                let hidden = rows.iter().map(|(hidden, _)| hidden.clone()).collect();
                states.insert(done, Tensor::cat(hidden, 0));
            }
            if done < last {
                let layer = self.network.model.layers[done].clone();
                let layer = self.stream.fill(LAYERS + done, layer)?;
                for (hidden, bias) in &mut rows {
                    *hidden = layer.forward(hidden.clone(), &rotary, bias); // one prompt's scores at a time
                }
            }
        }
        Ok(layers.iter().map(|layer| states[layer].clone()).collect())
    }

    fn refuse(&self, reason: String) -> WeightsError {
        WeightsError::Config {
            path: self.stream.checkpoint().path().into(),
            reason,
        }
    }
}

/// `[1, 1, tokens, tokens]`: 0 where a query may look at a key, not past itself and not at padding; else the largest
/// negative f32, which softmax turns into zeros.
fn attention_bias(mask: &[i64], device: &Device) -> Tensor<4> {
    let tokens = mask.len();
    let mut values = Vec::with_capacity(tokens * tokens);
    for query in 0..tokens {
        let sees = |key: usize| key <= query && mask[key] != 0;
        values.extend((0..tokens).map(|key| if sees(key) { 0.0 } else { f32::MIN }));
    }
    Tensor::from_data(TensorData::new(values, [1, 1, tokens, tokens]), device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::checkpoint_tensors;

    #[test]
    fn full_size_encoders_have_the_parameters_of_the_published_ones() {
        // The 8B's output head, 151936 x 4096, is a matrix of its own; the 4B's is the embedding.
        for (config, parameters) in [
            (Qwen3Config::qwen3_4b(), 4_022_468_096_usize),
            (Qwen3Config::qwen3_8b(), 8_190_735_360 - 151_936 * 4096),
        ] {
            assert_eq!(config.problem(), None);
            let network = Qwen3Text::new(&config, &Device::flex());
            let tensors = checkpoint_tensors(&network, Layout::Diffusers);
            let numbers = tensors
                .values()
                .map(|shape| shape.iter().product::<usize>());
            assert_eq!(numbers.sum::<usize>(), parameters);
            assert_eq!(tensors.len(), 36 * 11 + 2);
        }
    }

    #[test]
    fn the_layers_that_are_read() {
        assert_eq!(Qwen3Config::qwen3_4b().output_layers(), [9, 18, 27]);
        let tiny = Qwen3Config {
            num_hidden_layers: 4,
            ..Qwen3Config::default()
        };
        assert_eq!(tiny.output_layers(), [1, 2, 3]);
    }

    #[test]
    fn a_configuration_that_this_encoder_does_not_compute_is_refused() {
        let problem = |change: &str| {
            let config: Qwen3Config = serde_json::from_str(change).expect("json");
            config.problem()
        };
        assert_eq!(problem("{}"), None);
        assert_eq!(problem(r#"{"rope_parameters": {"rope_theta": 1e6}}"#), None);
        for (change, word) in [
            (r#"{"attention_bias": true}"#, "attention_bias"),
            (r#"{"rope_scaling": {"factor": 4.0}}"#, "rope_scaling"),
            (r#"{"hidden_act": "gelu"}"#, "hidden_act"),
            (r#"{"num_key_value_heads": 5}"#, "cannot share"),
            (r#"{"head_dim": 7}"#, "odd"),
            (
                r#"{"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}"#,
                "rope_type",
            ),
        ] {
            let problem = problem(change).expect(change);
            assert!(problem.contains(word), "{problem}");
        }
    }
    const MODEL: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/parity/flux2_qwen3/model"
    );

    #[test]
    fn layers_past_the_last_one_asked_for_are_not_read() {
        // The last layer's weights are cut off, but for their names and shapes.
        let dir = tempfile::tempdir().expect("a folder");
        for name in ["config.json", "model.safetensors"] {
            let from = Path::new(MODEL).join(name);
            let mut bytes = std::fs::read(from).expect("the fixture");
            if name.ends_with(".safetensors") {
                let end = bytes.len();
                bytes[end / 2..].fill(0xff); // not a number
            }
            std::fs::write(dir.path().join(name), bytes).expect("a copy");
        }
        let encoder = Qwen3Encoder::open(dir.path(), &Device::flex()).expect("names are whole");
        let (ids, mask) = (vec![vec![1, 2]], vec![vec![1, 1]]);
        let states = encoder.hidden_states(&ids, &mask, &[0, 1]);
        assert_eq!(
            states.expect("the first layer is whole")[1].dims(),
            [1, 2, 24]
        );
        let error = encoder
            .hidden_states(&ids, &mask, &[5])
            .expect_err("not finite");
        assert!(error.to_string().contains("not finite"), "{error}");
    }

    #[test]
    fn what_cannot_be_encoded_is_an_error() {
        let encoder = Qwen3Encoder::open(Path::new(MODEL), &Device::flex()).expect("the fixture");
        let error = |ids: &[Vec<i64>], mask: &[Vec<i64>], layer: usize| {
            let states = encoder.hidden_states(ids, mask, &[layer]);
            states
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        let (ids, mask) = (vec![vec![1, 2]], vec![vec![1, 1]]);
        assert!(error(&ids, &mask, 6).contains("5 layers, 6 are asked for"));
        assert!(error(&[vec![1, 549]], &mask, 1).contains("no id 549"));
        assert!(error(&[vec![1, -1]], &mask, 1).contains("no id -1"));
        assert!(error(&ids, &[vec![1]], 1).contains("rows of one length"));
        assert!(error(&[], &[], 1).contains("rows of one length"));
    }
}
