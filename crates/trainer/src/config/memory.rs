//! `[memory]`: what is in memory, and what is read or computed again instead.

use std::fmt;

use schemars::JsonSchema;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::lora::LoraSection;
use super::rules::Invalid;
use super::schemas::word_or;

/// What is in memory, and what is read or computed again instead. No setting here changes a bit of the result.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MemorySection {
    /// What "auto" makes the run fit into, as "8GiB" or "24 GB"; an aim, not a wall. On a device with memory of its own nothing
    /// is known of that, and "auto" is "resident" and "all". Default: nine tenths of what the machine has available at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub limit: Option<Bytes>,
    /// Where the transformer's blocks are: "resident" in memory, "stream" in their file, from which one is read while the one
    /// before it computes, "auto" resident if all of them fit. Default "auto".
    pub base: BasePlace,
    /// How many blocks keep only their input, and are computed again in the backward pass: "all", "none", a number (the first so
    /// many), "auto" as few as fit; and on flex, where memory is left, what their linear layers and attention gave is kept. Default "auto".
    #[schemars(schema_with = "word_or::<usize>")]
    pub recompute: Recompute,
}

impl MemorySection {
    pub(super) fn check(&self, lora: &LoraSection) -> Result<(), Invalid> {
        if self.base != BasePlace::Stream {
            return Ok(());
        }
        if let Recompute::First(_) = self.recompute {
            let problem = "must be \"all\" or \"auto\" with base = \"stream\": what is kept of a block keeps its weights";
            return Err(("memory.recompute", problem.into()));
        }
        if lora.reads_base_weights() {
            let problem = "cannot be \"stream\": this adapter starts from the base weights, which have to be in memory for that; use \"resident\"";
            return Err(("memory.base", problem.into()));
        }
        Ok(())
    }
}

/// An amount of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// Where the transformer's blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BasePlace {
    /// In memory if they fit.
    #[default]
    Auto,
    /// In memory.
    Resident,
    /// In their file.
    Stream,
}

/// How many blocks are computed again in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recompute {
    /// As few as fit, with results where those fit.
    #[default]
    Auto,
    /// Every one.
    All,
    /// The first so many.
    First(usize),
}

const UNITS: [(&str, u64); 6] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
];

impl Bytes {
    /// From a number and a unit: "8GiB", "1.5 GB".
    pub fn parse(text: &str) -> Option<Self> {
        let (unit, size) = UNITS.iter().find(|(unit, _)| text.ends_with(unit))?;
        let number: f64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
        let bytes = number * *size as f64;
        (1024.0..1e18)
            .contains(&bytes)
            .then_some(Self(bytes as u64))
    }
}

impl fmt::Display for Bytes {
    /// In the unit that takes the fewest digits without a fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS
            .iter()
            .filter(|(_, size)| self.0.is_multiple_of(*size));
        match whole.max_by_key(|(_, size)| size) {
            Some((unit, size)) => write!(f, "{}{unit}", self.0 / size),
            None => write!(f, "{}KiB", self.0.div_ceil(1024)),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Amount;
        impl Visitor<'_> for Amount {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number with its unit, such as \"8GiB\" or \"500 MB\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                Bytes::parse(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Amount)
    }
}

impl Serialize for Recompute {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::All => serializer.serialize_str("all"),
            Self::First(0) => serializer.serialize_str("none"),
            Self::First(blocks) => serializer.serialize_u64(*blocks as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Recompute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Blocks;
        impl Visitor<'_> for Blocks {
            type Value = Recompute;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("\"auto\", \"all\", \"none\" or a number of blocks")
            }

            fn visit_i64<E: de::Error>(self, blocks: i64) -> Result<Recompute, E> {
                let wrong = |_| E::invalid_value(de::Unexpected::Signed(blocks), &self);
                usize::try_from(blocks).map(Recompute::First).map_err(wrong)
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Recompute, E> {
                match word {
                    "auto" => Ok(Recompute::Auto),
                    "all" => Ok(Recompute::All),
                    "none" => Ok(Recompute::First(0)),
                    _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
                }
            }
        }
        deserializer.deserialize_any(Blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::Bytes;

    #[test]
    fn amounts_of_memory_are_read_and_written() {
        for (text, bytes, shown) in [
            ("8GiB", 8 << 30, "8GiB"),
            ("1.5 GiB", 3 << 29, "1536MiB"),
            ("24 GB", 24_000_000_000, "24GB"),
            ("4096MiB", 4 << 30, "4GiB"),
            ("500MB", 500_000_000, "500MB"),
        ] {
            let amount = Bytes::parse(text).expect(text);
            assert_eq!((amount.0, amount.to_string().as_str()), (bytes, shown));
            assert_eq!(Bytes::parse(shown), Some(amount));
        }
        for text in [
            "8", "GiB", "-1GiB", "8 gib", "1e12GiB", "NaNGiB", "0GiB", "",
        ] {
            assert_eq!(Bytes::parse(text), None, "{text}");
        }
    }
}
