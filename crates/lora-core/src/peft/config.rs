//! `LoraConfig`: which layers are adapted and how, in PEFT's names and with PEFT's meaning.
//!
//! Source: PEFT 0.19 `LoraConfig`.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::LoraError;
use crate::kinds::spec::AdapterSpec;
use crate::peft::pattern::{Patterns, Targets};
use crate::peft::selection::{OneOrMany, PeftType, TrainBias};

/// Configuration of one adapter. Field names, defaults and semantics are PEFT's; one type stands for its `LoraConfig`,
/// `LoHaConfig` and `LoKrConfig`, with the names of the first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Kind of the update. LoHa and LoKr scale by `lora_alpha / r` and take neither dropout nor the LoRA variants.
    pub peft_type: PeftType,
    /// Rank of the factors.
    pub r: usize,
    /// Numerator of the scale: `scale = lora_alpha / r` (or `/ sqrt(r)` with [`use_rslora`](Self::use_rslora)).
    /// PEFT's LoHa and LoKr call it `alpha`.
    #[serde(alias = "alpha")]
    pub lora_alpha: f64,
    /// Which layers get an adapter: a list of names or dotted suffixes, one regular expression that must match the whole
    /// path, or `"all-linear"`.
    pub target_modules: Targets,
    /// Layers that never get an adapter, even if a target matches. Same forms as `target_modules`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Targets>,
    /// Only layers with these indices in their path (`model.layers.3.attn`), where `target_modules` is a list of endings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Names of the containers whose indices `layers_to_transform` means; any if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Modules, by the end of their path, whose parameters are trained in full and kept in the adapter file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Which biases of the model are trained and kept in the adapter file.
    pub bias: TrainBias,
    /// Rank for layers whose path matches `^(.*\.)?(pattern)$`; the first match counts.
    pub rank_pattern: Patterns<usize>,
    /// `lora_alpha` for layers whose path matches, as in `rank_pattern`.
    pub alpha_pattern: Patterns<f64>,
    /// Rank-stabilised scale `lora_alpha / sqrt(r)` (Kalajdzievski 2023, arXiv:2312.03732).
    pub use_rslora: bool,
    /// Weight-decomposed adaptation (Liu et al. 2024, arXiv:2402.09353).
    pub use_dora: bool,
    /// Adds a trainable bias to the up projection.
    pub lora_bias: bool,
    /// Probability of zeroing an element of the adapter's input, in training.
    pub lora_dropout: f64,
    /// How fresh factors are drawn. PEFT's LoHa and LoKr call it `init_weights`.
    #[serde(alias = "init_weights")]
    pub init_lora_weights: InitLoraWeights,
    /// LoKr: factor the outer matrix too, where the rank is below half its longer side.
    pub decompose_both: bool,
    /// LoKr: size of the outer matrix where it divides the layer's, else the largest divisor up to it; -1 for the divisor
    /// nearest to the square root.
    pub decompose_factor: i64,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            peft_type: PeftType::Lora,
            r: 8,
            lora_alpha: 8.0,
            target_modules: Targets::List(Vec::new()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: Vec::new(),
            bias: TrainBias::None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            lora_dropout: 0.0,
            init_lora_weights: InitLoraWeights::Default,
            decompose_both: false,
            decompose_factor: -1,
        }
    }
}

/// More rounds of subspace iteration than anybody needs; without a bound a typing error runs for days.
const MAX_PISSA_ROUNDS: usize = 100;

impl LoraConfig {
    /// Rank and alpha of the layer at `path`, by the patterns.
    ///
    /// # Errors
    /// A pattern that is not a regular expression.
    pub fn resolve(&self, path: &str) -> Result<(usize, f64), LoraError> {
        let rank = self.rank_pattern.first_match(path)?.unwrap_or(self.r);
        let alpha = self
            .alpha_pattern
            .first_match(path)?
            .unwrap_or(self.lora_alpha);
        Ok((rank, alpha))
    }

    /// Rank, alpha and scale of the layer at `path`.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn spec(&self, path: &str) -> Result<AdapterSpec, LoraError> {
        let (rank, alpha) = self.resolve(path)?;
        Ok(AdapterSpec {
            rank,
            alpha,
            use_rslora: self.use_rslora,
            dropout: self.lora_dropout,
        })
    }

    /// The configuration that gives these layers, by path, their ranks and alphas: what most have, and patterns for the
    /// others. Every layer is a target by its name.
    pub fn of_layers<'a>(layers: impl Iterator<Item = (&'a str, AdapterSpec)> + Clone) -> Self {
        let r = most_common(layers.clone().map(|(_, spec)| spec.rank)).unwrap_or_default();
        let alphas = layers.clone().map(|(_, spec)| spec.alpha.to_bits());
        let lora_alpha = f64::from_bits(most_common(alphas).unwrap_or_default());
        let rooted = |layer: &str| format!("^{}", layer.replace('.', r"\."));
        let ranks = layers.clone().filter(|(_, spec)| spec.rank != r);
        let alphas = layers.clone().filter(|(_, spec)| spec.alpha != lora_alpha);
        Self {
            r,
            lora_alpha,
            rank_pattern: ranks
                .map(|(layer, spec)| (rooted(layer), spec.rank))
                .collect(),
            alpha_pattern: alphas
                .map(|(layer, spec)| (rooted(layer), spec.alpha))
                .collect(),
            target_modules: Targets::List(layers.map(|(layer, _)| layer.into()).collect()),
            ..Self::default()
        }
    }

    /// Checks what does not depend on a model.
    ///
    /// # Errors
    /// A rank of zero, an alpha that is not finite, a dropout outside `[0, 1)`, or options that exclude each other.
    pub fn validate(&self) -> Result<(), LoraError> {
        let fail = |text: String| Err(LoraError::Config(text));
        if let Some(key) = std::iter::once(("r", self.r))
            .chain(
                self.rank_pattern
                    .iter()
                    .map(|(pattern, rank)| (pattern, *rank)),
            )
            .find_map(|(key, rank)| (rank == 0).then_some(key))
        {
            return fail(format!("rank of `{key}` is 0; it must be at least 1"));
        }
        if let Some((key, alpha)) = std::iter::once(("lora_alpha", self.lora_alpha))
            .chain(
                self.alpha_pattern
                    .iter()
                    .map(|(pattern, alpha)| (pattern, *alpha)),
            )
            .find(|(_, alpha)| !alpha.is_finite())
        {
            return fail(format!(
                "alpha of `{key}` is {alpha}; it must be a finite number"
            ));
        }
        self.rank_pattern.validate()?;
        self.alpha_pattern.validate()?;
        if let InitLoraWeights::PissaNiter(n) = self.init_lora_weights
            && n > MAX_PISSA_ROUNDS
        {
            return fail(format!(
                "`init_lora_weights` pissa_niter_{n} asks for {n} rounds; 4 to 32 are usual, {MAX_PISSA_ROUNDS} are the most"
            ));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return fail(format!(
                "`lora_dropout` is {}; it must be in [0, 1)",
                self.lora_dropout
            ));
        }
        if self.use_dora && self.lora_bias {
            return fail("`use_dora` and `lora_bias` cannot be combined".into());
        }
        let init = self.init_lora_weights;
        if self.lora_bias && !matches!(init, InitLoraWeights::Default | InitLoraWeights::Random) {
            return fail(format!(
                "`lora_bias` needs `init_lora_weights` true or false; it is {init}"
            ));
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha);
        if init.splits_base()
            && let Some(alpha) = alphas.chain([self.lora_alpha]).find(|alpha| *alpha <= 0.0)
        {
            return fail(format!(
                "`init_lora_weights` {init} needs a positive `lora_alpha`; it is {alpha}"
            ));
        }
        if self.layers_pattern.is_some() && self.layers_to_transform.is_none() {
            return fail("`layers_pattern` needs `layers_to_transform`".into());
        }
        if self.layers_to_transform.is_some() && matches!(self.target_modules, Targets::Pattern(_))
        {
            return fail(
                "`layers_to_transform` needs `target_modules` to be a list; put the indices into the regular expression"
                    .into(),
            );
        }
        if self.modules_to_save.iter().any(String::is_empty) {
            return fail("`modules_to_save` has an empty entry; name a module".into());
        }
        self.validate_kind()
    }

    /// Checks that no setting belongs to another kind of adapter.
    fn validate_kind(&self) -> Result<(), LoraError> {
        let kind = self.peft_type;
        let foreign = match kind {
            PeftType::Lora => [
                ("decompose_both", self.decompose_both),
                ("decompose_factor", self.decompose_factor != -1),
            ]
            .to_vec(),
            PeftType::Loha | PeftType::Lokr => [
                ("use_rslora", self.use_rslora),
                ("use_dora", self.use_dora),
                ("lora_bias", self.lora_bias),
                ("lora_dropout", self.lora_dropout > 0.0),
                ("bias", self.bias != TrainBias::None),
                (
                    "decompose_both",
                    kind == PeftType::Loha && self.decompose_both,
                ),
                (
                    "decompose_factor",
                    kind == PeftType::Loha && self.decompose_factor != -1,
                ),
            ]
            .to_vec(),
        };
        if let Some((key, _)) = foreign.iter().find(|(_, is_set)| *is_set) {
            return Err(LoraError::Config(format!(
                "`{key}` has no meaning for `peft_type` {kind}; remove it"
            )));
        }
        if kind != PeftType::Lora
            && !matches!(
                self.init_lora_weights,
                InitLoraWeights::Default | InitLoraWeights::Random
            )
        {
            return Err(LoraError::Config(format!(
                "`init_lora_weights` must be true or false for `peft_type` {kind}"
            )));
        }
        if self.decompose_factor == 0 || self.decompose_factor < -1 {
            return Err(LoraError::Config(format!(
                "`decompose_factor` is {}; it must be at least 1, or -1 to choose",
                self.decompose_factor
            )));
        }
        Ok(())
    }
}

fn most_common<T: Ord>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_insert(0usize) += 1);
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(value, _)| value)
}

/// `init_lora_weights`: how fresh factors are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `true`: A uniform in `±1/sqrt(in)` (Kaiming with a = sqrt 5), B zero.
    #[default]
    Default,
    /// `"gaussian"`: A normal with standard deviation `1/r`, B zero.
    Gaussian,
    /// `false`: A and B both random, so that the adapter changes the model at once (for tests).
    Random,
    /// `"orthogonal"`: both factors random and not zero, with `B A = 0`; the rank must be even.
    Orthogonal,
    /// `"pissa"`: the `r` largest singular triplets of the base weight (Meng et al. 2024, arXiv:2404.02948).
    Pissa,
    /// `"pissa_niter_N"`: the same by `N` rounds of subspace iteration, far cheaper and nearly the same.
    PissaNiter(usize),
    /// `"olora"`: the first `r` columns of Q and rows of R of the base weight (Büyükakyüz 2024, arXiv:2406.01775).
    Olora,
}

impl InitLoraWeights {
    /// Whether the factors start as a part of the base weight, which the adapter then takes away from it.
    pub fn splits_base(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_) | Self::Olora)
    }

    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "gaussian" => Self::Gaussian,
            "orthogonal" => Self::Orthogonal,
            "pissa" => Self::Pissa,
            "olora" => Self::Olora,
            _ => Self::PissaNiter(name.strip_prefix("pissa_niter_")?.parse().ok()?),
        })
    }
}

/// As the configuration spells it.
impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Default => f.write_str("true"),
            Self::Random => f.write_str("false"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Orthogonal => f.write_str("orthogonal"),
            Self::Pissa => f.write_str("pissa"),
            Self::PissaNiter(n) => write!(f, "pissa_niter_{n}"),
            Self::Olora => f.write_str("olora"),
        }
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_bool(true),
            Self::Random => serializer.serialize_bool(false),
            _ => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FlagOrName;
        impl Visitor<'_> for FlagOrName {
            type Value = InitLoraWeights;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("true, false, \"gaussian\", \"orthogonal\", \"olora\", \"pissa\" or \"pissa_niter_N\" with a number N")
            }
            fn visit_bool<E: de::Error>(self, flag: bool) -> Result<Self::Value, E> {
                Ok(if flag {
                    InitLoraWeights::Default
                } else {
                    InitLoraWeights::Random
                })
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
                InitLoraWeights::parse(name)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(name), &self))
            }
        }
        deserializer.deserialize_any(FlagOrName)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_zero_is_an_error_that_names_the_key() {
        let config = LoraConfig {
            r: 0,
            ..LoraConfig::default()
        };
        assert_eq!(
            config.validate().expect_err("rank 0").to_string(),
            "rank of `r` is 0; it must be at least 1"
        );
    }

    #[test]
    fn the_first_pattern_counts_and_a_caret_pins_to_the_root() {
        let json = r#"{"r": 4, "lora_alpha": 4, "rank_pattern": {"^proj_out": 2, "proj_out": 8, "attn.to_q": 16}}"#;
        let config: LoraConfig = serde_json::from_str(json).expect("valid");
        let rank = |path| config.resolve(path).expect("valid").0;
        assert_eq!(rank("proj_out"), 2);
        assert_eq!(rank("single_transformer_blocks.0.proj_out"), 8);
        assert_eq!(rank("transformer_blocks.0.attn.to_q"), 16);
        assert_eq!(rank("transformer_blocks.0.attn.to_k"), 4);
    }
}
