//! What the `config.json` of a text encoder says of its language model.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::WeightsError;
use crate::pipeline::read_json;
use crate::sizes::{MAX_LAYERS, out_of_range};

/// The language models that FLUX.2 reads prompts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelType {
    /// FLUX.2 klein's.
    Qwen3,
    /// FLUX.2 dev's, inside a Mistral3 that also sees.
    Mistral,
}

/// A language model. Source: transformers `Qwen3Config`, `MistralConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DecoderConfig {
    /// Which one.
    pub model_type: ModelType,
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
    /// Width of a head; heads times this need not equal `hidden_size`. See [`head_width`](Self::head_width).
    pub head_dim: Option<usize>,
    /// Added to the mean square.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Where newer configurations write `rope_theta`.
    pub rope_parameters: Option<RopeParameters>,
    /// Another form of rotary positions, which no FLUX.2 encoder has.
    pub rope_scaling: Option<Value>,
    /// Biases of q, k, v and o, which no FLUX.2 encoder has.
    pub attention_bias: bool,
    /// Attention to the last tokens only (Qwen3), which no FLUX.2 encoder has.
    pub use_sliding_window: bool,
    /// To how many of them; of Mistral, this alone says it.
    pub sliding_window: Option<usize>,
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

impl Default for DecoderConfig {
    fn default() -> Self {
        Self {
            model_type: ModelType::Qwen3,
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: None,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
            rope_parameters: None,
            rope_scaling: None,
            attention_bias: false,
            use_sliding_window: false,
            sliding_window: None,
            hidden_act: "silu".into(),
            tie_word_embeddings: false,
        }
    }
}

impl DecoderConfig {
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

    /// The language model of Mistral-Small-3.2-24B, as shipped with FLUX.2 dev.
    pub fn mistral_small() -> Self {
        Self {
            model_type: ModelType::Mistral,
            vocab_size: 131_072,
            hidden_size: 5120,
            intermediate_size: 32768,
            num_hidden_layers: 40,
            num_key_value_heads: 8,
            head_dim: Some(128),
            rms_norm_eps: 1e-5,
            rope_theta: 1e9,
            ..Self::default()
        }
    }

    /// Reads a `config.json`: that of a language model, or of a model that also sees, whose `text_config` it is.
    ///
    /// # Errors
    /// A file that cannot be read, or describes no language model of FLUX.2.
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        let mut stated: Value = read_json(path)?;
        if let Some(text) = stated.get_mut("text_config") {
            stated = text.take();
        }
        let config: Self = serde_json::from_value(stated).map_err(|source| WeightsError::Json {
            path: path.into(),
            source,
        })?;
        match config.problem() {
            None => Ok(config),
            Some(reason) => Err(WeightsError::Config {
                path: path.into(),
                reason,
            }),
        }
    }

    /// Width of a head.
    pub fn head_width(&self) -> usize {
        self.head_dim.unwrap_or(match self.model_type {
            ModelType::Qwen3 => 128,
            ModelType::Mistral => self.hidden_size / self.num_attention_heads.max(1),
        })
    }

    /// Base of the rotary frequencies, wherever it is written.
    pub(super) fn theta(&self) -> f64 {
        let newer = self.rope_parameters.as_ref();
        newer.map_or(self.rope_theta, |rope| rope.rope_theta)
    }

    /// The layers whose outputs FLUX.2 reads: 9, 18, 27 of Qwen3's 36, 10, 20, 30 of Mistral's 40. A shallower model, as tests
    /// use, is read after its quarters.
    pub fn output_layers(&self) -> [usize; 3] {
        let published = match self.model_type {
            ModelType::Qwen3 => [9, 18, 27],
            ModelType::Mistral => [10, 20, 30],
        };
        match self.num_hidden_layers {
            layers if layers < published[2] => [layers / 4, layers / 2, layers * 3 / 4],
            _ => published,
        }
    }

    /// Width of what a prompt's token becomes: the outputs of three layers side by side.
    pub fn output_width(&self) -> usize {
        3 * self.hidden_size
    }

    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_width()),
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
        if !self.head_width().is_multiple_of(2) {
            return Some(format!("`head_dim` is {}, which is odd", self.head_width()));
        }
        for (key, value) in [
            ("rope_theta", self.theta()),
            ("rms_norm_eps", self.rms_norm_eps),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Some(format!("`{key}` is {value}, not above 0"));
            }
        }
        let rope_type = self.rope_parameters.as_ref();
        let rope_type = rope_type.and_then(|rope| rope.rope_type.as_deref());
        let window = self.model_type == ModelType::Mistral && self.sliding_window.is_some();
        for (unsupported, what) in [
            (self.attention_bias, "`attention_bias`"),
            (self.use_sliding_window, "`use_sliding_window`"),
            (window, "`sliding_window`"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_that_are_read() {
        assert_eq!(DecoderConfig::qwen3_4b().output_layers(), [9, 18, 27]);
        assert_eq!(DecoderConfig::mistral_small().output_layers(), [10, 20, 30]);
        let tiny = DecoderConfig {
            num_hidden_layers: 4,
            ..DecoderConfig::default()
        };
        assert_eq!(tiny.output_layers(), [1, 2, 3]);
    }

    #[test]
    fn a_configuration_that_these_networks_do_not_compute_is_refused() {
        let problem = |change: &str| {
            let config: DecoderConfig = serde_json::from_str(change).expect("json");
            config.problem()
        };
        assert_eq!(problem("{}"), None);
        assert_eq!(problem(r#"{"rope_parameters": {"rope_theta": 1e6}}"#), None);
        // Qwen3 writes a window that it does not use
        assert_eq!(problem(r#"{"sliding_window": 4096}"#), None);
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
            (
                r#"{"model_type": "mistral", "sliding_window": 4096}"#,
                "sliding_window",
            ),
        ] {
            let problem = problem(change).expect(change);
            assert!(problem.contains(word), "{problem}");
        }
    }

    #[test]
    fn the_language_model_of_one_that_also_sees_is_found() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("config.json");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("a file");
            DecoderConfig::read(&path)
        };
        let nested = r#"{"model_type": "mistral3", "hidden_size": 9, "text_config":
            {"model_type": "mistral", "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}}"#;
        let config = read(nested).expect("a configuration");
        assert_eq!(config.model_type, ModelType::Mistral);
        assert_eq!((config.hidden_size, config.head_width()), (48, 12));
        assert_eq!(config.output_width(), 144);
        let error = read(r#"{"model_type": "llama"}"#).expect_err("another model");
        let source = std::error::Error::source(&error).expect("why").to_string();
        assert!(source.contains("`qwen3` or `mistral`"), "{source}");
    }
}
