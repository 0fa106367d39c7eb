//! A header against the file that it is in: every byte is accounted for, once.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::files::host::Dtype;

use super::error::{FileError, TensorProblem};
use super::header::{Entry, LENGTH, MAX_HEADER, byte_len, is_valid_name};

/// What the header says about one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Length of each axis, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Position in the file.
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The header length, from the first bytes of the file.
pub(super) fn header_len(path: &Path, start: &[u8], file_len: u64) -> Result<u64, FileError> {
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
pub(super) fn foreign_format(start: &[u8]) -> Option<&'static str> {
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
pub(super) fn locate(
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
