//! Names of files: their parts, what two spellings have in common, and how they are told to people.

use unicode_normalization::UnicodeNormalization;

use crate::nearest::one_line;

/// `1 image`, `2 images`.
pub(in crate::data) fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// The first few names, quoted, and how many more there are.
pub(in crate::data) fn named(names: &[String]) -> String {
    const FEW: usize = 4;
    let few: Vec<String> = names
        .iter()
        .take(FEW)
        .map(|name| format!("`{}`", one_line(name)))
        .collect();
    match names.len().saturating_sub(FEW) {
        0 => few.join(", "),
        more => format!("{} and {more} more", few.join(", ")),
    }
}

/// A name without its extension, and the extension; no extension if there is no dot in the file name.
pub(in crate::data) fn split(name: &str) -> (&str, &str) {
    match name.rsplit_once('.') {
        Some((stem, extension)) if !extension.contains('/') => (stem, extension),
        _ => (name, ""),
    }
}

pub(in crate::data) fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A name in Unicode's composed form: macOS stores accents apart from their letters.
pub(in crate::data) fn composed(name: &str) -> String {
    name.nfc().collect()
}

/// What two spellings of one name have in common.
pub(in crate::data) fn key(name: &str) -> String {
    composed(name).to_lowercase()
}

/// ` (and 3 more images)`, or nothing.
pub(in crate::data) fn more(count: usize, what: &str) -> String {
    match count {
        0 => String::new(),
        1 => format!(" (and 1 more {what})"),
        count => format!(" (and {count} more {what}s)"),
    }
}
