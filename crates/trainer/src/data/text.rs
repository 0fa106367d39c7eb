//! Text files of a dataset, with a bound on their size.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::data::error::{DatasetError, read_error};

/// The encoders read 512 tokens at most; this is some thirty times as much text.
pub(super) const MAX_CAPTION_BYTES: u64 = 64 << 10;

pub(super) fn read_caption(path: &Path) -> Result<String, DatasetError> {
    let bytes = read_up_to(path, MAX_CAPTION_BYTES)?;
    let bytes = bytes.ok_or_else(|| DatasetError::CaptionTooLarge { path: path.into() })?;
    let text =
        String::from_utf8(bytes).map_err(|_| DatasetError::CaptionNotUtf8 { path: path.into() })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text); // Windows editors put it there
    Ok(text.trim().to_owned())
}

/// Opens a regular file; a pipe in a dataset would block for ever.
pub(super) fn open(path: &Path) -> Result<File, DatasetError> {
    let cannot_read = |error| read_error(path, error);
    if !fs::metadata(path).map_err(cannot_read)?.is_file() {
        return Err(cannot_read(io::Error::other("it is not a file")));
    }
    File::open(path).map_err(cannot_read)
}

/// The bytes of a file, or `None` if there are more than `max`.
pub(super) fn read_up_to(path: &Path, max: u64) -> Result<Option<Vec<u8>>, DatasetError> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(max + 1).read_to_end(&mut bytes);
    read.map_err(|error| read_error(path, error))?;
    Ok((bytes.len() as u64 <= max).then_some(bytes))
}
