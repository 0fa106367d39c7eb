//! Safetensors files, read as if written by an adversary.
//!
//! The format is <https://huggingface.co/docs/safetensors>: a `u64` header length, a JSON header, the data. The
//! `safetensors` crate keeps the last of two equal keys, takes any tensor name and wants the whole file in memory, so
//! the header is parsed here instead:
//!
//! - Everything is checked when a file is opened: what the header says must account for every byte of the file, once.
//!   Nothing is allocated from a length that has not been compared with the file first.
//! - Data is read on demand at its offset; there is no memory map, so a file cut short later is an error, not a crash.
//! - Whether the *values* are finite is for the caller to ask ([`HostTensor::first_non_finite`]).
//! - Writing is deterministic: equal tensors and metadata give equal bytes.

use std::borrow::Borrow;
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;
use serde::de::{Error, MapAccess};
use serde::ser::{SerializeMap, Serializer};

use crate::files::host::{Dtype, HostTensor};
use crate::files::strict_json::{Object, Skipped, Unique, quoted};

/// Largest header the format allows, in bytes.
const MAX_HEADER: u64 = 100_000_000;
/// Largest shard index read, in bytes; real ones stay below one MiB.
const MAX_INDEX: u64 = 64 << 20;
/// Bytes of the header length in front of the header.
const LENGTH: u64 = 8;
const METADATA: &str = "__metadata__";

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
    fn read(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Read {
            path: path.into(),
            source,
        }
    }

    fn tensor(path: &Path, name: &str, problem: TensorProblem) -> Self {
        Self::Tensor {
            path: path.into(),
            name: name.into(),
            problem,
        }
    }
}

/// What the header says about one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Length of each axis, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Position in the file.
    offset: u64,
    len: u64,
}

/// A safetensors file, header checked, data read on demand with positioned reads.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    source: Source,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Opens the file and checks that its header accounts for every byte.
    ///
    /// # Errors
    /// If the file cannot be read or breaks the format in any way; the message names the tensor at fault.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let (file, len) = open_regular(path)?;
        #[cfg(not(unix))]
        let file = std::sync::Mutex::new(file);
        Self::from_source(path, Source::Disk(file), len)
    }

    /// As [`open`](Self::open), for a file already in memory; `name` stands for its path in messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(name: &Path, bytes: Vec<u8>) -> Result<Self, FileError> {
        let len = bytes.len() as u64;
        Self::from_source(name, Source::Memory(bytes), len)
    }

    fn from_source(path: &Path, source: Source, file_len: u64) -> Result<Self, FileError> {
        let read = |offset, len| {
            let mut bytes = vec![0; len];
            let outcome = source.read_exact_at(offset, &mut bytes);
            outcome.map(|()| bytes).map_err(FileError::read(path))
        };
        let start = read(0, file_len.min(64) as usize)?;
        let header_len = header_len(path, &start, file_len)?;
        let header = read(LENGTH, header_len as usize)?;

        let Header { metadata, entries } = parse_json(path, "header", &header)?;
        let data_start = LENGTH + header_len;
        let tensors = locate(path, entries, data_start, file_len - data_start)?;
        Ok(Self {
            path: path.into(),
            source,
            metadata,
            tensors,
        })
    }

    /// The path given to [`open`](Self::open), or the name given to [`from_bytes`](Self::from_bytes).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The `__metadata__` of the header; empty if the file has none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Dtype and shape of a tensor, without reading it.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether the file holds no tensor at all, which the format allows.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// If there is no such tensor, the file has changed since it was opened, or memory is short.
    pub fn read(&self, name: &str) -> Result<HostTensor, FileError> {
        let info = self.require(name)?;
        self.read_span(name, info.dtype, info.shape.clone(), info.offset)
    }

    /// Reads a slice of a tensor's outermost axis, and only that from disk.
    ///
    /// # Errors
    /// As [`read`](Self::read), and if the tensor is a scalar or has no such rows.
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor, FileError> {
        let info = self.require(name)?;
        let mut shape = info.shape.clone();
        let axis = match shape.first_mut() {
            Some(axis) if rows.start <= rows.end && rows.end <= *axis => axis,
            _ => {
                let problem = TensorProblem::Rows { shape, rows };
                return Err(FileError::tensor(&self.path, name, problem));
            }
        };
        let stride = info.len.checked_div(*axis as u64).unwrap_or(0);
        *axis = rows.len();
        let offset = info.offset + stride * rows.start as u64;
        self.read_span(name, info.dtype, shape, offset)
    }

    fn require(&self, name: &str) -> Result<&TensorInfo, FileError> {
        self.info(name)
            .ok_or_else(|| FileError::tensor(&self.path, name, TensorProblem::Missing))
    }

    /// Reads as many bytes as `dtype` and `shape`, a part of tensor `name`, take.
    fn read_span(
        &self,
        name: &str,
        dtype: Dtype,
        shape: Vec<usize>,
        offset: u64,
    ) -> Result<HostTensor, FileError> {
        // Zeroed a piece at a time, so that the zeros are still in cache when the data overwrites them.
        const PIECE: usize = 1 << 20;
        let len = shape.iter().product::<usize>() * dtype.size();
        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(len).is_err() {
            let problem = TensorProblem::Memory { bytes: len as u64 };
            return Err(FileError::tensor(&self.path, name, problem));
        }
        while bytes.len() < len {
            let start = bytes.len();
            bytes.resize(len.min(start + PIECE), 0);
            self.source
                .read_exact_at(offset + start as u64, &mut bytes[start..])
                .map_err(FileError::read(&self.path))?;
        }
        Ok(HostTensor {
            dtype,
            shape,
            bytes,
        })
    }
}

/// Several safetensors files read as one: a single file, or the shards an index names.
#[derive(Debug)]
pub struct TensorSet {
    path: PathBuf,
    /// Never empty.
    files: Vec<TensorFile>,
    /// Tensor name to index in `files`.
    owners: BTreeMap<String, usize>,
}

impl TensorSet {
    /// Opens a `.safetensors` file, or every shard of a `.safetensors.index.json`.
    ///
    /// Shards must lie in the folder of the index, or, where the index is a symbolic link, in the folder of its target:
    /// that is how the Hugging Face cache stores a checkpoint.
    ///
    /// # Errors
    /// As [`TensorFile::open`], and if index and shards do not agree on where each tensor is.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            Self::open_index(path)
        } else {
            TensorFile::open(path).map(Self::from_file)
        }
    }

    /// A set of one file.
    pub fn from_file(file: TensorFile) -> Self {
        Self {
            path: file.path.clone(),
            owners: file.names().map(|name| (name.into(), 0)).collect(),
            files: vec![file],
        }
    }

    fn open_index(path: &Path) -> Result<Self, FileError> {
        let Index { weight_map } = parse_json(path, "shard index", &read_index(path)?)?;
        if weight_map.is_empty() {
            return Err(FileError::EmptyIndex { path: path.into() });
        }
        let shards = Vec::from_iter(weight_map.values().collect::<BTreeSet<_>>());
        let mut files = Vec::new();
        let mut owners = BTreeMap::new();
        for (i, &shard) in shards.iter().enumerate() {
            let file = TensorFile::open(&shard_path(path, shard)?)?;
            for name in file.names() {
                let shard = shard.clone();
                if !weight_map.contains_key(name) {
                    let problem = TensorProblem::NotInIndex { shard };
                    return Err(FileError::tensor(path, name, problem));
                }
                if let Some(first) = owners.insert(name.to_owned(), i) {
                    let (first, second) = (shards[first].clone(), shard);
                    let problem = TensorProblem::TwoShards { first, second };
                    return Err(FileError::tensor(path, name, problem));
                }
            }
            files.push(file);
        }
        for (name, shard) in &weight_map {
            if owners.get(name).is_none_or(|&i| shards[i] != shard) {
                let shard = shard.clone();
                let problem = TensorProblem::NotInShard { shard };
                return Err(FileError::tensor(path, name, problem));
            }
        }
        Ok(Self {
            path: path.into(),
            files,
            owners,
        })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.owners.keys().map(String::as_str)
    }

    /// Dtype and shape of a tensor, without reading it.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.files[*self.owners.get(name)?].info(name)
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read(&self, name: &str) -> Result<HostTensor, FileError> {
        self.owner(name)?.read(name)
    }

    /// Reads a slice of a tensor's outermost axis, and only that from disk.
    ///
    /// # Errors
    /// As [`TensorFile::read_rows`].
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor, FileError> {
        self.owner(name)?.read_rows(name, rows)
    }

    /// The path given to [`open`](Self::open).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata of the first file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.files[0].metadata()
    }

    /// The files, in the order of their names; at least one.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    fn owner(&self, name: &str) -> Result<&TensorFile, FileError> {
        let owner = self.owners.get(name).map(|&i| &self.files[i]);
        owner.ok_or_else(|| FileError::tensor(&self.path, name, TensorProblem::Missing))
    }
}

/// Bytes of a safetensors file, the same for the same tensors and metadata.
///
/// # Panics
/// If a name is one that [`TensorFile::open`] refuses, or a tensor's bytes do not fill its shape.
pub fn serialize(
    tensors: &BTreeMap<String, HostTensor>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut out = Vec::new();
    match write_tensors(&mut out, tensors, metadata) {
        Ok(()) => out,
        Err(error) => panic!("{error}"),
    }
}

/// Writes the file that [`serialize`] makes, without a copy of the tensors.
///
/// # Errors
/// What `out` returns; [`io::ErrorKind::InvalidInput`] for a name that [`TensorFile::open`] refuses, or a tensor whose bytes
/// do not fill its shape.
pub fn write_tensors<W: Write + ?Sized, T: Borrow<HostTensor>>(
    out: &mut W,
    tensors: &BTreeMap<String, T>,
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let layout = tensors.iter().map(|(name, tensor)| {
        let tensor = tensor.borrow();
        (name.clone(), tensor.dtype, tensor.shape.clone())
    });
    let mut layout = layout.collect::<Vec<_>>();
    // Wide elements first keeps all of them aligned; the sort is stable, so names stay sorted.
    layout.sort_by_key(|(_, dtype, _)| Reverse(dtype.size()));
    write(out, &layout, metadata, |name| {
        Ok::<_, io::Error>(tensors[name].borrow())
    })
}

/// Streams a safetensors file: the header from `layout`, then `tensor(name)` for each of its rows, one in memory at a
/// time.
///
/// The data has the order of `layout`; with wide dtypes first, every tensor is aligned to its element size.
///
/// # Errors
/// What `tensor` and `out` return; and [`io::ErrorKind::InvalidInput`] if a name is one that [`TensorFile::open`]
/// refuses, occurs twice, or a tensor is not what `layout` says. What has been written by then is no use.
pub fn write_streaming<W: Write, E: From<io::Error>>(
    out: &mut W,
    layout: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
    tensor: impl FnMut(&str) -> Result<HostTensor, E>,
) -> Result<(), E> {
    write(out, layout, metadata, tensor)
}

fn write<W: Write + ?Sized, T: Borrow<HostTensor>, E: From<io::Error>>(
    out: &mut W,
    layout: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
    mut tensor: impl FnMut(&str) -> Result<T, E>,
) -> Result<(), E> {
    out.write_all(&header(layout, metadata)?)?;
    for (name, dtype, shape) in layout {
        let tensor = tensor(name)?;
        let tensor = tensor.borrow();
        let bytes = tensor.bytes.len();
        if (tensor.dtype, &tensor.shape) != (*dtype, shape)
            || byte_len(*dtype, shape) != Some(bytes as u64)
        {
            Err(invalid(format!(
                "tensor `{name}`: the layout says {dtype} {shape:?}, but it is {} {:?} of {bytes} bytes",
                tensor.dtype, tensor.shape
            )))?;
        }
        out.write_all(&tensor.bytes)?;
    }
    Ok(())
}

/// Header length and header, padded so that the data is aligned to 8 bytes.
fn header(
    layout: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
) -> io::Result<Vec<u8>> {
    let mut header = vec![0; LENGTH as usize];
    let mut json = serde_json::Serializer::new(&mut header);
    let mut map = json.serialize_map(None)?;
    if !metadata.is_empty() {
        map.serialize_entry(METADATA, metadata)?;
    }
    let mut names = BTreeSet::new();
    let mut begin = 0;
    for (name, dtype, shape) in layout {
        if !is_valid_name(name) {
            return Err(invalid(format!("tensor name {name:?} is not allowed")));
        }
        if !names.insert(name) {
            return Err(invalid(format!("tensor `{name}` occurs twice")));
        }
        let end = byte_len(*dtype, shape)
            .and_then(|len| len.checked_add(begin))
            .ok_or_else(|| invalid(format!("tensor `{name}`: shape {shape:?} overflows")))?;
        map.serialize_entry(
            name,
            &Entry {
                dtype: dtype.name().into(),
                shape: shape.clone(),
                data_offsets: [begin, end],
            },
        )?;
        begin = end;
    }
    map.end()?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let len = header.len() as u64 - LENGTH;
    if len > MAX_HEADER {
        return Err(invalid(format!("a header of {len} bytes is too large")));
    }
    header[..LENGTH as usize].copy_from_slice(&len.to_le_bytes());
    Ok(header)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Bytes that many threads may read from.
#[derive(Debug)]
enum Source {
    #[cfg(unix)]
    Disk(File),
    #[cfg(not(unix))]
    Disk(std::sync::Mutex<File>),
    Memory(Vec<u8>),
}

impl Source {
    fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            #[cfg(unix)]
            Self::Disk(file) => std::os::unix::fs::FileExt::read_exact_at(file, out, offset),
            #[cfg(not(unix))]
            Self::Disk(file) => {
                // The lock guards nothing but the position, which is set anew each time.
                let mut file = file.lock().unwrap_or_else(|lock| lock.into_inner());
                io::Seek::seek(&mut *file, io::SeekFrom::Start(offset))?;
                file.read_exact(out)
            }
            Self::Memory(bytes) => {
                let mut bytes = io::Cursor::new(bytes);
                bytes.set_position(offset);
                bytes.read_exact(out)
            }
        }
    }
}

/// Opens a file and its length, without waiting for a writer should the path be a pipe.
fn open_regular(path: &Path) -> Result<(File, u64), FileError> {
    let refuse = |found| FileError::NotSafetensors {
        path: path.into(),
        found,
    };
    let metadata = fs::metadata(path).map_err(FileError::read(path))?;
    if metadata.is_dir() {
        return Err(refuse("a directory: name the file inside it"));
    }
    if !metadata.is_file() {
        return Err(refuse("not a regular file: copy it to disk first"));
    }
    let file = File::open(path).map_err(FileError::read(path))?;
    let len = file.metadata().map_err(FileError::read(path))?.len();
    Ok((file, len))
}

/// The header length, from the first bytes of the file.
fn header_len(path: &Path, start: &[u8], file_len: u64) -> Result<u64, FileError> {
    let path = PathBuf::from(path);
    let declared = start.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    let available = file_len.saturating_sub(LENGTH);
    if let Some(bytes) = declared
        && bytes <= MAX_HEADER.min(available)
        && start.get(LENGTH as usize) == Some(&b'{')
    {
        return Ok(bytes);
    }
    // Only now: a sound header of 640 bytes starts like a pickle.
    if let Some(found) = foreign_format(start) {
        return Err(FileError::NotSafetensors { path, found });
    }
    Err(match declared {
        Some(bytes) if bytes > MAX_HEADER => FileError::TooLarge {
            path,
            part: "header",
            bytes,
            limit: MAX_HEADER,
        },
        Some(bytes) if bytes > available => FileError::Cut {
            path,
            part: "header",
            expected: bytes,
            found: available,
        },
        Some(_) => FileError::NotSafetensors {
            path,
            found: "not a safetensors file: its header does not start with `{`",
        },
        None => FileError::NotSafetensors {
            path,
            found: "shorter than the 8 bytes a safetensors file starts with: download it again",
        },
    })
}

/// What a file is, if its first bytes are those of something commonly mistaken for a checkpoint.
fn foreign_format(start: &[u8]) -> Option<&'static str> {
    let text = start.trim_ascii_start().to_ascii_lowercase();
    let is_text = |prefix: &str| text.starts_with(prefix.as_bytes());
    if start.is_empty() {
        Some("empty: download it again")
    } else if start.starts_with(b"PK\x03\x04") {
        Some("a zip/PyTorch archive: convert it to safetensors")
    } else if matches!(start, [0x80, 2..=5, ..]) {
        Some("a Python pickle, which can run code when loaded: convert it to safetensors")
    } else if start.starts_with(b"GGUF") {
        Some("a GGUF file: use the safetensors checkpoint it was made from")
    } else if is_text("<!do") || is_text("<htm") || is_text("<?xml") {
        Some("a web page, not a checkpoint: download the file itself")
    } else if is_text("version https://git-lfs") {
        Some("a Git LFS pointer: run git lfs pull")
    } else {
        None
    }
}

/// Checks every tensor, and that together they cover the data exactly once.
fn locate(
    path: &Path,
    mut entries: Vec<(String, Entry)>,
    data_start: u64,
    data_len: u64,
) -> Result<BTreeMap<String, TensorInfo>, FileError> {
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let described = entries.last().map_or(0, |(_, entry)| entry.data_offsets[1]);
    let mut tensors = BTreeMap::new();
    let mut covered = 0;
    for (name, entry) in entries {
        let mut info = check_entry(&name, entry, covered)
            .map_err(|problem| FileError::tensor(path, &name, problem))?;
        covered += info.len;
        if covered > data_len {
            return Err(FileError::Cut {
                path: path.into(),
                part: "data",
                expected: described,
                found: data_len,
            });
        }
        info.offset += data_start;
        tensors.insert(name, info);
    }
    if covered < data_len {
        return Err(FileError::Trailing {
            path: path.into(),
            bytes: data_len - covered,
        });
    }
    Ok(tensors)
}

/// Checks one tensor, which must start where the ones before it end.
fn check_entry(name: &str, entry: Entry, covered: u64) -> Result<TensorInfo, TensorProblem> {
    let Entry {
        dtype,
        shape,
        data_offsets: [begin, end],
    } = entry;
    if !is_valid_name(name) {
        return Err(TensorProblem::Name);
    }
    let Some(dtype) = Dtype::parse(&dtype) else {
        return Err(TensorProblem::Dtype { dtype });
    };
    let Some(expected) = byte_len(dtype, &shape) else {
        return Err(TensorProblem::Shape { shape });
    };
    let Some(len) = end.checked_sub(begin) else {
        return Err(TensorProblem::Backwards { begin, end });
    };
    if len != expected {
        return Err(TensorProblem::Length {
            dtype,
            shape,
            expected,
            found: len,
        });
    }
    match begin.cmp(&covered) {
        Ordering::Less => Err(TensorProblem::Overlap {
            begin,
            end: covered,
        }),
        Ordering::Greater => Err(TensorProblem::Hole {
            begin,
            end: covered,
        }),
        Ordering::Equal => Ok(TensorInfo {
            dtype,
            shape,
            offset: begin,
            len,
        }),
    }
}

/// Size of a tensor, or `None` where the lengths of its axes overflow, even beside an axis of length 0: any product
/// of them then fits a `usize`.
fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let len = shape
        .iter()
        .try_fold(dtype.size(), |len, &axis| len.checked_mul(axis.max(1)))?;
    Some(if shape.contains(&0) { 0 } else { len as u64 })
}

/// Names become keys and, in other tools, file names: nothing invisible and nothing that climbs out of a folder.
fn is_valid_name(name: &str) -> bool {
    let climbs = name.split(['/', '\\']).any(|segment| segment == "..");
    !(name.is_empty() || name == METADATA || name.contains(char::is_control) || climbs)
}

fn read_index(path: &Path) -> Result<Vec<u8>, FileError> {
    let (file, bytes) = open_regular(path)?;
    if bytes > MAX_INDEX {
        return Err(FileError::TooLarge {
            path: path.into(),
            part: "shard index",
            bytes,
            limit: MAX_INDEX,
        });
    }
    let mut json = Vec::new();
    let outcome = file.take(MAX_INDEX).read_to_end(&mut json);
    outcome.map_err(FileError::read(path))?;
    match foreign_format(&json[..json.len().min(64)]) {
        Some(found) => Err(FileError::NotSafetensors {
            path: path.into(),
            found,
        }),
        None => Ok(json),
    }
}

/// Where a shard of this index is, if that is a place the index may name.
fn shard_path(index: &Path, shard: &str) -> Result<PathBuf, FileError> {
    let outside = || FileError::ShardOutside {
        path: index.into(),
        shard: shard.into(),
    };
    let descends = Path::new(shard)
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if !is_valid_name(shard) || shard.contains('\\') || !descends {
        return Err(outside());
    }
    let path = index.with_file_name(shard);
    let real_path = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(FileError::NoShard {
                path: index.into(),
                shard: shard.into(),
            });
        }
        outcome => outcome.map_err(FileError::read(&path))?,
    };
    let folder = index.with_file_name(".").canonicalize();
    let target = index.canonicalize().map(|index| index.with_file_name(""));
    for folder in [folder, target] {
        if real_path.starts_with(folder.map_err(FileError::read(index))?) {
            return Ok(path);
        }
    }
    Err(outside())
}

/// Parses JSON in which no object may repeat a key. `serde_json` itself limits the depth to 128.
fn parse_json<T: Object>(path: &Path, part: &'static str, bytes: &[u8]) -> Result<T, FileError> {
    let text = std::str::from_utf8(bytes).map_err(|source| FileError::NotUtf8 {
        path: path.into(),
        part,
        source,
    })?;
    match serde_json::from_str::<Unique<T>>(text) {
        Ok(object) => Ok(object.0),
        Err(source) => Err(FileError::Json {
            path: path.into(),
            part,
            source,
        }),
    }
}

#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    entries: Vec<(String, Entry)>,
}

impl Object for Header {
    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        if key == METADATA {
            self.metadata = map.next_value::<Unique<_>>()?.0;
        } else {
            self.entries
                .push((key.into(), map.next_value::<Unique<_>>()?.0));
        }
        Ok(())
    }
}

/// One tensor as the header spells it.
#[derive(Default, Serialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl Object for Entry {
    const REQUIRED: &[&str] = &["dtype", "shape", "data_offsets"];

    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "dtype" => self.dtype = map.next_value()?,
            "shape" => self.shape = map.next_value()?,
            "data_offsets" => self.data_offsets = map.next_value()?,
            _ => return Err(A::Error::custom("no tensor has this field")),
        }
        Ok(())
    }
}

impl Object for BTreeMap<String, String> {
    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        self.insert(key.into(), map.next_value()?);
        Ok(())
    }
}

/// A shard index; its `metadata` is not used.
#[derive(Default)]
struct Index {
    /// Tensor name to shard.
    weight_map: BTreeMap<String, String>,
}

impl Object for Index {
    const REQUIRED: &[&str] = &["weight_map"];

    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "weight_map" => self.weight_map = map.next_value::<Unique<_>>()?.0,
            _ => Skipped = map.next_value()?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
