//! Helpers for error messages: the known name nearest to a mistyped one, and foreign text made fit for one line.

use std::path::Path;

/// Names are compared by their beginning: the comparison costs the product of both lengths.
const COMPARED_CHARS: usize = 64;
/// Quoted text is cut here, so that an error stays a line.
const QUOTED_CHARS: usize = 200;
/// No message of ours is longer; one that quotes a file might be.
const MESSAGE_CHARS: usize = 4000;

/// The entry of `known` that `word` most likely stands for; `None` only if `known` is empty.
///
/// Case, `-` against `_`, and a missing or extra word (`max_steps` for `steps`) count for little.
pub(crate) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let word = normalised(word);
    let mut best: Option<(f64, &'a str)> = None;
    for &candidate in known {
        let similarity = similarity(&word, &normalised(candidate));
        if best.is_none_or(|(best_similarity, _)| similarity > best_similarity) {
            best = Some((similarity, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// The beginning of `text` with control characters escaped.
pub(crate) fn one_line(text: &str) -> String {
    let text = text.trim();
    match text.char_indices().nth(QUOTED_CHARS) {
        Some((end, _)) => format!("{}...", escaped(&text[..end])),
        None => escaped(text),
    }
}

/// An error message for a terminal: whatever foreign text it quotes, no control characters and not without end.
pub fn printable(message: &str) -> String {
    match message.char_indices().nth(MESSAGE_CHARS) {
        Some((end, _)) => format!("{}...", escaped(&message[..end])),
        None => escaped(message),
    }
}

/// An error and its causes as one sentence that says nothing twice: a cause that only repeats is left out, and so is what
/// names a path that a cause names as well.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if parts.last().is_some_and(|last| last.ends_with(&cause)) {
            continue;
        }
        parts.retain(|part| !paths_in(part).any(|path| cause.contains(path)));
        parts.push(cause);
    }
    parts.join(": ")
}

/// The words of a message that are paths.
fn paths_in(message: &str) -> impl Iterator<Item = &str> {
    let is_around = |c: char| matches!(c, '`' | '"' | '\'' | '(' | ')' | ',' | ';' | ':' | '.');
    let words = message.split_whitespace();
    words
        .map(move |word| word.trim_matches(is_around))
        .filter(|word| word.len() > 1 && word.contains('/'))
}

/// A path for an error: whole, since its end says most, with control characters escaped.
pub(crate) fn shown(path: &Path) -> String {
    escaped(&path.to_string_lossy())
}

fn escaped(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

fn normalised(name: &str) -> String {
    name.chars()
        .take(COMPARED_CHARS)
        .map(|c| {
            if c == '-' {
                '_'
            } else {
                c.to_ascii_lowercase()
            }
        })
        .collect()
}

/// 1 for equal names, 0 for names with nothing in common.
fn similarity(a: &str, b: &str) -> f64 {
    let spelling = strsim::normalized_damerau_levenshtein(a, b);
    let has_words = |longer: &str, shorter: &str| {
        shorter
            .split('_')
            .all(|word| longer.split('_').any(|other| other == word))
    };
    if has_words(a, b) || has_words(b, a) {
        spelling.max(0.8)
    } else {
        spelling
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_finds_its_name() {
        let known = ["learning_rate", "betas", "eps", "weight_decay"];
        assert_eq!(nearest("learnin_rate", &known), Some("learning_rate"));
        assert_eq!(nearest("beta", &known), Some("betas"));
    }

    #[test]
    fn case_and_hyphens_do_not_matter() {
        let known = ["warmup", "learning_rate"];
        assert_eq!(nearest("Learning-Rate", &known), Some("learning_rate"));
    }

    #[test]
    fn an_extra_or_missing_word_hardly_matters() {
        let known = ["seed", "steps", "lora_alpha", "use_dora"];
        assert_eq!(nearest("max_train_steps", &known), Some("steps"));
        assert_eq!(nearest("alpha", &known), Some("lora_alpha"));
    }

    #[test]
    fn nothing_known_gives_nothing() {
        assert_eq!(nearest("x", &[]), None);
    }

    #[test]
    fn a_huge_word_is_cut_before_comparing() {
        assert_eq!(nearest(&"x".repeat(1 << 20), &["steps"]), Some("steps"));
    }

    #[test]
    fn a_chain_of_errors_is_one_sentence_without_repetition() {
        let io = || std::io::Error::other("disk full");
        let chain = |contexts: &[&str]| {
            let contexts = contexts.iter().rev();
            contexts.fold(anyhow::Error::new(io()), |error, context| {
                error.context(context.to_string())
            })
        };
        for (contexts, says) in [
            (&["write /a/b.png"][..], "write /a/b.png: disk full"),
            (
                &["load LoRA /a/b.st", "cannot access `/a/b.st`"],
                "cannot access `/a/b.st`: disk full",
            ),
            (
                &["merge into /out", "write /out/vae/x"],
                "write /out/vae/x: disk full",
            ),
            (
                &["load the vae", "write /a: disk full"],
                "load the vae: write /a: disk full",
            ),
            (
                &["/a/b is not valid", "line 3"],
                "/a/b is not valid: line 3: disk full",
            ),
        ] {
            assert_eq!(sentence(&chain(contexts)), says);
        }
    }

    #[test]
    fn foreign_text_becomes_one_bounded_line() {
        assert_eq!(one_line(" a\nb\u{1b}[2J\t "), "a\\nb\\u{1b}[2J");
        assert_eq!(
            one_line(&"ü".repeat(300)),
            format!("{}...", "ü".repeat(200))
        );
        assert_eq!(shown(Path::new("a\r/b.png")), "a\\r/b.png");
    }
}
