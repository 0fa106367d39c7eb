//! Small files, read as if written by an adversary: never more bytes than such a file can need, and strict JSON.
//!
//! `serde_json` keeps the last of two equal keys; another program may keep the first, and the two would read one file
//! differently. Here a repeated key is an error, at any depth. The depth itself `serde_json` limits to 128.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde::de::{DeserializeOwned, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Longest part of foreign text that an error quotes, in characters.
const QUOTED_CHARS: usize = 100;

/// The bytes of a regular file of at most `limit` bytes.
///
/// # Errors
/// A file that cannot be read or is longer, and what is no file: a pipe would block for ever.
pub fn read_file(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::other("it is a folder"));
    }
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    if metadata.len() <= limit {
        File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    }
    // The length is asked for again, since a file can grow.
    let found = metadata.len().max(bytes.len() as u64);
    if found > limit {
        let problem =
            format!("it has {found} bytes, over the limit of {limit}: is it the right file?");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    Ok(bytes)
}

/// Parses JSON in which no object repeats a key.
///
/// # Errors
/// Malformed JSON, a repeated key, nesting deeper than 128, or a structure that is not that of `T`.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice::<Skipped>(bytes)?;
    serde_json::from_slice(bytes)
}

/// Foreign text for an error: its beginning, escaped.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_CHARS) {
        Some((end, _)) => format!("{}...", text[..end].escape_debug()),
        None => text.escape_debug().to_string(),
    }
}

/// A JSON object of known structure, read key by key.
pub(crate) trait Object: Default {
    const REQUIRED: &[&str] = &[];

    /// Reads the value of `key`.
    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error>;
}

/// Reads an [`Object`] in which no key occurs twice; errors name the key.
#[derive(Default)]
pub(crate) struct Unique<T>(pub(crate) T);

impl<'de, T: Object> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self::default())
    }
}

impl<'de, T: Object> Visitor<'de> for Unique<T> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        let mut seen = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                return Err(A::Error::custom(format_args!(
                    "duplicate key \"{}\"",
                    quoted(&key)
                )));
            }
            // The position at the end of `error` is recognised and kept.
            self.0
                .read(&key, &mut map)
                .map_err(|error| A::Error::custom(format_args!("\"{}\": {error}", quoted(&key))))?;
            seen.insert(key);
        }
        match T::REQUIRED.iter().find(|&&key| !seen.contains(key)) {
            Some(key) => Err(A::Error::missing_field(key)),
            None => Ok(self),
        }
    }
}

/// Any JSON, checked for duplicate keys and depth, then dropped.
#[derive(Default)]
pub(crate) struct Skipped;

impl Object for Skipped {
    fn read<'de, A: MapAccess<'de>>(&mut self, _: &str, map: &mut A) -> Result<(), A::Error> {
        *self = map.next_value()?;
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Skipped {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Skipped {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        while seq.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self, A::Error> {
        Ok(Unique(self).visit_map(map)?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn problem(text: &str) -> String {
        parse_json::<Value>(text.as_bytes())
            .expect_err("bad JSON")
            .to_string()
    }

    #[test]
    fn a_repeated_key_is_refused_at_any_depth() {
        assert_eq!(
            problem(r#"{"a": 1, "a": 1}"#),
            r#"duplicate key "a" at line 1 column 12"#
        );
        assert_eq!(
            problem(r#"[{"a": {"b": [null, {"c": 0, "\u0063": 1}]}}]"#),
            r#""a": "b": duplicate key "c" at line 1 column 37"#
        );
    }

    #[test]
    fn values_are_those_of_serde_json() {
        let text = r#"{"z": [1, -1, 0.5, true, null, "s"], "a": {"a": {"a": {}}}}"#;
        let value: Value = parse_json(text.as_bytes()).expect("sound JSON");
        assert_eq!(
            value,
            json!({"z": [1, -1, 0.5, true, null, "s"], "a": {"a": {"a": {}}}})
        );
        assert_eq!(value.to_string(), text.replace(' ', ""));
    }

    #[test]
    fn depth_is_limited() {
        for open in ["[", r#"{"a":"#] {
            let problem = problem(&open.repeat(1_000_000));
            assert!(problem.contains("recursion limit exceeded"), "{problem}");
        }
    }

    #[test]
    fn an_error_quotes_only_the_beginning_of_a_key() {
        let key = "k".repeat(1_000_000);
        let problem = problem(&format!(r#"{{"{key}": 1, "{key}": 1}}"#));
        assert!(problem.len() < 200, "{} bytes", problem.len());
    }

    #[test]
    fn only_a_regular_file_within_the_limit_is_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("x");
        fs::write(&path, b"1234").expect("a writable folder");
        assert_eq!(read_file(&path, 4).expect("four bytes"), b"1234");
        for (path, problem) in [
            (
                &*path,
                "it has 4 bytes, over the limit of 3: is it the right file?",
            ),
            (folder.path(), "it is a folder"),
            #[cfg(unix)]
            (Path::new("/dev/zero"), "it is not a regular file"),
        ] {
            assert_eq!(
                read_file(path, 3).expect_err("no such file").to_string(),
                problem
            );
        }
    }
}
