//! `MANIFEST.json`: what a checkpoint folder must hold, and whether it does.
//!
//! Decisions:
//! - `MANIFEST.json` names every other file with its length and SHA-256, and ends with the SHA-256
//!   of itself: the hash of all bytes before the comma that ends the line above it, as in
//!   `head -c -83 MANIFEST.json | sha256sum`. So one flipped bit anywhere, white space included, is
//!   found without trusting that JSON comes out of a parser as it went in.
//! - [`verify`] reads every file in pieces and keeps none. Whoever parses a file asks for its digest
//!   again afterwards ([`Verified::check`]), so what was parsed is what was verified.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use lora_core::files::digest::{digest_file, sha256_hex};
use lora_core::files::strict_json::{parse_json, read_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::run::error::{CheckpointError, io};
use crate::run::vfs::list;

/// The file that makes a folder a checkpoint.
pub const MANIFEST: &str = "MANIFEST.json";

/// The manifest layout written here, and the only one read.
pub const FORMAT_VERSION: u32 = 2;

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

/// A checkpoint that passed [`verify`].
#[derive(Debug, Clone)]
pub struct Verified {
    /// The folder.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// SHA-256 of `MANIFEST.json`, which `LATEST` repeats; it identifies the whole content.
    pub manifest_sha256: String,
}

impl Verified {
    /// Where a file of the checkpoint is.
    ///
    /// # Errors
    /// The checkpoint has no such file.
    pub fn path(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        let path = self.dir.join(name);
        match self.manifest.files.iter().any(|entry| entry.name == name) {
            true => Ok(path),
            false => Err(CheckpointError::Missing { path }),
        }
    }

    /// Compares the files once more with their SHA-256: to be asked after something was parsed from them.
    ///
    /// # Errors
    /// A file that was changed since it was verified.
    pub fn check(&self) -> Result<(), CheckpointError> {
        let files = self.manifest.files.iter();
        files
            .map(|entry| (self.dir.join(&entry.name), entry))
            .try_for_each(|(path, entry)| check_entry(&path, &path, entry))
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

/// Reads a checkpoint folder and checks all of it: its name, the set of files, every length and
/// SHA-256, the manifest.
///
/// # Errors
/// The first thing found to be wrong. Any flipped bit, any truncation, any file added, missing or
/// exchanged is an error.
pub fn verify(dir: &Path) -> Result<Verified, CheckpointError> {
    let (manifest, manifest_sha256) = examine(dir, dir, step_of(dir)?)?;
    Ok(Verified {
        dir: dir.to_path_buf(),
        manifest,
        manifest_sha256,
    })
}

impl Manifest {
    pub(crate) fn new(step: u64, files: Vec<FileEntry>, fields: &ManifestFields) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            step,
            files,
            config_digest: fields.config_digest.clone(),
            dataset_digest: fields.dataset_digest.clone(),
            fingerprint: fields.fingerprint.clone(),
        }
    }
}

/// Checks that files of these names can make a checkpoint.
pub(crate) fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), CheckpointError> {
    let mut seen = BTreeSet::from([MANIFEST]);
    for name in names {
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
        if !plain || !seen.insert(name) {
            let name = name.to_string();
            return Err(CheckpointError::FileName { name });
        }
    }
    Ok(())
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

/// Checks a folder that must hold `step`, cheapest checks first; its manifest, and the SHA-256 of that. Errors name
/// `shown`, the folder it is to be.
pub(crate) fn examine(
    dir: &Path,
    shown: &Path,
    step: u64,
) -> Result<(Manifest, String), CheckpointError> {
    let mut present = BTreeSet::new();
    for entry in list(dir)? {
        let path = shown.join(entry.file_name());
        if !entry.file_type().map_err(io("read", &path))?.is_file() {
            let expected = "file";
            return Err(CheckpointError::Kind { path, expected });
        }
        present.insert(entry.file_name());
    }

    let path = shown.join(MANIFEST);
    if !present.remove(MANIFEST.as_ref() as &std::ffi::OsStr) {
        return Err(CheckpointError::Missing { path });
    }
    let bytes = read_at_most(&dir.join(MANIFEST), &path, MANIFEST_LIMIT)?;
    let manifest = unseal(&path, &bytes)?;
    if manifest.step != step {
        return Err(CheckpointError::Step {
            path: shown.to_path_buf(),
            found: manifest.step,
            name: checkpoint_name(manifest.step),
        });
    }
    for entry in &manifest.files {
        if !present.remove(entry.name.as_ref() as &std::ffi::OsStr) {
            let path = shown.join(&entry.name);
            return Err(CheckpointError::Missing { path });
        }
    }
    if let Some(extra) = present.first() {
        let path = shown.join(extra);
        return Err(CheckpointError::Extra { path });
    }
    for entry in &manifest.files {
        check_entry(&dir.join(&entry.name), &shown.join(&entry.name), entry)?;
    }
    Ok((manifest, sha256_hex(&bytes)))
}

/// Reads one file in pieces and compares it with what it was written as.
fn check_entry(path: &Path, shown: &Path, entry: &FileEntry) -> Result<(), CheckpointError> {
    let found = fs::metadata(path).map_err(io("read", shown))?.len();
    if found != entry.length {
        return Err(CheckpointError::Length {
            path: shown.to_path_buf(),
            expected: entry.length,
            found,
        });
    }
    let found = digest_file(path).map_err(io("read", shown))?;
    #[cfg(feature = "canary")]
    let found = crate::canary::checked(path, found, &entry.sha256);
    if found != entry.sha256 {
        return Err(CheckpointError::Checksum {
            path: shown.to_path_buf(),
            expected: entry.sha256.clone(),
            found,
        });
    }
    Ok(())
}

/// Reads a small file, refusing one that is not small before it is in memory.
pub(crate) fn read_at_most(
    path: &Path,
    shown: &Path,
    limit: u64,
) -> Result<Vec<u8>, CheckpointError> {
    read_file(path, limit).map_err(|error| match error.kind() {
        ErrorKind::FileTooLarge => CheckpointError::Malformed {
            path: shown.to_path_buf(),
            what: "it is far longer than it was written",
        },
        _ => io("read", shown)(error),
    })
}

pub(crate) fn seal(manifest: &Manifest) -> Vec<u8> {
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
        return Err(CheckpointError::Version {
            path: path.to_path_buf(),
            found,
            read: FORMAT_VERSION,
        });
    }
    parse_json(text.as_bytes()).map_err(json)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;
