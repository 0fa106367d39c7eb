//! A part of a file where the system's cache has it: nothing is copied, and no memory of the program's own is taken.
//!
//! The only `unsafe` of this workspace, since no system promises what Rust takes for granted of a slice, that its bytes stay. What
//! another program writes into the file shows here, as it would in the next read: bytes are numbers of a tensor, any of which
//! is a valid one. Where the file is cut short meanwhile, the system ends this program as a kill would; one that is short
//! already, and a disk that cannot be read, are errors, because all of it is brought in when it is mapped.

use std::fs::File;
use std::io;

use bytes::Bytes;
use memmap2::MmapOptions;

/// `len` bytes at `offset`, aligned as that is within a page; none where the system does not map the file.
///
/// # Errors
/// A file that is shorter, or cannot be read.
#[expect(unsafe_code, reason = "see the module")]
pub(super) fn map(file: &File, offset: u64, len: usize) -> io::Result<Option<Bytes>> {
    if offset.saturating_add(len as u64) > file.metadata()?.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // SAFETY: the map is read as bytes alone, all of which are in the file; what happens when the file is changed is said above.
    let map = unsafe { MmapOptions::new().offset(offset).len(len).map(file) };
    let Ok(map) = map else {
        return Ok(None);
    };
    #[cfg(target_os = "linux")]
    match map.advise(memmap2::Advice::PopulateRead) {
        // Linux before 5.14 does not know it: pages come in when they are read.
        Err(error) if error.kind() != io::ErrorKind::InvalidInput => return Err(error),
        _ => {}
    }
    Ok(Some(Bytes::from_owner(map)))
}
