//! JSON schemas of values that the types alone do not tell: of `lora-core`, or written in several forms.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::fields::names_of;

/// The schema of lora-core's `OneOrMany` and `Targets`.
pub(super) fn one_or_many<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let one = generator.subschema_for::<T>();
    json_schema!({"anyOf": [one, {"type": "array", "items": one}]})
}

/// The schema of a value that is a `T` or a word.
pub(super) fn word_or<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [generator.subschema_for::<T>(), {"type": "string"}]})
}

/// Adds to the schema of the enum `T` the other names of its variants (`alias`), which are read as well.
pub(super) fn with_aliases<T: DeserializeOwned>(schema: &mut Schema) {
    let Some(Value::Array(variants)) = schema.get_mut("oneOf") else {
        return;
    };
    let named = |name: &&&str| variants.iter().any(|variant| variant["const"] == **name);
    let others: Vec<&str> = names_of::<T>()
        .iter()
        .filter(|name| !named(name))
        .copied()
        .collect();
    variants
        .push(json!({"description": "Other names of these.", "type": "string", "enum": others}));
}
