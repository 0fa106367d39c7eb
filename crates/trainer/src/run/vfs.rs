//! The file operations that write a run folder, behind one small trait, and the few safe ways of
//! combining them.
//!
//! [`RealFs`] is the one that ships. Tests put two others in its place (`simulate`, below): one
//! that fails at a chosen call, and one that records the calls, so that a power loss can be
//! replayed after each of them. Reading is not in the trait: what is read is checked against its
//! SHA-256, whichever way it came.

use std::fs::{self, DirEntry, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lora_core::files::digest::sha256_hex;
use tracing::warn;

use crate::run::error::{CheckpointError, io};

/// What a run folder is written with.
///
/// A method is done when its effect can be read back; it is safe from a power loss only after the
/// matching `sync_*`.
pub trait Vfs {
    /// Creates a folder whose parent exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates a file, which must not exist yet, and writes all of `bytes`.
    ///
    /// The handle is for [`Vfs::sync_file`]: a write-back error is reported to the handle that
    /// wrote, and a handle opened later may never hear of it.
    fn create_file(&self, path: &Path, bytes: &[u8]) -> io::Result<File>;

    /// Writes all of `bytes` at the end of `file`, which was opened from `path` for appending.
    fn append(&self, path: &Path, file: &File, bytes: &[u8]) -> io::Result<()>;

    /// Makes the content of `file`, which was opened from `path`, survive a power loss.
    fn sync_file(&self, path: &Path, file: &File) -> io::Result<()>;

    /// Makes the names in a folder (created, renamed, removed) survive a power loss.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Renames within one folder, atomically; a file that has the new name is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty folder.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The file system of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealFs;

impl Vfs for RealFs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create_file(&self, path: &Path, bytes: &[u8]) -> io::Result<File> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.write_all(bytes)?;
        Ok(file)
    }

    fn append(&self, _path: &Path, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn sync_file(&self, _path: &Path, file: &File) -> io::Result<()> {
        #[cfg(feature = "canary")]
        if crate::canary::forgets_file(_path) {
            return Ok(());
        }
        file.sync_all()
    }

    #[cfg(unix)]
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        #[cfg(feature = "canary")]
        if crate::canary::forgets_folder(path) {
            return Ok(());
        }
        File::open(path)?.sync_all()
    }

    /// Windows has no such call; NTFS journals names in order.
    #[cfg(not(unix))]
    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}

/// A name beside `path` that nothing has yet: `<name>.<kind>-<pid>-<n>`. Only the holder of the
/// lock makes such names, so none can appear in between.
pub(crate) fn sibling(path: &Path, kind: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().display();
    loop {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let candidate = path.with_file_name(format!("{name}.{kind}-{}-{n}", std::process::id()));
        if fs::symlink_metadata(&candidate).is_err() {
            return candidate;
        }
    }
}

/// The entries of a folder.
pub(crate) fn list(dir: &Path) -> Result<Vec<DirEntry>, CheckpointError> {
    fs::read_dir(dir)
        .and_then(Iterator::collect)
        .map_err(io("list", dir))
}

/// Deletes checkpoints of the folder `run` so that none is ever seen half deleted.
pub(crate) fn discard(vfs: &dyn Vfs, run: &Path, dirs: &[PathBuf]) -> Result<(), CheckpointError> {
    let mut doomed = Vec::new();
    for dir in dirs {
        let path = sibling(dir, "tmp");
        vfs.rename(dir, &path).map_err(io("rename", dir))?;
        doomed.push(path);
    }
    if !doomed.is_empty() {
        vfs.sync_dir(run).map_err(io("fsync", run))?;
    }
    for path in doomed {
        remove_tree(vfs, &path)?;
    }
    Ok(())
}

/// Removes a file, or a folder with all that is in it; links are removed, not followed. Nothing
/// there is fine.
pub(crate) fn remove_tree(vfs: &dyn Vfs, path: &Path) -> Result<(), CheckpointError> {
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(io("read", path))?.file_type(),
    };
    if !kind.is_dir() {
        return vfs.remove_file(path).map_err(io("remove", path));
    }
    for entry in list(path)? {
        remove_tree(vfs, &entry.path())?;
    }
    vfs.remove_dir(path).map_err(io("remove", path))
}

/// Replaces a file of a run folder, or creates it, so that after a crash either the old content
/// is found or the new.
pub(crate) fn replace_file(
    vfs: &dyn Vfs,
    path: &Path,
    bytes: &[u8],
) -> Result<(), CheckpointError> {
    let temporary = sibling(path, "tmp");
    let written = write_and_rename(vfs, &temporary, path, bytes);
    if written.is_err()
        && let Err(left) = remove_tree(vfs, &temporary)
    {
        warn!(error = %left, "a temporary file is left behind, the next start removes it");
    }
    written?;
    let parent = parent(path);
    vfs.sync_dir(parent).map_err(io("fsync", parent))
}

fn write_and_rename(
    vfs: &dyn Vfs,
    temporary: &Path,
    path: &Path,
    bytes: &[u8],
) -> Result<(), CheckpointError> {
    let file = vfs
        .create_file(temporary, bytes)
        .map_err(io("write", temporary))?;
    vfs.sync_file(temporary, &file)
        .map_err(io("fsync", temporary))?;
    let written = fs::read(temporary).map_err(io("read", temporary))?;
    if written != bytes {
        return Err(CheckpointError::Checksum {
            path: temporary.to_path_buf(),
            expected: sha256_hex(bytes),
            found: sha256_hex(&written),
        });
    }
    vfs.rename(temporary, path).map_err(io("rename", temporary))
}

/// Creates a folder and its missing parents, each of them surviving a power loss.
pub(crate) fn create_dir_durably(path: &Path) -> Result<(), CheckpointError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = parent(path);
    if parent != path {
        create_dir_durably(parent)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {} // by another process just now
        created => created.map_err(io("create", path))?,
    }
    RealFs.sync_dir(parent).map_err(io("fsync", parent))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// Faults for tests: calls that fail ([`FailingFs`](simulate::FailingFs)) and power that goes
/// ([`Disk`](simulate::Disk)).
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
pub(crate) mod simulate;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn create_file_refuses_an_existing_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let file = RealFs.create_file(&path, b"one").unwrap();
        RealFs.sync_file(&path, &file).unwrap();
        RealFs.sync_dir(dir.path()).unwrap();
        let error = RealFs.create_file(&path, b"two").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
    }
}
