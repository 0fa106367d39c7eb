//! What can be wrong with a tensor file.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::files::host::Dtype;
use crate::files::strict_json::quoted;

/// Why a tensor file cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum FileError {
    /// The operating system refused, or the file has changed since it was opened.
    #[error("cannot read `{path}`")]
    Read { path: PathBuf, source: io::Error },
    /// Something else than a tensor file, often recognised by its first bytes.
    #[error("`{path}` is {found}")]
    NotSafetensors { path: PathBuf, found: &'static str },
    /// A header or shard index longer than any real one.
    #[error(
        "`{path}`: a {part} of {bytes} bytes, over the limit of {limit}: is it the right file?"
    )]
    TooLarge {
        path: PathBuf,
        part: &'static str,
        bytes: u64,
        limit: u64,
    },
    /// The file ends inside its header or data.
    #[error(
        "`{path}` is cut short: its {part} takes {expected} bytes, {found} are there: download it again"
    )]
    Cut {
        path: PathBuf,
        part: &'static str,
        expected: u64,
        found: u64,
    },
    /// The JSON is not text.
    #[error("`{path}`: the {part} is not UTF-8: write it again")]
    NotUtf8 {
        path: PathBuf,
        part: &'static str,
        source: std::str::Utf8Error,
    },
    /// The JSON is malformed, repeats a key or has the wrong structure; the source names the key.
    #[error("`{path}`: the {part} is malformed: write it again")]
    Json {
        path: PathBuf,
        part: &'static str,
        source: serde_json::Error,
    },
    /// Bytes after the last tensor.
    #[error("`{path}`: {bytes} bytes follow the last tensor: remove them")]
    Trailing { path: PathBuf, bytes: u64 },
    /// One tensor is at fault.
    #[error("`{path}`: tensor `{}` {problem}", quoted(name))]
    Tensor {
        path: PathBuf,
        name: String,
        problem: TensorProblem,
    },
    /// The shard index names nothing.
    #[error("`{path}`: `weight_map` is empty: name the shard of each tensor")]
    EmptyIndex { path: PathBuf },
    /// A shard elsewhere than beside the index.
    #[error(
        "`{path}`: shard `{}` is outside the folder of the index: move it there",
        quoted(shard)
    )]
    ShardOutside { path: PathBuf, shard: String },
    /// A shard that does not exist.
    #[error(
        "`{path}`: shard `{}` does not exist: download it next to the index",
        quoted(shard)
    )]
    NoShard { path: PathBuf, shard: String },
}

/// What is wrong with one tensor of a file.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum TensorProblem {
    /// A name that is nothing, could be taken for a path, or would garble a terminal.
    #[error(
        "has an empty or reserved name, or one with control characters or a `..` segment: rename it"
    )]
    Name,
    /// A dtype this project does not read.
    #[error("has the unknown dtype `{}`: convert it to BF16 or F32", quoted(dtype))]
    Dtype { dtype: String },
    /// More elements than any memory holds.
    #[error("has a shape that overflows, {shape:?}: write the file again")]
    Shape { shape: Vec<usize> },
    /// Offsets that run backwards.
    #[error("has data_offsets that run backwards, [{begin}, {end}]: write the file again")]
    Backwards { begin: u64, end: u64 },
    /// Offsets that do not fit dtype and shape.
    #[error(
        "takes {expected} bytes as {dtype} {shape:?}, but data_offsets span {found}: write the file again"
    )]
    Length {
        dtype: Dtype,
        shape: Vec<usize>,
        expected: u64,
        found: u64,
    },
    /// Bytes shared with another tensor.
    #[error("starts at byte {begin}, but the tensor before it ends at {end}: write the file again")]
    Overlap { begin: u64, end: u64 },
    /// Bytes that belong to no tensor.
    #[error(
        "starts at byte {begin}, but the tensor before it ends at {end}, leaving a hole: write the file again"
    )]
    Hole { begin: u64, end: u64 },
    /// Asked for, but not there.
    #[error("does not exist: is it the right checkpoint?")]
    Missing,
    /// Rows asked for, but not there.
    #[error("of shape {shape:?} has no rows {rows:?}")]
    Rows {
        shape: Vec<usize>,
        rows: Range<usize>,
    },
    /// Too large to read.
    #[error("takes {bytes} bytes, more than can be allocated")]
    Memory { bytes: u64 },
    /// The shard lacks what the index places there.
    #[error(
        "is not in shard `{}`, where the index places it: download both again",
        quoted(shard)
    )]
    NotInShard { shard: String },
    /// The shard holds what the index does not have.
    #[error(
        "of shard `{}` is not in the index: download both again",
        quoted(shard)
    )]
    NotInIndex { shard: String },
    /// Its storage in few bits is broken or unknown.
    #[error("cannot be dequantised: {problem}")]
    Quantised { problem: String },
    /// Two shards hold it.
    #[error(
        "is in shard `{}` and in shard `{}`: remove one of them",
        quoted(first),
        quoted(second)
    )]
    TwoShards { first: String, second: String },
}

impl FileError {
    pub(super) fn read(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Read {
            path: path.into(),
            source,
        }
    }

    pub(super) fn tensor(path: &Path, name: &str, problem: TensorProblem) -> Self {
        Self::Tensor {
            path: path.into(),
            name: name.into(),
            problem,
        }
    }
}
