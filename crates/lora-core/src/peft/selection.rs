//! The parts of a configuration that say what is trained besides low-rank factors, in PEFT's names: the kind of adapter,
//! layers by index, modules trained in full, biases.
//!
//! Source: PEFT 0.19 `check_target_module_exists`, `_set_trainable`, `_mark_only_adapters_as_trainable`.

use serde::{Deserialize, Serialize};

use crate::error::LoraError;
use crate::peft::pattern::compile;

/// `peft_type`: the kind of update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PeftType {
    /// A product of two low-rank matrices.
    #[default]
    #[serde(alias = "lora")]
    Lora,
    /// An element-wise product of two low-rank products.
    #[serde(alias = "loha")]
    Loha,
    /// A Kronecker product.
    #[serde(alias = "lokr")]
    Lokr,
}

impl std::fmt::Display for PeftType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Lora => "LORA",
            Self::Loha => "LOHA",
            Self::Lokr => "LOKR",
        })
    }
}

/// `bias`: which biases are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainBias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// The biases of the adapted layers.
    LoraOnly,
}

/// One value or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value or a list")]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All values.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// `layers_to_transform` and `layers_pattern`, compiled: the layers of a list that carry one of these indices.
pub(crate) struct LayerFilter<'a> {
    indices: &'a [usize],
    patterns: Vec<fancy_regex::Regex>,
}

impl<'a> LayerFilter<'a> {
    /// An empty list of indices selects every layer, and an empty list of patterns any container, as in PEFT.
    pub(crate) fn new(
        indices: Option<&'a OneOrMany<usize>>,
        containers: Option<&OneOrMany<String>>,
    ) -> Result<Option<Self>, LoraError> {
        let indices = indices.map(OneOrMany::as_slice).unwrap_or_default();
        if indices.is_empty() {
            return Ok(None);
        }
        // The greedy start makes it the last `.<container>.<index>.` that counts.
        let patterns = match containers.map(OneOrMany::as_slice) {
            None | Some([]) => vec![compile(r"^.*\.[^.]*\.(\d+)\.", "layers_to_transform")?],
            Some(containers) => containers
                .iter()
                .map(|container| compile(&format!(r"^.*\.{container}\.(\d+)\."), container))
                .collect::<Result<_, _>>()?,
        };
        Ok(Some(Self { indices, patterns }))
    }

    /// Whether the layer at `path` carries one of the indices. A container at the root of the model is never seen: PEFT asks
    /// for a dot before its name.
    pub(crate) fn matches(&self, path: &str) -> bool {
        self.patterns
            .iter()
            .find_map(|pattern| pattern.captures(path).ok().flatten())
            .and_then(|found| found.get(1)?.as_str().parse().ok())
            .is_some_and(|index: usize| self.indices.contains(&index))
    }
}

/// Whether the parameter `key` (`head.0.weight`) belongs to a module that `entry` of `modules_to_save` names: PEFT compares
/// the end of the module's path, without asking for a dot before it.
pub fn is_saved(key: &str, entry: &str) -> bool {
    key.match_indices('.')
        .any(|(end, _)| key[..end].ends_with(entry))
}

/// Whether PEFT keeps adapters off the layer at `path` because of `entry` of `modules_to_save`.
pub(crate) fn keeps_adapters_off(path: &str, entry: &str) -> Result<bool, LoraError> {
    let regex = compile(&format!(r"^(?:|.*\.)(?:{entry})(?:$|\..*)"), entry)?;
    Ok(regex.is_match(path).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(indices: &[usize], containers: Option<&str>, path: &str) -> bool {
        let indices = OneOrMany::Many(indices.to_vec());
        let containers = containers.map(|name| OneOrMany::One(name.to_string()));
        LayerFilter::new(Some(&indices), containers.as_ref())
            .expect("valid")
            .expect("indices")
            .matches(path)
    }

    // Expected values: `check_target_module_exists` of PEFT 0.19.1.
    #[test]
    fn layers_are_chosen_by_the_index_peft_finds() {
        assert!(filter(&[1], None, "model.layers.1.attn.q"));
        assert!(!filter(&[1], None, "model.layers.0.attn.q"));
        assert!(
            !filter(&[1], None, "layers.1.attn.q"),
            "no dot before the container"
        );
        assert!(
            filter(&[2], None, "model.layers.1.experts.2.q"),
            "the last index counts"
        );
        assert!(filter(&[1], Some("layers"), "model.layers.1.experts.2.q"));
        assert!(!filter(&[1], Some("blocks"), "model.layers.1.attn.q"));
        assert!(LayerFilter::new(None, None).expect("valid").is_none());
    }

    #[test]
    fn modules_to_save_match_the_end_of_a_module_path() {
        assert!(is_saved("head.weight", "head"));
        assert!(is_saved("model.head.0.weight", "head"));
        assert!(is_saved("overhead.weight", "head"), "PEFT asks for no dot");
        assert!(!is_saved("headline.weight", "head"));
        assert!(keeps_adapters_off("model.head.0", "head").expect("valid"));
        assert!(!keeps_adapters_off("overhead", "head").expect("valid"));
    }
}
