//! Everything that can be wrong with a LoRA file.

use std::io;
use std::path::{Path, PathBuf};

use lora_core::LoraError;
use lora_core::files::host::Dtype;
use lora_core::files::safetensors::FileError;

use super::format::{LoraFormat, Loss};
use super::identity::Identity;

/// Why a LoRA cannot be read, converted or written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum LoraFormatError {
    /// The file as a container is wrong.
    #[error(transparent)]
    File(#[from] FileError),
    /// The system refused.
    #[error("cannot access `{path}`")]
    Io { path: PathBuf, source: io::Error },
    /// The configuration beside or inside the file is wrong.
    #[error(transparent)]
    Adapter(#[from] LoraError),
    /// A folder without the files an adapter consists of.
    #[error(
        "`{path}` holds no adapter: expected `adapter_config.json` with `adapter_model.safetensors`, or one file such as `pytorch_lora_weights.safetensors`"
    )]
    NoAdapter { path: PathBuf },
    /// A folder of something else.
    #[error("`{path}` is {what}, no LoRA: {advice}")]
    OtherFolder {
        path: PathBuf,
        what: &'static str,
        advice: &'static str,
    },
    /// A folder with several files, each of which could be meant.
    #[error("`{path}` holds {count} files, such as {}: give one of them", names.join(", "))]
    Several {
        path: PathBuf,
        count: usize,
        names: Vec<String>,
    },
    /// A file that can run code when loaded.
    #[error(
        "`{path}` is a Python pickle, which can run code when loaded: convert it to safetensors"
    )]
    Pickle { path: PathBuf },
    /// No key of an adapter.
    #[error("`{path}` is no LoRA: it holds {}, such as `{key}`; {}", identity.what, identity.advice)]
    NoLora {
        path: PathBuf,
        identity: Identity,
        key: String,
    },
    /// Blocks that the network does not have.
    #[error(
        "`{path}`: `{key}` changes a block that the model does not have, which has {count} {kind} blocks: the LoRA is for another model"
    )]
    MoreBlocks {
        path: PathBuf,
        key: String,
        kind: &'static str,
        count: usize,
    },
    /// More than a few modules that the network does not have.
    #[error(
        "`{path}`: {unknown} of its {modules} modules are unknown to the model, such as `{key}`: the LoRA is for another model"
    )]
    MostlyUnknown {
        path: PathBuf,
        unknown: usize,
        modules: usize,
        key: String,
    },
    /// The names are those of another network.
    #[error("`{path}`: `{key}` is a key of a LoRA for {model}, not for {ours}")]
    OtherModel {
        path: PathBuf,
        key: String,
        model: &'static str,
        ours: &'static str,
    },
    /// Not one key names a module.
    #[error("`{path}`: no key names a module of FLUX.1 or FLUX.2; the first is `{key}`")]
    NoModule { path: PathBuf, key: String },
    /// No tensors.
    #[error("`{path}` holds no tensors")]
    Empty { path: PathBuf },
    /// Several adapters in one file.
    #[error("`{path}` holds several adapters, {}: save each in its own file", names.join(", "))]
    AdapterNames { path: PathBuf, names: Vec<String> },
    /// One tensor is at fault.
    #[error("`{path}`: `{key}` {problem}")]
    Key {
        path: PathBuf,
        key: String,
        problem: KeyProblem,
    },
    /// Two descriptions of the same module differ.
    #[error(
        "`{path}`: `{first}` and `{second}` change `{module}` in different ways: remove one of them"
    )]
    Conflict {
        path: PathBuf,
        module: String,
        first: String,
        second: String,
    },
    /// What a format cannot hold.
    #[error(
        "{format} cannot hold {} of the modules, such as `{}`: {}; choose another format, or allow losses",
        losses.len(), losses[0].module, losses[0].reason
    )]
    Unrepresentable {
        format: LoraFormat,
        /// Never empty.
        losses: Vec<Loss>,
    },
    /// A set without modules.
    #[error("nothing to write to `{path}`: the LoRA changes no module")]
    Nothing { path: PathBuf },
    /// A dtype that no reader takes.
    #[error("a LoRA cannot be written as {dtype}: choose F32, F16 or BF16")]
    OutputDtype { dtype: Dtype },
    /// The change depends on the weight it is applied to.
    #[error(
        "the change of `{module}` depends on the base weight of `{needed}`, which was not given"
    )]
    NeedsBase { module: String, needed: String },
}

/// What is wrong with one tensor of a LoRA.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum KeyProblem {
    /// An algorithm that adds no low-rank matrix.
    #[error("belongs to {name}, which {reason}")]
    Algorithm {
        name: &'static str,
        reason: &'static str,
    },
    /// Half of a pair.
    #[error("has no partner `{missing}`: the file is incomplete, download it again")]
    NoPartner { missing: String },
    /// Two keys for one parameter.
    #[error("gives the same parameter as `{first}`: remove one of them")]
    Twice { first: String },
    /// Two algorithms on one module.
    #[error("changes the module in another way than `{other}`: keep one of them")]
    Mixed { other: String },
    /// The number of axes is wrong.
    #[error("must be a matrix, but has shape {found:?}")]
    Matrix { found: Vec<usize> },
    /// The sizes are not those of the module.
    #[error(
        "has shape {found:?}, but `{module}` needs {expected:?}: is the LoRA for another model?"
    )]
    Shape {
        module: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    /// An empty adapter.
    #[error("has rank 0: remove the module or train it again")]
    RankZero,
    /// The inner sizes of a pair differ.
    #[error("has rank {rank}, but `{other}` has rank {other_rank}: all of a module has one rank")]
    Rank {
        rank: usize,
        other: String,
        other_rank: usize,
    },
    /// Rank and configuration differ.
    #[error(
        "has rank {stored}, but the configuration says {configured}: correct `r` or `rank_pattern`"
    )]
    RankDisagrees { stored: usize, configured: usize },
    /// More or less than one value.
    #[error("holds {count} values: alpha is one number")]
    AlphaCount { count: usize },
    /// NaN or infinity.
    #[error("is {value}: alpha must be a finite number")]
    AlphaValue { value: f64 },
    /// Alpha and configuration differ.
    #[error(
        "gives the scale {tensor}, but the configuration gives {configured}: remove one of them"
    )]
    AlphaDisagrees { tensor: f64, configured: f64 },
    /// A DoRA magnitude of neither axis.
    #[error(
        "has shape {found:?}: a DoRA magnitude of this module is [{out}], [{out}, 1] or [1, {input}]"
    )]
    Magnitude {
        out: usize,
        input: usize,
        found: Vec<usize>,
    },
    /// Integers where weights belong.
    #[error("is {dtype}: a weight must be floating point")]
    Dtype { dtype: Dtype },
    /// NaN or infinity in a weight.
    #[error("holds a value that is not finite at element {index}")]
    NotFinite { index: usize },
    /// A finite value that the output dtype cannot hold.
    #[error("has values beyond the range of {dtype}: write BF16 or F32")]
    Overflow { dtype: Dtype },
}

impl LoraFormatError {
    pub(super) fn key(path: &Path, key: &str, problem: KeyProblem) -> Self {
        Self::Key {
            path: path.into(),
            key: key.into(),
            problem,
        }
    }

    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io {
            path: path.into(),
            source,
        }
    }
}
