//! What the program reads, the schema allows: every key and every word that serde knows is in it, with all their other names.

use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde_json::Value;

use crate::config::RunConfig;
use crate::config::reference::schema;

type Error = de::value::Error;

/// What is read at some place.
enum Names {
    Keys(&'static [&'static str]),
    Words(&'static [&'static str]),
}

/// A configuration of nothing but the keys of `path`, each in the one before; notes what is read at its end.
struct Probe<'a> {
    path: &'a [&'static str],
    found: &'a mut Option<Names>,
}

impl Probe<'_> {
    fn at(path: &[&'static str]) -> Option<Names> {
        let mut found = None;
        let _ = RunConfig::deserialize(Probe {
            path,
            found: &mut found,
        });
        found
    }
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Some((&key, path)) = self.path.split_first() else {
            *self.found = Some(Names::Keys(fields));
            return Err(de::Error::custom("only the names were wanted"));
        };
        let found = self.found;
        visitor.visit_map(One(Some(key), Some(Probe { path, found })))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Error> {
        *self.found = Some(Names::Words(variants));
        Err(de::Error::custom("only the names were wanted"))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(One(None, Some(self)))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(de::Error::custom("no names"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct tuple tuple_struct map identifier ignored_any
    }
}

/// One key with its value, or a list of one value.
struct One<'a>(Option<&'static str>, Option<Probe<'a>>);

impl<'de> MapAccess<'de> for One<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let key = |key: &'static str| -> StrDeserializer<'de, Error> { key.into_deserializer() };
        self.0
            .take()
            .map(|name| seed.deserialize(key(name)))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        seed.deserialize(self.1.take().expect("one value"))
    }
}

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.1
            .take()
            .map(|probe| seed.deserialize(probe))
            .transpose()
    }
}

/// The forms that a value may have.
fn forms(schema: &Value) -> Vec<&Value> {
    let of = |key: &str| schema[key].as_array().into_iter().flatten();
    let inner = of("anyOf").chain(of("oneOf")).chain(schema.get("items"));
    [schema].into_iter().chain(inner.flat_map(forms)).collect()
}

fn allows(schema: &Value, word: &str) -> bool {
    forms(schema).into_iter().any(|form| {
        let any =
            form["type"] == "string" && form.get("enum").is_none() && form.get("const").is_none();
        let listed = form["enum"]
            .as_array()
            .is_some_and(|words| words.iter().any(|it| it == word));
        any || listed || form["const"] == word
    })
}

/// Checks what is read at `path` and below; counts keys and words.
fn check(path: &[&'static str], schema: &Value, counted: &mut [usize; 2]) {
    let at = path.join(".");
    match Probe::at(path) {
        Some(Names::Keys(keys)) => {
            for key in keys {
                let known = forms(schema)
                    .into_iter()
                    .find_map(|form| form["properties"].get(key));
                let known = known
                    .unwrap_or_else(|| panic!("`{at}`: `{key}` is read, and not in the schema"));
                counted[0] += 1;
                check(&[path, &[key]].concat(), known, counted);
            }
        }
        Some(Names::Words(words)) => {
            for word in words {
                assert!(
                    allows(schema, word),
                    "`{at}`: \"{word}\" is read, and not in the schema"
                );
                counted[1] += 1;
            }
        }
        None => {}
    }
}

#[test]
fn every_key_and_every_word_that_is_read_is_in_the_schema() {
    let mut counted = [0, 0];
    check(&[], &schema(), &mut counted);
    assert!(counted[0] > 90 && counted[1] > 25, "{counted:?}");
    let Some(Names::Words(words)) = Probe::at(&["train", "loss_type"]) else {
        panic!("no words");
    };
    assert_eq!(words.len(), 5, "other names are found: {words:?}");
}
