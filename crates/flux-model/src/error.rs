//! Everything that can be wrong with a checkpoint or a pipeline folder.

use std::path::PathBuf;

use lora_core::files::safetensors::FileError;

use crate::text::tokenizer::TokenizerError;

/// Why a network cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file or folder that must be there is not, or cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A folder lacks a component.
    #[error("`{}` has no {what}", path.display())]
    NoComponent {
        /// The folder.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// Something else than what is needed there.
    #[error("`{}` {what}", path.display())]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// What it is, and what mends it.
        what: String,
    },
    /// A JSON file does not parse.
    #[error("`{}` is not valid", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it breaks.
        #[source]
        source: serde_json::Error,
    },
    /// A configuration describes no network of this kind.
    #[error("`{}`: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The network needs a tensor that the checkpoint lacks.
    #[error("`{}` lacks tensor `{key}`", path.display())]
    Missing {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
    /// The checkpoint holds tensors the network does not have.
    #[error("`{}` holds {count} tensors that this network does not have, such as `{key}`", path.display())]
    Leftover {
        /// The checkpoint.
        path: PathBuf,
        /// The first of them.
        key: String,
        /// How many.
        count: usize,
    },
    /// A tensor has another shape than the network's.
    #[error("`{}`: tensor `{key}` has shape {found:?}, the network needs {expected:?}", path.display())]
    Shape {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// What the network needs.
        expected: Vec<usize>,
        /// What the checkpoint holds.
        found: Vec<usize>,
    },
    /// NaN or infinity in a weight.
    #[error("`{}`: tensor `{key}` holds a value that is not finite at element {index}", path.display())]
    NotFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// Row-major index of the first such element.
        index: usize,
    },
    /// The layout of the checkpoint is not one this loader knows.
    #[error("`{}` is no {what}: {reason}", path.display())]
    UnknownLayout {
        /// The checkpoint.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
        /// Why it is not.
        reason: String,
    },
    /// The file as a container is wrong.
    #[error(transparent)]
    File(#[from] FileError),
    /// A tokenizer cannot be loaded or used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}
