//! A checkpoint is a transaction: the folder is there, whole and verified, or it is not there.
//!
//! ```text
//! ckpt-0000000120.tmp-<pid>-<n>/   each file written and fsynced, MANIFEST.json last; the folder
//!   |                              fsynced; everything read back and compared with its SHA-256
//! ckpt-0000000120/                 renamed, parent fsynced
//!   |
//! LATEST                           replaced: from here on the checkpoint is acknowledged
//! ```
//! Decisions:
//! - A failed write or fsync is never retried: the kernel may have dropped the pages it could not
//!   write, so a second fsync that succeeds proves nothing. The temporary folder goes, the error
//!   stays, no other checkpoint was touched.
//! - `MANIFEST.json` names every other file with its length and SHA-256, and ends with the SHA-256
//!   of itself: the hash of all bytes before the comma that ends the line above it, as in
//!   `head -c -83 MANIFEST.json | sha256sum`. So one flipped bit anywhere, white space included, is
//!   found without trusting that JSON comes out of a parser as it went in.
//! - [`verify`] reads every file once and hands out the bytes it verified: what is parsed later is
//!   what was checked.
//! - A valid checkpoint is never overwritten in place. Saving a step again with other content (a
//!   resumed run recorded a new learning rate, say) moves the old folder to `ckpt-N.old-<pid>-<n>`,
//!   where it can still be resumed, until the new one is acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use lora_core::files::strict_json::{parse_json, read_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tracing::{debug, warn};

use crate::run::folder::{LATEST, RunLock};
use crate::run::vfs::{Vfs, discard, list, remove_tree, sibling};

/// The file that makes a folder a checkpoint.
pub const MANIFEST: &str = "MANIFEST.json";

/// The manifest layout written here, and the only one read.
pub const FORMAT_VERSION: u32 = 1;

/// A manifest larger than this is not one of ours.
pub(crate) const MANIFEST_LIMIT: u64 = 1 << 20;

/// What stands between the body of a manifest and its hash, and after the hash.
const SEAL: (&str, &str) = (",\n  \"sha256\": \"", "\"\n}\n");

/// What a checkpoint says about itself, `MANIFEST.json` without its closing hash.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Optimizer steps taken; also in the name of the folder.
    pub step: u64,
    /// Every file of the folder but the manifest.
    pub files: Vec<FileEntry>,
    /// Digest of the resolved run config.
    pub config_digest: String,
    /// Digest of the data the run trains on.
    pub dataset_digest: String,
    /// What must be equal for a resume to be exact: binary, profile, features, backend, device, CPU
    /// features.
    pub fingerprint: Value,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Plain name, no folders.
    pub name: String,
    /// Bytes.
    pub length: u64,
    /// Lowercase hex.
    pub sha256: String,
}

/// The fields of a [`Manifest`] that the caller knows.
#[derive(Debug, Clone, PartialEq)]
pub struct ManifestFields {
    /// See [`Manifest::config_digest`].
    pub config_digest: String,
    /// See [`Manifest::dataset_digest`].
    pub dataset_digest: String,
    /// See [`Manifest::fingerprint`]; any serde type, through `serde_json::to_value`.
    pub fingerprint: Value,
}

/// A checkpoint that passed [`verify`], with the bytes that passed.
pub struct Verified {
    /// The folder.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// SHA-256 of `MANIFEST.json`, which `LATEST` repeats; it identifies the whole content.
    pub manifest_sha256: String,
    /// Name to content, the manifest not among them.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl fmt::Debug for Verified {
    /// Without the bytes, of which there may be gigabytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Verified");
        out.field("dir", &self.dir)
            .field("manifest", &self.manifest)
            .finish_non_exhaustive()
    }
}

/// A checkpoint, or `LATEST`, that was passed over, and why.
#[derive(Debug)]
pub struct Rejected {
    /// What was rejected.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: CheckpointError,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        let mut source = self.reason.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

/// What can go wrong with a run folder and its checkpoints.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The system refused an operation.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried: "write", "fsync", "read" ...
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },

    /// Another process, or another handle in this one, holds the lock.
    #[error("run folder {} is in use by {holder}; wait until it ends or choose another folder", run.display())]
    InUse {
        /// The run folder.
        run: PathBuf,
        /// "process 4711", or "another process" when its id cannot be read.
        holder: String,
    },

    /// The run folder holds no checkpoint at all.
    #[error("run folder {} has no checkpoint to resume; start the run without resuming", run.display())]
    NoCheckpoint {
        /// The run folder.
        run: PathBuf,
    },

    /// There are checkpoints, and every one of them was rejected.
    #[error(
        "no checkpoint in {} can be resumed ({}); put one back from a copy or start again in another folder",
        run.display(),
        rejected.iter().map(Rejected::to_string).collect::<Vec<_>>().join("; ")
    )]
    NoneValid {
        /// The run folder.
        run: PathBuf,
        /// All that was tried, newest first.
        rejected: Vec<Rejected>,
    },

    /// The name of a folder does not say which step it holds.
    #[error("{} is not named like a checkpoint, `ckpt-` and ten digits; rename it to its step or move it elsewhere", path.display())]
    Name {
        /// The folder.
        path: PathBuf,
    },

    /// A checkpoint that a resume from an earlier step has put aside.
    #[error("{} was put aside by a resume from an earlier step; to resume it, rename it back to {back}", path.display())]
    PutAside {
        /// The folder.
        path: PathBuf,
        /// Its name as a checkpoint.
        back: String,
    },

    /// Something other than a regular file or folder where one is expected.
    #[error("{} is not a {expected}; move it elsewhere", path.display())]
    Kind {
        /// The entry.
        path: PathBuf,
        /// "file" or "folder".
        expected: &'static str,
    },

    /// A file of the checkpoint is not there.
    #[error("{} is missing; the checkpoint cannot be used", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },

    /// A file the manifest does not name.
    #[error("{} does not belong to the checkpoint; move it elsewhere", path.display())]
    Extra {
        /// The file.
        path: PathBuf,
    },

    /// A file is longer or shorter than it was.
    #[error("{} is damaged: {found} bytes, expected {expected}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes when it was written.
        expected: u64,
        /// Bytes now.
        found: u64,
    },

    /// The content of a file has changed.
    #[error("{} is damaged: SHA-256 {found}, expected {expected}", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// Hash when it was written.
        expected: String,
        /// Hash now.
        found: String,
    },

    /// `MANIFEST.json` or `LATEST` has not the form it is written in.
    #[error("{} is damaged: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which part of the form is missing.
        what: &'static str,
    },

    /// A manifest whose hash is right and content is not, or a metrics line that is not one.
    #[error("unexpected JSON in {}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it fails.
        #[source]
        source: serde_json::Error,
    },

    /// Written by another version of this program.
    #[error("{} has format version {found}, this program reads {FORMAT_VERSION}; use the version that wrote it", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
    },

    /// The folder was renamed: its name says one step, its manifest another.
    #[error("{} holds step {found}; rename the folder to {}", path.display(), checkpoint_name(*found))]
    Step {
        /// The folder.
        path: PathBuf,
        /// The step in its manifest.
        found: u64,
    },

    /// `LATEST` names a folder that is not there.
    #[error("{} names {target}, which is not there; was it removed by hand?", path.display())]
    LatestGone {
        /// `LATEST`.
        path: PathBuf,
        /// The folder it names.
        target: String,
    },

    /// `LATEST` was written for another manifest than the one in the folder it names.
    #[error("{} names {target}, but was written for another content of it", path.display())]
    LatestStale {
        /// `LATEST`.
        path: PathBuf,
        /// The folder it names.
        target: String,
    },

    /// A file name that cannot be part of a checkpoint.
    #[error(
        "`{name}` cannot be a file of a checkpoint: a plain name that occurs once, other than {MANIFEST}"
    )]
    FileName {
        /// The name.
        name: String,
    },

    /// Saving a step when a later one exists would give the folder two histories.
    #[error("{} is newer than step {step}, which was to be saved; resume from it, or name the earlier checkpoint to resume from", newer.display())]
    NewerExists {
        /// The newer checkpoint.
        newer: PathBuf,
        /// The step to save.
        step: u64,
    },

    /// A checkpoint that is not one of this run folder.
    #[error("{} is not a checkpoint of run folder {}", path.display(), run.display())]
    NotInRun {
        /// The checkpoint.
        path: PathBuf,
        /// The run folder.
        run: PathBuf,
    },

    /// A line of the metrics log before its torn end.
    #[error("{} line {line} is not a JSON object with a whole number `step`; repair or delete the line", path.display())]
    MetricsLine {
        /// The log.
        path: PathBuf,
        /// From 1.
        line: usize,
    },

    /// A line that a resume from the newest checkpoint would not drop, and the run write again.
    #[error("{}: a line of step {step} comes after the checkpoint of step {saved}; log a step before saving it", path.display())]
    MetricsOrder {
        /// The log.
        path: PathBuf,
        /// The step of the line.
        step: u64,
        /// The step of the checkpoint.
        saved: u64,
    },
}

impl CheckpointError {
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Wraps what the system answered: `.map_err(io("write", &path))`.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Io {
        action,
        path,
        source,
    }
}

/// The folder name of a step.
pub fn checkpoint_name(step: u64) -> String {
    format!("ckpt-{step:010}")
}

/// The step a folder name stands for: `ckpt-N`, or `ckpt-N.old-*` for one that was being replaced.
pub(crate) fn parse_checkpoint_name(name: &str) -> Option<u64> {
    let (base, suffix) = name.split_once('.').unwrap_or((name, "old-"));
    let step = base.strip_prefix("ckpt-")?.parse().ok()?;
    (base == checkpoint_name(step) && suffix.starts_with("old-")).then_some(step)
}

/// Lowercase hex SHA-256.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(Sha256::digest(bytes).as_slice())
}

/// Writes the checkpoint of `step` and points `LATEST` to it; returns its folder.
///
/// When this returns `Ok` the checkpoint is acknowledged: it survives a power loss. When the same
/// step is already there with the same content, that folder stays as it is.
///
/// # Errors
/// A refused operation or a read-back that differs leaves every other checkpoint as it was. The new
/// one may then exist without being acknowledged, if the failure came after its rename.
pub fn write_checkpoint(
    vfs: &dyn Vfs,
    lock: &RunLock,
    step: u64,
    files: &[(&str, &[u8])],
    fields: &ManifestFields,
) -> Result<PathBuf, CheckpointError> {
    let run = lock.run();
    if let Some(newer) = run
        .checkpoints()?
        .into_iter()
        .find(|found| found.step > step)
    {
        let newer = newer.dir;
        return Err(CheckpointError::NewerExists { newer, step });
    }

    let manifest = seal(&Manifest::new(step, files, fields)?);
    let manifest_sha256 = sha256_hex(&manifest);
    let dir = run.path().join(checkpoint_name(step));
    let replaced = match examine(&dir, step, None) {
        Ok((_, existing)) if existing == manifest_sha256 => {
            // Its name may not be durable yet: the save that gave it may have been stopped there.
            vfs.sync_dir(run.path()).map_err(io("fsync", run.path()))?;
            None
        }
        _ => {
            let staging = sibling(&dir, "tmp");
            let published = stage(vfs, &staging, step, files, &manifest)
                .and_then(|()| publish(vfs, run.path(), &staging, &dir));
            if published.is_err()
                && let Err(left) = remove_tree(vfs, &staging)
            {
                warn!(error = %left, "a temporary folder is left behind, the next start removes it");
            }
            published?
        }
    };
    run.write_latest(vfs, &dir, &manifest_sha256)?;
    if let Some(old) = replaced {
        discard(vfs, run.path(), &[old])?;
    }
    debug!(step, dir = %dir.display(), "checkpoint");
    Ok(dir)
}

/// Reads a checkpoint folder and checks all of it: its name, the set of files, every length and
/// SHA-256, the manifest.
///
/// # Errors
/// The first thing found to be wrong. Any flipped bit, any truncation, any file added, missing or
/// exchanged is an error.
pub fn verify(dir: &Path) -> Result<Verified, CheckpointError> {
    let step = step_of(dir)?;
    let mut files = BTreeMap::new();
    let (manifest, manifest_sha256) = examine(dir, step, Some(&mut files))?;
    Ok(Verified {
        dir: dir.to_path_buf(),
        manifest,
        manifest_sha256,
        files,
    })
}

/// [`verify`] without keeping the bytes; returns the SHA-256 of the manifest.
pub(crate) fn check(dir: &Path) -> Result<String, CheckpointError> {
    Ok(examine(dir, step_of(dir)?, None)?.1)
}

impl Manifest {
    fn new(
        step: u64,
        files: &[(&str, &[u8])],
        fields: &ManifestFields,
    ) -> Result<Self, CheckpointError> {
        let mut names = BTreeSet::from([MANIFEST]);
        for (name, _) in files {
            let plain =
                !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
            if !plain || !names.insert(*name) {
                let name = name.to_string();
                return Err(CheckpointError::FileName { name });
            }
        }
        let entry = |(name, bytes): &(&str, &[u8])| FileEntry {
            name: name.to_string(),
            length: bytes.len() as u64,
            sha256: sha256_hex(bytes),
        };
        Ok(Self {
            format_version: FORMAT_VERSION,
            step,
            files: files.iter().map(entry).collect(),
            config_digest: fields.config_digest.clone(),
            dataset_digest: fields.dataset_digest.clone(),
            fingerprint: fields.fingerprint.clone(),
        })
    }
}

fn stage(
    vfs: &dyn Vfs,
    staging: &Path,
    step: u64,
    files: &[(&str, &[u8])],
    manifest: &[u8],
) -> Result<(), CheckpointError> {
    vfs.create_dir(staging).map_err(io("create", staging))?;
    for (name, bytes) in files.iter().copied().chain([(MANIFEST, manifest)]) {
        let path = staging.join(name);
        let file = vfs.create_file(&path, bytes).map_err(io("write", &path))?;
        vfs.sync_file(&path, &file).map_err(io("fsync", &path))?;
    }
    vfs.sync_dir(staging).map_err(io("fsync", staging))?;

    let (_, found) = examine(staging, step, None)?;
    let expected = sha256_hex(manifest);
    if found != expected {
        let path = staging.join(MANIFEST);
        return Err(CheckpointError::Checksum {
            path,
            expected,
            found,
        });
    }
    Ok(())
}

/// Gives the staged folder its name; returns where the folder that had it is now.
fn publish(
    vfs: &dyn Vfs,
    run: &Path,
    staging: &Path,
    dir: &Path,
) -> Result<Option<PathBuf>, CheckpointError> {
    let mut replaced = None;
    if fs::symlink_metadata(dir).is_ok() {
        // `LATEST` may name `dir`, which is about to be absent for a moment: better no LATEST than
        // a wrong one.
        let latest = run.join(LATEST);
        if fs::symlink_metadata(&latest).is_ok() {
            vfs.remove_file(&latest).map_err(io("remove", &latest))?;
            vfs.sync_dir(run).map_err(io("fsync", run))?;
        }
        let old = sibling(dir, "old");
        vfs.rename(dir, &old).map_err(io("rename", dir))?;
        replaced = Some(old);
    }
    vfs.rename(staging, dir).map_err(io("rename", staging))?;
    vfs.sync_dir(run).map_err(io("fsync", run))?;
    Ok(replaced)
}

fn step_of(dir: &Path) -> Result<u64, CheckpointError> {
    let resolved = match dir.file_name() {
        Some(_) => dir.to_path_buf(),
        None => fs::canonicalize(dir).map_err(io("read", dir))?, // `.` and `..` have no name
    };
    let name = resolved.file_name().and_then(|name| name.to_str());
    name.and_then(parse_checkpoint_name).ok_or_else(|| {
        let path = dir.to_path_buf();
        CheckpointError::Name { path }
    })
}

/// Checks a folder that must hold `step`, cheapest checks first; puts the bytes into `keep`.
fn examine(
    dir: &Path,
    step: u64,
    mut keep: Option<&mut BTreeMap<String, Vec<u8>>>,
) -> Result<(Manifest, String), CheckpointError> {
    let mut present = BTreeSet::new();
    for entry in list(dir)? {
        let path = entry.path();
        if !entry.file_type().map_err(io("read", &path))?.is_file() {
            let expected = "file";
            return Err(CheckpointError::Kind { path, expected });
        }
        present.insert(entry.file_name());
    }

    let path = dir.join(MANIFEST);
    if !present.remove(MANIFEST.as_ref() as &std::ffi::OsStr) {
        return Err(CheckpointError::Missing { path });
    }
    let bytes = read_at_most(&path, MANIFEST_LIMIT)?;
    let manifest = unseal(&path, &bytes)?;
    if manifest.step != step {
        let path = dir.to_path_buf();
        let found = manifest.step;
        return Err(CheckpointError::Step { path, found });
    }
    for entry in &manifest.files {
        if !present.remove(entry.name.as_ref() as &std::ffi::OsStr) {
            let path = dir.join(&entry.name);
            return Err(CheckpointError::Missing { path });
        }
    }
    if let Some(extra) = present.first() {
        let path = dir.join(extra);
        return Err(CheckpointError::Extra { path });
    }

    for entry in &manifest.files {
        let bytes = read_entry(&dir.join(&entry.name), entry, keep.is_some())?;
        if let Some(files) = keep.as_deref_mut() {
            files.insert(entry.name.clone(), bytes);
        }
    }
    Ok((manifest, sha256_hex(&bytes)))
}

/// Reads and checks one file; the bytes come back only if they are to be kept.
fn read_entry(path: &Path, entry: &FileEntry, keep: bool) -> Result<Vec<u8>, CheckpointError> {
    let file = File::open(path).map_err(io("read", path))?;
    let found = file.metadata().map_err(io("read", path))?.len();
    if found != entry.length {
        let path = path.to_path_buf();
        let expected = entry.length;
        return Err(CheckpointError::Length {
            path,
            expected,
            found,
        });
    }
    let mut bytes = Vec::new();
    if keep {
        let reserved =
            usize::try_from(found).is_ok_and(|length| bytes.try_reserve_exact(length).is_ok());
        if !reserved {
            return Err(io("read", path)(io::ErrorKind::OutOfMemory.into()));
        }
    }

    let mut file = file.take(found);
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 256 << 10];
    loop {
        let length = match file.read(&mut chunk) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            length => length.map_err(io("read", path))?,
        };
        hasher.update(&chunk[..length]);
        if keep {
            bytes.extend_from_slice(&chunk[..length]);
        }
    }
    let found = hex(hasher.finalize().as_slice());
    #[cfg(feature = "canary")]
    let found = crate::canary::checked(path, found, entry);
    if found != entry.sha256 {
        let path = path.to_path_buf();
        let expected = entry.sha256.clone();
        return Err(CheckpointError::Checksum {
            path,
            expected,
            found,
        });
    }
    Ok(bytes)
}

/// Reads a small file, refusing one that is not small before it is in memory.
pub(crate) fn read_at_most(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    read_file(path, limit).map_err(|error| match error.kind() {
        io::ErrorKind::FileTooLarge => CheckpointError::Malformed {
            path: path.to_path_buf(),
            what: "it is far longer than it was written",
        },
        _ => io("read", path)(error),
    })
}

fn seal(manifest: &Manifest) -> Vec<u8> {
    let json = serde_json::to_string_pretty(manifest)
        .expect("a struct of strings, numbers and a JSON value");
    let body = &json[..json.len() - 2]; // without the closing "\n}"
    let (before, after) = SEAL;
    format!("{body}{before}{}{after}", sha256_hex(body.as_bytes())).into_bytes()
}

fn unseal(path: &Path, bytes: &[u8]) -> Result<Manifest, CheckpointError> {
    let split = || {
        let (before, after) = SEAL;
        let text = std::str::from_utf8(bytes).ok()?.strip_suffix(after)?;
        let (body, sha256) = text.split_at_checked(text.len().checked_sub(64)?)?;
        Some((body.strip_suffix(before)?, sha256))
    };
    let Some((body, expected)) = split() else {
        let path = path.to_path_buf();
        let what = "its last line is not the SHA-256 of the rest";
        return Err(CheckpointError::Malformed { path, what });
    };
    let found = sha256_hex(body.as_bytes());
    if found != expected {
        let path = path.to_path_buf();
        let expected = expected.to_string();
        return Err(CheckpointError::Checksum {
            path,
            expected,
            found,
        });
    }

    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let json = |source| CheckpointError::Json {
        path: path.to_path_buf(),
        source,
    };
    let text = format!("{body}\n}}");
    let Version {
        format_version: found,
    } = parse_json(text.as_bytes()).map_err(json)?;
    if found != FORMAT_VERSION {
        let path = path.to_path_buf();
        return Err(CheckpointError::Version { path, found });
    }
    parse_json(text.as_bytes()).map_err(json)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
pub(crate) mod tests;
