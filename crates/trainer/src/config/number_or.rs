//! Values that are a number or a word.

use serde::Serializer;
use serde::de::{self, Deserializer, Visitor};

/// A number or one word, `WORD`, which stands for `None`.
pub(super) struct NumberOr<'a>(pub(super) &'a str);

impl Visitor<'_> for NumberOr<'_> {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "a number or \"{}\"", self.0)
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Self::Value, E> {
        Ok(Some(number))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
        Ok(Some(number as f64))
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
        if word == self.0 {
            return Ok(None);
        }
        Err(E::invalid_value(de::Unexpected::Str(word), &self))
    }
}

/// `Option<f64>` as a number or "none", for TOML has no null.
pub(super) mod number_or_none {
    use super::*;

    pub fn serialize<S: Serializer>(
        number: &Option<f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match number {
            Some(number) => serializer.serialize_f64(*number),
            None => serializer.serialize_str("none"),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<f64>, D::Error> {
        deserializer.deserialize_any(NumberOr("none"))
    }
}
