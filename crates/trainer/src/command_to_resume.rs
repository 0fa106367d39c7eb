//! What a stopped run says: the command that goes on with it.

use std::path::Path;

/// The command that this process was started with, as a shell takes it, so that it goes on with `run`: with `--resume`, and
/// not from an earlier checkpoint again.
pub(crate) fn command_to_resume(args: impl Iterator<Item = String>, run: &Path) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut resumes = false;
    for arg in args {
        let is_value = words.last().is_some_and(|last| last == "--resume") && !arg.starts_with('-');
        match is_value || arg.starts_with("--resume=") {
            true => {
                words.truncate(words.len() - usize::from(is_value));
                words.push(format!("--resume={}", run.display()));
            }
            false => words.push(arg.clone()),
        }
        resumes |= arg.split('=').next() == Some("--resume");
    }
    if !resumes {
        words.push("--resume".into());
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
    let quoted = |word: &String| match !word.is_empty() && word.chars().all(plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_run_is_gone_on_with_by_the_same_command() {
        for (given, said) in [
            ("train a.toml", "train a.toml --resume"),
            ("train a.toml --resume", "train a.toml --resume"),
            ("train --resume a.toml", "train --resume=runs/a"), // that is what --resume takes
            (
                "train --resume=runs/a/ckpt-5 a.toml",
                "train --resume=runs/a a.toml",
            ),
            (
                "train --resume --quiet a.toml",
                "train --resume --quiet a.toml",
            ),
            (
                "train it's.toml --set a=[1]",
                "train 'it'\\''s.toml' --set 'a=[1]' --resume",
            ),
        ] {
            let args = given.split(' ').map(String::from);
            assert_eq!(command_to_resume(args, Path::new("runs/a")), said);
        }
    }
}
