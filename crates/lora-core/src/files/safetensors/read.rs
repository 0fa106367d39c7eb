//! One file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::files::host::{Dtype, HostTensor};
use crate::files::mapped::map;

use super::check::{TensorInfo, header_len, locate};
use super::error::{FileError, TensorProblem};
use super::header::{Header, LENGTH, parse_json};

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
        self.read_span(name, self.span(name, None)?)
    }

    /// Reads a slice of a tensor's outermost axis, and only that from disk.
    ///
    /// # Errors
    /// As [`read`](Self::read), and if the tensor is a scalar or has no such rows.
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor, FileError> {
        self.read_span(name, self.span(name, Some(rows))?)
    }

    /// The elements of a tensor, or of a slice of its outermost axis, where the system's cache has the file. None where they cannot
    /// be had so: the system does not map the file, or they begin where elements of their type may not.
    ///
    /// # Errors
    /// As [`read_rows`](Self::read_rows).
    pub fn map(&self, name: &str, rows: Option<Range<usize>>) -> Result<Option<Bytes>, FileError> {
        let span = self.span(name, rows)?;
        if !span.offset.is_multiple_of(span.dtype.size() as u64) {
            return Ok(None);
        }
        let mapped = self.source.map(span.offset, span.len());
        mapped.map_err(FileError::read(&self.path))
    }

    /// Where a tensor is, or a slice of its outermost axis.
    fn span(&self, name: &str, rows: Option<Range<usize>>) -> Result<Span, FileError> {
        let info = self.require(name)?;
        let mut span = Span {
            dtype: info.dtype,
            shape: info.shape.clone(),
            offset: info.offset,
        };
        let Some(rows) = rows else {
            return Ok(span);
        };
        let axis = match span.shape.first_mut() {
            Some(axis) if rows.start <= rows.end && rows.end <= *axis => axis,
            _ => {
                let shape = span.shape;
                let problem = TensorProblem::Rows { shape, rows };
                return Err(FileError::tensor(&self.path, name, problem));
            }
        };
        let stride = info.len.checked_div(*axis as u64).unwrap_or(0);
        *axis = rows.len();
        span.offset += stride * rows.start as u64;
        Ok(span)
    }

    fn require(&self, name: &str) -> Result<&TensorInfo, FileError> {
        self.info(name)
            .ok_or_else(|| FileError::tensor(&self.path, name, TensorProblem::Missing))
    }

    /// Reads a part of tensor `name`.
    fn read_span(&self, name: &str, span: Span) -> Result<HostTensor, FileError> {
        // Zeroed a piece at a time, so that the zeros are still in cache when the data overwrites them.
        const PIECE: usize = 1 << 20;
        let len = span.len();
        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(len).is_err() {
            let problem = TensorProblem::Memory { bytes: len as u64 };
            return Err(FileError::tensor(&self.path, name, problem));
        }
        while bytes.len() < len {
            let start = bytes.len();
            bytes.resize(len.min(start + PIECE), 0);
            self.source
                .read_exact_at(span.offset + start as u64, &mut bytes[start..])
                .map_err(FileError::read(&self.path))?;
        }
        Ok(HostTensor {
            dtype: span.dtype,
            shape: span.shape,
            bytes,
        })
    }
}

/// A part of a file.
struct Span {
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
}

impl Span {
    /// Its bytes.
    fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
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
    fn map(&self, offset: u64, len: usize) -> io::Result<Option<Bytes>> {
        match self {
            #[cfg(unix)]
            Self::Disk(file) => map(file, offset, len),
            #[cfg(not(unix))]
            Self::Disk(file) => {
                let file = file.lock().unwrap_or_else(|lock| lock.into_inner());
                map(&file, offset, len)
            }
            Self::Memory(_) => Ok(None),
        }
    }

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
pub(super) fn open_regular(path: &Path) -> Result<(File, u64), FileError> {
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
