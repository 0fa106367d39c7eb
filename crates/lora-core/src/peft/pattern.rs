//! Names of layers, as `target_modules`, `rank_pattern` and their like spell them.
//!
//! Source: PEFT 0.19 `check_target_module_exists`, `get_pattern_key`.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::LoraError;

/// Names of layers: a list of names or suffixes, or one regular expression.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Targets {
    /// `"all-linear"`, or a regular expression that must match the whole path.
    Pattern(String),
    /// A layer matches if its path equals an entry or ends with `.entry`.
    List(Vec<String>),
}

impl From<&str> for Targets {
    fn from(pattern: &str) -> Self {
        Self::Pattern(pattern.into())
    }
}

impl<const N: usize> From<[&str; N]> for Targets {
    fn from(entries: [&str; N]) -> Self {
        Self::List(entries.map(String::from).into())
    }
}

impl Targets {
    /// True for the special value `"all-linear"`.
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Self::Pattern(p) if p.eq_ignore_ascii_case("all-linear"))
    }

    /// Equal, but for the order of a list: PEFT keeps lists as sets.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::List(a), Self::List(b)) => {
                let set = |entries: &[String]| {
                    entries
                        .iter()
                        .cloned()
                        .collect::<std::collections::BTreeSet<_>>()
                };
                set(a) == set(b)
            }
            _ => self == other,
        }
    }

    /// Compiles to a predicate on module paths.
    ///
    /// # Errors
    /// A pattern that is not a regular expression.
    pub fn matcher(&self) -> Result<Matcher<'_>, LoraError> {
        Ok(match self {
            Self::List(entries) => Matcher::List(entries),
            Self::Pattern(_) if self.is_all_linear() => Matcher::AllLinear,
            Self::Pattern(pattern) => Matcher::Regex(full_match(pattern)?),
        })
    }
}

/// A compiled [`Targets`].
pub enum Matcher<'a> {
    /// Every linear layer.
    AllLinear,
    /// Names and suffixes.
    List(&'a [String]),
    /// Whole-path regular expression.
    Regex(fancy_regex::Regex),
}

impl Matcher<'_> {
    /// Whether the layer at `path` is meant.
    pub fn matches(&self, path: &str, is_linear: bool) -> bool {
        match self {
            Self::AllLinear => is_linear,
            Self::List(entries) => entries.iter().any(|entry| is_suffix(path, entry)),
            Self::Regex(regex) => regex.is_match(path).unwrap_or(false),
        }
    }
}

/// `path` equals `entry` or ends with it at a dot.
pub(crate) fn is_suffix(path: &str, entry: &str) -> bool {
    path.strip_suffix(entry)
        .is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

fn full_match(pattern: &str) -> Result<fancy_regex::Regex, LoraError> {
    compile(&format!("^(?:{pattern})$"), pattern)
}

/// Compiles `regex`, which is made of `pattern`.
pub(crate) fn compile(regex: &str, pattern: &str) -> Result<fancy_regex::Regex, LoraError> {
    fancy_regex::Regex::new(regex).map_err(|error| LoraError::Regex {
        pattern: pattern.into(),
        reason: error.to_string(),
    })
}

/// Ordered map from path pattern to value (`rank_pattern`, `alpha_pattern`); order decides which of two matches counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterns<T>(Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> FromIterator<(String, T)> for Patterns<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

impl<T: Copy> Patterns<T> {
    /// Pattern and value, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0
            .iter()
            .map(|(pattern, value)| (pattern.as_str(), value))
    }

    /// Value of exactly this pattern.
    pub fn get(&self, pattern: &str) -> Option<T> {
        self.0
            .iter()
            .find(|(own, _)| own == pattern)
            .map(|(_, value)| *value)
    }

    /// True if there is no pattern.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Value of the first pattern that matches.
    pub(crate) fn first_match(&self, path: &str) -> Result<Option<T>, LoraError> {
        Ok(self.matching(path)?.map(|(_, value)| value))
    }

    /// The first pattern with `^(.*\.)?(pattern)$`, and its value; a pattern that starts with `^` counts from the root only.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn matching(&self, path: &str) -> Result<Option<(&str, T)>, LoraError> {
        for (pattern, value) in &self.0 {
            if matches(pattern, path)? {
                return Ok(Some((pattern, *value)));
            }
        }
        Ok(None)
    }

    /// Checks that every pattern is a regular expression.
    pub(crate) fn validate(&self) -> Result<(), LoraError> {
        let mut patterns = self.0.iter();
        patterns.try_for_each(|(pattern, _)| matches(pattern, "").map(|_| ()))
    }
}

/// Whether the path is meant by a key of `rank_pattern` or `alpha_pattern`.
///
/// Files have hundreds of keys that are the path of one layer each, so these are compared and not compiled.
fn matches(pattern: &str, path: &str) -> Result<bool, LoraError> {
    let (rooted, body) = match pattern.strip_prefix('^') {
        Some(body) => (true, body),
        None => (false, pattern),
    };
    if let Some(name) = plain(body) {
        let Some(head) = path.len().checked_sub(name.len()) else {
            return Ok(false);
        };
        let (head, tail) = path.as_bytes().split_at(head);
        let same = |(byte, wanted): (&u8, &Option<u8>)| wanted.is_none_or(|wanted| wanted == *byte);
        let from = head.is_empty() || !rooted && head.ends_with(b".");
        return Ok(from && tail.iter().zip(&name).all(same));
    }
    let regex = match rooted {
        true => format!("^(?:{body})$"),
        false => format!(r"^(?:.*\.)?(?:{body})$"),
    };
    Ok(compile(&regex, pattern)?.is_match(path).unwrap_or(false))
}

/// The bytes of an expression without operators, with `None` for `.`, which is any.
fn plain(pattern: &str) -> Option<Vec<Option<u8>>> {
    let mut name = Vec::with_capacity(pattern.len());
    let mut bytes = pattern.bytes();
    while let Some(byte) = bytes.next() {
        name.push(match byte {
            b'.' => None,
            b'\\' => Some(bytes.next().filter(|byte| *byte == b'.')?),
            b'_' => Some(byte),
            _ => Some(byte).filter(u8::is_ascii_alphanumeric).map(Some)?,
        });
    }
    Some(name)
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (pattern, value) in &self.0 {
            map.serialize_entry(pattern, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Patterns<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a table from path pattern to number")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Patterns(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Targets {
        Targets::List(entries.iter().map(|e| e.to_string()).collect())
    }
    fn hits(targets: &Targets, path: &str) -> bool {
        targets.matcher().expect("valid").matches(path, true)
    }

    #[test]
    fn suffixes_match_at_dots_only() {
        assert!(hits(&list(&["proj_out"]), "proj_out"));
        assert!(hits(
            &list(&["proj_out"]),
            "single_transformer_blocks.3.proj_out"
        ));
        assert!(hits(&list(&["ff.net.2"]), "transformer_blocks.0.ff.net.2"));
        assert!(!hits(
            &list(&["ff.net.2"]),
            "transformer_blocks.0.ff_context.net.2"
        ));
        assert!(!hits(
            &list(&["to_out"]),
            "transformer_blocks.0.attn.to_out.0"
        ));
        assert!(!hits(&list(&["q"]), "transformer_blocks.0.attn.to_q"));
    }

    #[test]
    fn a_string_is_a_regex_over_the_whole_path() {
        let targets = Targets::Pattern(r".*attn\.to_[qk]".into());
        assert!(hits(&targets, "transformer_blocks.0.attn.to_q"));
        assert!(!hits(&targets, "transformer_blocks.0.attn.to_q.extra"));
        assert!(hits(
            &Targets::Pattern(r"(?!single).*\.to_q".into()),
            "transformer_blocks.1.attn.to_q"
        ));
        assert!(!hits(
            &Targets::Pattern(r"(?!single).*\.to_q".into()),
            "single_transformer_blocks.1.attn.to_q"
        ));
    }

    #[test]
    fn a_broken_regex_is_named() {
        let error = Targets::Pattern("attn.(".into())
            .matcher()
            .err()
            .expect("broken")
            .to_string();
        assert!(
            error.starts_with("`attn.(` is not a valid regular expression"),
            "{error}"
        );
    }

    // Expected values: `re.match(fr"^(.*\.)?({key})$", path)`, or the key alone where it starts with a caret.
    #[test]
    fn a_path_matches_as_a_compiled_pattern_does() {
        for (pattern, path, expected) in [
            ("^proj_out", "proj_out", true),
            ("^proj_out", "blocks.0.proj_out", false),
            ("proj_out", "blocks.0.proj_out", true),
            ("proj_out", "blocks.0.xproj_out", false),
            ("attn.to_q", "blocks.0.attn.to_q", true),
            ("attn.to_q", "blocks.0.attn_to_q", true),
            (r"attn\.to_q", "blocks.0.attn_to_q", false),
            (r"^blocks\.0\.attn", "blocks.0.attn", true),
            ("to_q", "q", false),
        ] {
            assert_eq!(
                matches(pattern, path).expect("valid"),
                expected,
                "{pattern} {path}"
            );
            let compiled = matches(&format!("{pattern}|{pattern}"), path).expect("valid");
            assert!(plain(pattern.trim_start_matches('^')).is_some());
            assert_eq!(compiled, expected, "{pattern} {path}, compiled");
        }
    }
}
