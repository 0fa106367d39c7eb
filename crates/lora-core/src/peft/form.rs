//! [`LoraConfig`] as PEFT's JSON has it: the fields of its `LoraConfig`, `LoHaConfig` or `LoKrConfig`, by `peft_type`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::LoraError;
use crate::files::safetensors::TensorFile;
use crate::files::strict_json::{parse_json, read_file};
use crate::peft::config::LoraConfig;
use crate::peft::pattern::Targets;
use crate::peft::selection::{OneOrMany, PeftType, TrainBias};

/// Header key under which diffusers keeps the PEFT configuration.
pub const METADATA_KEY: &str = "lora_adapter_metadata";
/// Largest configuration that is read; one that names every module stays below one MiB.
const MAX_BYTES: u64 = 16 << 20;

/// Our field, PEFT's name for it in LoHa and LoKr, and the kinds that have it.
fn name_in(kind: PeftType, field: &str) -> Option<&str> {
    match (kind, field) {
        (PeftType::Lora, "decompose_both" | "decompose_factor") => None,
        (PeftType::Lora, _) => Some(field),
        (_, "lora_alpha") => Some("alpha"),
        (_, "init_lora_weights") => Some("init_weights"),
        (_, "use_rslora" | "use_dora" | "lora_bias" | "lora_dropout" | "bias") => None,
        (PeftType::Loha, "decompose_both" | "decompose_factor") => None,
        (PeftType::Loha | PeftType::Lokr, _) => Some(field),
    }
}

/// The fields that PEFT's configuration of this kind takes, and only those.
fn fields(config: &LoraConfig) -> Map<String, Value> {
    let Ok(Value::Object(all)) = serde_json::to_value(config) else {
        return Map::new();
    };
    all.into_iter()
        .filter_map(|(field, value)| Some((name_in(config.peft_type, &field)?.to_string(), value)))
        .collect()
}

/// How the names of PEFT's initialisations begin that also change the base weight, so that the factors are no change of the
/// original one.
const SPLITTING: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Fields that change what the factors mean, if they are set.
const ACTIVE: [&str; 6] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
];

/// The configuration that PEFT's fields describe; `what` holds them. What PEFT says about training alone (initialisation,
/// dropouts that are not ours) and about other tools is skipped; `None` if nothing is left.
///
/// # Errors
/// A kind of adapter that there is not here; a field that changes what the factors mean; factors that PEFT split off the base
/// weight, which are no update of the original model; a value of another type or out of range.
pub(crate) fn from_fields(
    fields: Map<String, Value>,
    what: &str,
) -> Result<Option<LoraConfig>, LoraError> {
    let fail = |problem: String| Err(LoraError::Config(problem));
    let kind = match fields.get("peft_type") {
        None | Some(Value::Null) => PeftType::Lora,
        Some(kind) => match serde_json::from_value(kind.clone()) {
            Ok(kind) => kind,
            Err(_) => {
                return fail(format!(
                    "`peft_type` of {what} is {kind}: only LORA, LOKR and LOHA are supported"
                ));
            }
        },
    };
    let is_set = |field: &&&str| {
        let value = fields.get(**field);
        !matches!(value, None | Some(Value::Null | Value::Bool(false)))
    };
    if let Some(field) = ACTIVE.iter().find(is_set) {
        return fail(format!(
            "`{field}` of {what} is set, which changes what the factors mean: merge the adapter with PEFT"
        ));
    }
    if let Some(Value::String(init)) = fields.get("init_lora_weights")
        && SPLITTING.iter().any(|name| init.starts_with(name))
    {
        return fail(format!(
            "`init_lora_weights` of {what} is {init}: the factors belong to a changed base weight; save the adapter again with PEFT's `path_initial_model_for_weight_conversion`"
        ));
    }
    let every_field = LoraConfig {
        exclude_modules: Some(Targets::List(Vec::new())),
        layers_to_transform: Some(OneOrMany::One(0)),
        layers_pattern: Some(OneOrMany::One(String::new())),
        modules_to_save: vec![String::new()],
        bias: TrainBias::None,
        peft_type: kind,
        ..LoraConfig::default()
    };
    let known = self::fields(&every_field);
    let fields: Map<String, Value> = fields
        .into_iter()
        .filter(|(key, value)| {
            known.contains_key(key)
                && !value.is_null()
                && !matches!(key.as_str(), "init_lora_weights" | "init_weights")
        })
        .collect();
    if fields.is_empty() {
        return Ok(None);
    }
    // One field after the other first, so that the error has its name.
    for (key, value) in &fields {
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        if let Err(problem) = serde_json::from_value::<LoraConfig>(alone.into()) {
            return fail(format!("`{key}` of {what} is {value}: {problem}"));
        }
    }
    let config: LoraConfig =
        serde_json::from_value(fields.into()).map_err(|source| LoraError::Json {
            what: what.into(),
            source,
        })?;
    match config.validate() {
        Ok(()) => Ok(Some(config)),
        Err(problem) => fail(format!("{what}: {problem}")),
    }
}

impl LoraConfig {
    /// PEFT's configuration file at `path`; a field that is not there has PEFT's default.
    ///
    /// # Errors
    /// A file that cannot be read or is malformed; a configuration of something that there is not here.
    pub fn from_peft(path: &Path) -> Result<Self, LoraError> {
        let text = read_file(path, MAX_BYTES).map_err(|source| LoraError::Io {
            path: path.into(),
            source,
        })?;
        let what = format!("`{}`", path.display());
        let fields = parse_json(&text).map_err(|source| LoraError::Json {
            what: what.clone(),
            source,
        })?;
        Ok(from_fields(fields, &what)?.unwrap_or_default())
    }

    /// The configuration in the header of a file that diffusers or this crate wrote, if there is one for `prefix`.
    ///
    /// # Errors
    /// As [`from_peft`](Self::from_peft).
    pub fn from_header(file: &TensorFile, prefix: &str) -> Result<Option<Self>, LoraError> {
        let Some(text) = file.metadata().get(METADATA_KEY) else {
            return Ok(None);
        };
        let what = format!("`{METADATA_KEY}` of `{}`", file.path().display());
        let all: Map<String, Value> =
            parse_json(text.as_bytes()).map_err(|source| LoraError::Json {
                what: what.clone(),
                source,
            })?;
        let own = all.into_iter().filter_map(|(key, value)| {
            let key = key.strip_prefix(prefix)?;
            Some((key.to_string(), value))
        });
        from_fields(own.collect(), &what)
    }

    /// The fields that PEFT reads, each with `prefix` in front.
    pub fn to_peft(&self, prefix: &str) -> Map<String, Value> {
        let fields = fields(self).into_iter();
        let mut fields: Vec<_> = fields
            .map(|(key, value)| (format!("{prefix}{key}"), value))
            .collect();
        fields.sort_by(|(a, _), (b, _)| a.cmp(b));
        fields.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<LoraConfig, LoraError> {
        let fields = serde_json::from_str(json).expect("JSON");
        from_fields(fields, "it").map(Option::unwrap_or_default)
    }

    #[test]
    fn defaults_are_peft_s() {
        let spec = |json: &str| parse(json).expect(json).spec("x").expect("no pattern");
        for (json, rank, scale) in [
            ("{}", 8, 1.0),
            (r#"{"r": 16}"#, 16, 0.5),
            (
                r#"{"r": 16, "lora_alpha": 8.0, "use_rslora": true}"#,
                16,
                2.0,
            ),
            (r#"{"peft_type": "LOKR", "r": 4, "alpha": 2}"#, 4, 0.5),
            (
                r#"{"init_lora_weights": "gaussian", "arrow_config": null}"#,
                8,
                1.0,
            ),
        ] {
            assert_eq!(
                (spec(json).rank, spec(json).scale()),
                (rank, scale),
                "{json}"
            );
        }
    }

    #[test]
    fn what_changes_the_meaning_is_refused() {
        for (json, message) in [
            (
                r#"{"peft_type": "OFT"}"#,
                "`peft_type` of it is \"OFT\": only LORA, LOKR and LOHA are supported",
            ),
            (
                r#"{"use_qalora": true}"#,
                "`use_qalora` of it is set, which changes what the factors mean: merge the adapter with PEFT",
            ),
            (
                r#"{"init_lora_weights": "pissa_niter_4"}"#,
                "`init_lora_weights` of it is pissa_niter_4: the factors belong to a changed base weight; save the adapter again with PEFT's `path_initial_model_for_weight_conversion`",
            ),
            (r#"{"r": 0}"#, "it: rank of `r` is 0; it must be at least 1"),
            (
                r#"{"lora_alpha": "x"}"#,
                "`lora_alpha` of it is \"x\": invalid type: string \"x\", expected f64",
            ),
            (
                r#"{"rank_pattern": {"a": 0}}"#,
                "it: rank of `a` is 0; it must be at least 1",
            ),
            (
                r#"{"alpha_pattern": {"a(": 1}}"#,
                "it: `a(` is not a valid regular expression: ",
            ),
        ] {
            let error = parse(json).expect_err(json).to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
