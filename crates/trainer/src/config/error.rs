//! Why a configuration was refused, in the words of who wrote it.

use std::io;
use std::path::PathBuf;

use crate::nearest::{one_line, shown};

/// Why a configuration was refused; the program exits with 2 on any of these.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read `{}`", shown(path))]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The file is not the text of a configuration.
    #[error("`{}` is not a run configuration: {problem}", shown(path))]
    NotText {
        /// The configuration file.
        path: PathBuf,
        /// What was found instead.
        problem: String,
    },
    /// The file breaks TOML's grammar.
    #[error("{}:{line}:{column}: {problem}", shown(path))]
    Syntax {
        /// The configuration file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A section that does not exist.
    #[error("unknown section `{section}`{place}: did you mean `{nearest}`?")]
    UnknownSection {
        /// As written.
        section: String,
        /// Where, with its preposition: ` in run.toml:3`.
        place: String,
        /// The known section that is spelled most like it.
        nearest: String,
    },
    /// A key that does not exist.
    #[error("unknown key `{key}`{place}: did you mean `{nearest}`?")]
    UnknownKey {
        /// `section.key` as written.
        key: String,
        /// Where, with its preposition: ` in run.toml:3`.
        place: String,
        /// The known key that is spelled most like it.
        nearest: String,
    },
    /// A preset that does not exist.
    #[error("there is no preset `{name}`; there are: {known}")]
    Preset {
        /// As given.
        name: String,
        /// Those that do.
        known: String,
    },
    /// A key with a value it cannot have.
    #[error("`{key}`{place}: {problem}")]
    Value {
        /// `section.key`.
        key: String,
        /// Where, with its preposition: ` in run.toml:3`; empty for a default or a value set by the program.
        place: String,
        /// What is wrong with it, and what is allowed.
        problem: String,
    },
    /// A `--set` that cannot be read.
    #[error("`--set {text}`: {problem}")]
    Set {
        /// As given.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A value that TOML cannot hold.
    #[error("cannot write the configuration as TOML: {problem}")]
    Write {
        /// What TOML cannot hold.
        problem: String,
    },
}

pub(super) fn value_error(key: &str, place: &str, problem: String) -> ConfigError {
    ConfigError::Value {
        key: key.into(),
        place: place.into(),
        problem,
    }
}

pub(super) fn set_error(text: &str, problem: &str) -> ConfigError {
    ConfigError::Set {
        text: one_line(text),
        problem: problem.into(),
    }
}

/// What serde says, in the user's words.
pub(super) fn in_our_words(message: &str) -> String {
    let mut problem = one_line(message);
    for (serde, ours) in [
        ("unknown variant", "unknown value"),
        ("expected f64", "expected a number"),
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected u32", "expected a whole number"),
        ("expected path string", "expected a path"),
        ("expected a tuple of size 2", "expected two numbers"),
        (
            "expected a nonzero usize",
            "expected a whole number above 0",
        ),
        ("floating point", "number"),
    ] {
        problem = problem.replace(serde, ours);
    }
    if let Some((_, rest)) = problem.split_once("string \"")
        && let Some((text, expected)) = rest.split_once('"')
        && text.parse::<f64>().is_ok()
        && expected.ends_with("number")
    {
        problem = format!("{problem}: write {text} without quotes");
    }
    problem
}
