//! Sizes no known model comes near: what a configuration may say.

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
