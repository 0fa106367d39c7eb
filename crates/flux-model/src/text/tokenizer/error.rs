//! Everything that can be wrong with a tokenizer's files and its prompts.

use std::path::{Path, PathBuf};

pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;
pub(super) type Result<T, E = TokenizerError> = std::result::Result<T, E>;

/// Why a tokenizer cannot be loaded or a prompt cannot be encoded.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum TokenizerError {
    #[error("cannot read `{}`", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{}` is not a usable tokenizer file", path.display())]
    Malformed { path: PathBuf, source: Cause },
    #[error("`{}` has no {role} token `{token}`", path.display())]
    MissingToken {
        path: PathBuf,
        role: &'static str,
        token: String,
    },
    #[error(
        "`{}` has Mistral's own `tekken.json` and no `tokenizer.json`, which is what is read here: take the folder `tokenizer` of \
         black-forest-labs/FLUX.2-dev", path.display()
    )]
    Tekken { path: PathBuf },
    #[error("max_length is {max_length}, the special tokens alone need {needed}")]
    TooShort { max_length: usize, needed: usize },
    #[error("cannot tokenize the prompt")]
    Encode { source: Cause },
}

pub(super) fn malformed<E: Into<Cause>>(path: &Path) -> impl Fn(E) -> TokenizerError {
    move |source| TokenizerError::Malformed {
        path: path.into(),
        source: source.into(),
    }
}
