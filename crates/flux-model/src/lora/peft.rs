//! Alpha and rank from an adapter's configuration: `adapter_config.json`, or the header of a diffusers file.
//!
//! Source: PEFT 0.19 `LoraConfig`, `get_pattern_key`; diffusers 0.38 `_pack_dict_with_prefix`.

use fancy_regex::Regex;
use lora_core::peft::SPLITTING;
use serde_json::{Map, Value};

use super::Component;

/// What of a PEFT configuration decides the meaning of the tensors.
#[derive(Debug, Clone)]
pub(super) struct PeftConfig {
    pub algorithm: Algorithm,
    rank: usize,
    alpha: f64,
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
    use_rslora: bool,
    /// `bias` is `all` or `lora_only`: biases in the file are trained.
    pub trains_bias: bool,
    /// Modules whose own weights are in the file.
    pub modules_to_save: Vec<String>,
}

/// `peft_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Lora,
    /// LoKr and LoHa: the scale is alpha over rank whatever the factors are.
    Lycoris,
}

/// Fields that change what the factors mean, if they are set.
const ACTIVE: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "fan_in_fan_out",
];

impl PeftConfig {
    /// Reads the fields of a `LoraConfig`; the error says what is wrong.
    pub(super) fn parse(fields: &Map<String, Value>) -> Result<Self, String> {
        let peft_type = fields
            .get("peft_type")
            .and_then(Value::as_str)
            .unwrap_or("LORA");
        let algorithm = match peft_type.to_ascii_uppercase().as_str() {
            "LORA" => Algorithm::Lora,
            "LOKR" | "LOHA" => Algorithm::Lycoris,
            _ => {
                return Err(format!(
                    "`peft_type` is {peft_type}: only LORA, LOKR and LOHA are supported"
                ));
            }
        };
        let is_set = |field: &&&str| {
            !matches!(
                fields.get(**field),
                None | Some(Value::Null | Value::Bool(false))
            )
        };
        if let Some(field) = ACTIVE.iter().find(is_set) {
            return Err(format!(
                "`{field}` is set, which changes what the factors mean: merge the adapter with PEFT"
            ));
        }
        if let Some(Value::String(init)) = fields.get("init_lora_weights")
            && SPLITTING.iter().any(|name| init.starts_with(name))
        {
            return Err(format!(
                "`init_lora_weights` is {init}: the factors belong to a changed base weight; save the adapter again with PEFT's `path_initial_model_for_weight_conversion`"
            ));
        }
        let alpha_field = match algorithm {
            Algorithm::Lora => "lora_alpha",
            Algorithm::Lycoris => "alpha",
        };
        let rank = fields.get("r").map_or(Ok(8), |value| count("r", value))?;
        let alpha = fields
            .get(alpha_field)
            .map_or(Ok(8.0), |value| number(alpha_field, value))?;
        let flag = |field: &str| fields.get(field).and_then(Value::as_bool).unwrap_or(false);
        let bias = fields.get("bias").and_then(Value::as_str).unwrap_or("none");
        let saved = fields.get("modules_to_save").and_then(Value::as_array);
        let saved = saved.into_iter().flatten().filter_map(Value::as_str);
        Ok(Self {
            algorithm,
            rank,
            alpha,
            rank_pattern: patterns(fields, "rank_pattern", count)?,
            alpha_pattern: patterns(fields, "alpha_pattern", number)?,
            use_rslora: flag("use_rslora"),
            trains_bias: bias != "none",
            modules_to_save: saved.map(str::to_string).collect(),
        })
    }

    /// Rank, alpha and scale of the module at `path`.
    pub(super) fn resolve(&self, path: &str) -> (usize, f64, f64) {
        let rank = first_match(&self.rank_pattern, path).unwrap_or(self.rank);
        let alpha = first_match(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let divisor = if self.use_rslora {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        (rank, alpha, alpha / divisor)
    }
}

/// The configuration of one component in the JSON object of a diffusers header.
///
/// `Ok(None)` if the object has no field of this component.
pub(super) fn header_config(
    all: &Map<String, Value>,
    component: Component,
) -> Result<Option<PeftConfig>, String> {
    let prefix = |component: Component| format!("{component}.");
    let is_prefixed = |key: &String| Component::ALL.iter().any(|c| key.starts_with(&prefix(*c)));
    let fields: Map<String, Value> = if all.keys().any(is_prefixed) {
        let own = prefix(component);
        let fields = all
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(&own)?, value)));
        fields
            .map(|(key, value)| (key.into(), value.clone()))
            .collect()
    } else if component == Component::Transformer {
        all.clone() // saved by the network itself, without prefix
    } else {
        Map::new()
    };
    if fields.is_empty() {
        Ok(None)
    } else {
        PeftConfig::parse(&fields).map(Some)
    }
}

fn number(field: &str, value: &Value) -> Result<f64, String> {
    let number = value.as_f64().filter(|number| number.is_finite());
    number.ok_or_else(|| format!("`{field}` is {value}: it must be a finite number"))
}

fn count(field: &str, value: &Value) -> Result<usize, String> {
    let count = value.as_u64().filter(|count| *count > 0);
    let count = count.and_then(|count| usize::try_from(count).ok());
    count.ok_or_else(|| format!("`{field}` is {value}: a rank is at least 1"))
}

fn patterns<T>(
    fields: &Map<String, Value>,
    field: &str,
    value: impl Fn(&str, &Value) -> Result<T, String>,
) -> Result<Vec<(Pattern, T)>, String> {
    let entries = match fields.get(field) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(format!("`{field}` is {other}: it must be an object")),
    };
    let entry = |(text, number): (&String, &Value)| {
        let pattern =
            Pattern::new(text).map_err(|reason| format!("`{field}`: `{text}` {reason}"))?;
        Ok((pattern, value(&format!("{field}` of `{text}"), number)?))
    };
    entries.iter().map(entry).collect()
}

fn first_match<T: Copy>(patterns: &[(Pattern, T)], path: &str) -> Option<T> {
    let found = patterns.iter().find(|(pattern, _)| pattern.matches(path));
    found.map(|(_, value)| *value)
}

/// A key of `rank_pattern` or `alpha_pattern`.
#[derive(Debug, Clone)]
enum Pattern {
    /// One exact path; what most files have, hundreds of times.
    Path(String),
    Regex(Box<Regex>),
}

impl Pattern {
    fn new(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if let Some(rooted) = text.strip_prefix('^') {
            let path = rooted.replace(r"\.", ".");
            let escaped = rooted.matches(r"\.").count() == path.matches('.').count();
            if escaped && path.chars().all(|c| plain(c) || c == '.') {
                return Ok(Self::Path(path));
            }
        }
        // PEFT: a pattern that starts with `^` counts from the root, any other from any dot.
        let regex = match text.strip_prefix('^') {
            Some(rooted) => format!("^(?:{rooted})$"),
            None => format!(r"^(?:.*\.)?(?:{text})$"),
        };
        let regex =
            Regex::new(&regex).map_err(|error| format!("is no regular expression: {error}"))?;
        Ok(Self::Regex(Box::new(regex)))
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Path(exact) => exact == path,
            Self::Regex(regex) => regex.is_match(path).unwrap_or(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<PeftConfig, String> {
        PeftConfig::parse(&serde_json::from_str(json).expect("JSON"))
    }

    #[test]
    fn defaults_are_peft_s() {
        assert_eq!(parse("{}").expect("valid").resolve("x"), (8, 8.0, 1.0));
        assert_eq!(
            parse(r#"{"r": 16}"#).expect("valid").resolve("x"),
            (16, 8.0, 0.5)
        );
        let rslora = r#"{"r": 16, "lora_alpha": 8.0, "use_rslora": true}"#;
        assert_eq!(parse(rslora).expect("valid").resolve("x").2, 2.0);
    }

    #[test]
    fn the_first_pattern_counts() {
        let config = parse(
            r#"{"r": 4, "lora_alpha": 4, "rank_pattern": {"^proj_out": 2, "proj_out": 8, "attn.to_[qk]": 16, "attn.to_q": 3},
                "alpha_pattern": {"^transformer_blocks\\.0\\.attn\\.to_k": 5.5}}"#,
        )
        .expect("valid");
        assert_eq!(config.resolve("proj_out").0, 2);
        assert_eq!(config.resolve("single_transformer_blocks.0.proj_out").0, 8);
        assert_eq!(config.resolve("transformer_blocks.0.attn.to_q").0, 16);
        assert_eq!(
            config.resolve("transformer_blocks.0.attn.to_k"),
            (16, 5.5, 5.5 / 16.0)
        );
        assert_eq!(config.resolve("transformer_blocks.0.attn.to_v").0, 4);
    }

    #[test]
    fn what_changes_the_meaning_is_refused() {
        for (json, message) in [
            (
                r#"{"peft_type": "OFT"}"#,
                "`peft_type` is OFT: only LORA, LOKR and LOHA are supported",
            ),
            (
                r#"{"use_qalora": true}"#,
                "`use_qalora` is set, which changes what the factors mean: merge the adapter with PEFT",
            ),
            (
                r#"{"init_lora_weights": "pissa_niter_4"}"#,
                "`init_lora_weights` is pissa_niter_4: the factors belong to a changed base weight; save the adapter again with PEFT's `path_initial_model_for_weight_conversion`",
            ),
            (r#"{"r": 0}"#, "`r` is 0: a rank is at least 1"),
            (
                r#"{"lora_alpha": "x"}"#,
                "`lora_alpha` is \"x\": it must be a finite number",
            ),
            (
                r#"{"rank_pattern": {"a": 0}}"#,
                "`rank_pattern` of `a` is 0: a rank is at least 1",
            ),
        ] {
            assert_eq!(parse(json).expect_err(json), message);
        }
        assert!(parse(r#"{"init_lora_weights": "gaussian", "arrow_config": null}"#).is_ok());
    }

    #[test]
    fn header_fields_belong_to_their_component() {
        let both: Map<_, _> = serde_json::from_str(
            r#"{"transformer.r": 4, "transformer.lora_alpha": 7, "text_encoder.r": 2}"#,
        )
        .expect("JSON");
        let scale = |component| {
            header_config(&both, component)
                .expect("valid")
                .map(|config| config.resolve("x").2)
        };
        assert_eq!(scale(Component::Transformer), Some(1.75));
        assert_eq!(scale(Component::ClipL), Some(4.0));
        assert_eq!(scale(Component::T5), None);
        let bare: Map<_, _> = serde_json::from_str(r#"{"r": 4, "lora_alpha": 2}"#).expect("JSON");
        let config = header_config(&bare, Component::Transformer)
            .expect("valid")
            .expect("unprefixed");
        assert_eq!(config.resolve("x").2, 0.5);
    }
}
