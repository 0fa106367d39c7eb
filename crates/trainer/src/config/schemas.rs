//! JSON schemas of values that the types alone do not tell: of `lora-core`, or written in several forms.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// The schema of lora-core's `OneOrMany` and `Targets`.
pub(super) fn one_or_many<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let one = generator.subschema_for::<T>();
    json_schema!({"anyOf": [one, {"type": "array", "items": one}]})
}

/// The schema of a value that is a `T` or a word.
pub(super) fn word_or<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [generator.subschema_for::<T>(), {"type": "string"}]})
}
