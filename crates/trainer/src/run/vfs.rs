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

use lora_core::files::digest::{Sha256Hex, digest_file};
use tracing::warn;

use crate::run::error::{CheckpointError, io};

/// What a run folder is written with.
///
/// A method is done when its effect can be read back; it is safe from a power loss only after the
/// matching `sync_*`.
pub trait Vfs {
    /// Creates a folder whose parent exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates an empty file, which must not exist yet.
    ///
    /// The handle is for [`Vfs::append`] and [`Vfs::sync_file`]: a write-back error is reported to
    /// the handle that wrote, and a handle opened later may never hear of it.
    fn create_file(&self, path: &Path) -> io::Result<File>;

    /// Writes all of `bytes` at the end of `file`, which was created at `path` or opened from there
    /// for appending.
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

    fn create_file(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).open(path)
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

/// What writes the content of a file, piece by piece; asked twice, it writes the same again.
pub type Content<'a> = &'a dyn Fn(&mut dyn Write) -> io::Result<()>;

/// Length and SHA-256 of a content.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summary {
    pub(crate) length: u64,
    pub(crate) sha256: String,
}

/// Length and SHA-256 of what `content` would write.
pub(crate) fn summarize(content: Content) -> io::Result<Summary> {
    let mut out = Summed::new(io::sink());
    content(&mut out)?;
    Ok(out.finish())
}

/// Creates a file and makes its content durable, holding no more of it than a piece; what was meant to be written comes
/// back, to be compared with what can be read. Errors name `shown`, the place the file is for.
pub(crate) fn write_file(
    vfs: &dyn Vfs,
    path: &Path,
    shown: &Path,
    content: Content,
) -> Result<Summary, CheckpointError> {
    let file = vfs.create_file(path).map_err(io("create", shown))?;
    let mut out = Summed::new(Pieces {
        vfs,
        path,
        file: &file,
        piece: Vec::new(),
    });
    content(&mut out)
        .and_then(|()| out.inner.flush())
        .map_err(io("write", shown))?;
    vfs.sync_file(path, &file).map_err(io("fsync", shown))?;
    Ok(out.finish())
}

/// How much of a file is in memory while it is written, in bytes; few in tests, whose files are then torn between pieces too.
const PIECE: usize = if cfg!(test) { 128 } else { 1 << 20 };

/// A file that is written through a [`Vfs`] in pieces of [`PIECE`]. What is left at the end is written by `flush` alone: a
/// failed write is not tried again by dropping this.
struct Pieces<'a> {
    vfs: &'a dyn Vfs,
    path: &'a Path,
    file: &'a File,
    piece: Vec<u8>,
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        let taken = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let written = self.vfs.append(self.path, self.file, &self.piece);
        self.piece.clear();
        written
    }
}

/// Passes on what is written, and knows its length and SHA-256.
struct Summed<W> {
    inner: W,
    length: u64,
    sha256: Sha256Hex,
}

impl<W: Write> Summed<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            length: 0,
            sha256: Sha256Hex::default(),
        }
    }

    fn finish(self) -> Summary {
        Summary {
            length: self.length,
            sha256: self.sha256.finish(),
        }
    }
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.inner.write(bytes)?;
        self.length += taken as u64;
        self.sha256.update(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Replaces a file of a run folder, or creates it, so that after a crash either the old content
/// is found or the new.
pub(crate) fn replace_file(
    vfs: &dyn Vfs,
    path: &Path,
    content: Content,
) -> Result<(), CheckpointError> {
    let temporary = sibling(path, "tmp");
    let written = write_and_rename(vfs, &temporary, path, content);
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
    content: Content,
) -> Result<(), CheckpointError> {
    let expected = write_file(vfs, temporary, path, content)?.sha256;
    let found = digest_file(temporary).map_err(io("read", path))?;
    if found != expected {
        return Err(CheckpointError::Checksum {
            path: path.to_path_buf(),
            expected,
            found,
        });
    }
    vfs.rename(temporary, path).map_err(io("replace", path))
}

/// Tries whether a file can be made in a folder.
pub(crate) fn writable(folder: &Path) -> Result<(), CheckpointError> {
    let path = folder.join(format!(".write-test-{}", std::process::id()));
    File::create(&path)
        .and_then(|_| fs::remove_file(&path))
        .map_err(io("write into", folder))
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
        let file = RealFs.create_file(&path).unwrap();
        RealFs.append(&path, &file, b"one").unwrap();
        RealFs.sync_file(&path, &file).unwrap();
        RealFs.sync_dir(dir.path()).unwrap();
        let error = RealFs.create_file(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
    }
}
