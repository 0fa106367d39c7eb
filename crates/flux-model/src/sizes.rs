//! What a configuration may say: sizes no known model comes near, and how two of them differ.

use serde::Serialize;
use serde_json::Value;

/// No width, count of tokens or channel of a known model comes near; products of two fit anywhere.
pub(crate) const MAX_SIZE: usize = 1 << 20;
/// No network is deeper.
pub(crate) const MAX_LAYERS: usize = 1000;

/// The first of these sizes that is 0 or absurd, in words.
pub(crate) fn out_of_range(sizes: &[(&str, usize)]) -> Option<String> {
    let (key, size) = sizes
        .iter()
        .find(|(_, size)| !(1..=MAX_SIZE).contains(size))?;
    Some(format!("`{key}` is {size}, not between 1 and {MAX_SIZE}"))
}

/// Every value in which the stated configuration is not that of the tensors, in words.
pub(crate) fn differences<T: Serialize>(stated: &T, found: &T) -> String {
    let fields = |config: &T| match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (stated, found) = (fields(stated), fields(found));
    let mut differ = Vec::new();
    for (key, value) in &stated {
        let other = found.get(key).unwrap_or(&Value::Null);
        if value != other {
            differ.push(format!(
                "`{key}` is {value} in the configuration and {other} in the tensors"
            ));
        }
    }
    differ.join(", ")
}
