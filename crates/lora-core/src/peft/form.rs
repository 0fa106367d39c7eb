//! [`LoraConfig`] as PEFT's JSON has it: the fields of its `LoraConfig`, `LoHaConfig` or `LoKrConfig`, by `peft_type`.

use serde_json::{Map, Value};

use crate::error::LoraError;
use crate::peft::config::{LoraConfig, OneOrMany, PeftType, Targets, TrainBias};

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
pub(crate) fn fields(config: &LoraConfig) -> Map<String, Value> {
    let Ok(Value::Object(all)) = serde_json::to_value(config) else {
        return Map::new();
    };
    all.into_iter()
        .filter_map(|(field, value)| Some((name_in(config.peft_type, &field)?.to_string(), value)))
        .collect()
}

/// How the names of PEFT's initialisations begin that also change the base weight, so that the factors are no change of the
/// original one.
pub const SPLITTING: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Refuses factors that PEFT split off the base weight: they are no update of the original model. `what` holds them.
pub(crate) fn check_is_update(fields: &Map<String, Value>, what: &str) -> Result<(), LoraError> {
    match fields.get("init_lora_weights") {
        Some(Value::String(init)) if SPLITTING.iter().any(|name| init.starts_with(name)) => {
            Err(LoraError::Config(format!(
                "`init_lora_weights` of {what} is {init}: the factors belong to a changed base weight; save the adapter again with PEFT's `path_initial_model_for_weight_conversion`"
            )))
        }
        _ => Ok(()),
    }
}

/// The configuration that PEFT's fields describe. What PEFT says about training alone (initialisation, dropouts that are not
/// ours) and about other tools is skipped; `None` if nothing is left.
pub(crate) fn from_fields(
    fields: Map<String, Value>,
) -> Result<Option<LoraConfig>, serde_json::Error> {
    let kind = match fields.get("peft_type") {
        Some(kind) => serde_json::from_value(kind.clone())?,
        None => PeftType::Lora,
    };
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
    serde_json::from_value(Value::Object(fields)).map(Some)
}
