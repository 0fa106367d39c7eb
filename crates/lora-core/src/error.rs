//! Everything that can be wrong with an adapter, its file or its configuration.

use std::path::PathBuf;

use crate::files::safetensors::FileError;

/// Why an adapter cannot be attached, restored, merged or written.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// A target pattern selects no layer of the model.
    #[error("LoRA target `{pattern}` matches no layer of this model{}", nearest.as_ref().map(|n| format!("; the nearest layer is `{n}`")).unwrap_or_default())]
    NoMatch {
        /// The pattern as configured.
        pattern: String,
        /// The layer whose path resembles the pattern most.
        nearest: Option<String>,
    },
    /// A `target_modules`, `exclude_modules`, `rank_pattern` or `alpha_pattern` regex does not compile.
    #[error("`{pattern}` is not a valid regular expression: {reason}")]
    Regex {
        /// The pattern as configured.
        pattern: String,
        /// What the regex compiler says.
        reason: String,
    },
    /// A configuration value is out of range or cannot be combined with another.
    #[error("{0}")]
    Config(String),
    /// A tensor has another shape than the layer it belongs to.
    #[error("tensor `{key}`: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// Name of the tensor.
        key: String,
        /// What the model or the rank asks for.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// A tensor that must be there is not.
    #[error("tensor `{key}` is missing{}", hint.as_ref().map(|h| format!(": {h}")).unwrap_or_default())]
    Missing {
        /// Name of the tensor.
        key: String,
        /// Where it was looked for or why it is needed.
        hint: Option<String>,
    },
    /// A tensor that nothing in the model can use.
    #[error("tensor `{key}` has no place in this model: {reason}")]
    Leftover {
        /// Name of the tensor.
        key: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// Stored adapter and configuration disagree.
    #[error(
        "`{key}` is {configured} in the configuration but {stored} in the stored adapter; resume with the stored value or start a new run"
    )]
    Disagrees {
        /// Configuration key.
        key: String,
        /// Value in the configuration.
        configured: String,
        /// Value in the file.
        stored: String,
    },
    /// NaN or infinity where a weight should be.
    #[error("tensor `{key}` holds a value that is not finite at element {index}")]
    NotFinite {
        /// Name of the tensor.
        key: String,
        /// Row-major index of the first such element.
        index: usize,
    },
    /// No adapter of that name is attached.
    #[error("no adapter named `{name}`; attached: {}", if attached.is_empty() { "none".to_string() } else { attached.join(", ") })]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// Names that are attached.
        attached: Vec<String>,
    },
    /// A trainable parameter without gradient, or a gradient without parameter.
    #[error("gradients and trainable parameters differ: {0}")]
    Gradients(String),
    /// Optimizer state and trainable parameters differ.
    #[error("optimizer state and trainable parameters differ: {0}")]
    Optimizer(String),
    /// The file as a container is wrong.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file could not be read or written.
    #[error("cannot access `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// JSON inside a file is malformed.
    #[error("{what} is malformed: write it again")]
    Json {
        /// Which JSON text.
        what: String,
        /// Where it breaks.
        #[source]
        source: serde_json::Error,
    },
}
