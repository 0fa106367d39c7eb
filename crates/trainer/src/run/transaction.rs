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
//! - A valid checkpoint is never overwritten in place. Saving a step again with other content (a
//!   resumed run recorded a new learning rate, say) moves the old folder to `ckpt-N.old-<pid>-<n>`,
//!   where it can still be resumed, until the new one is acknowledged.

use std::fs;
use std::path::{Path, PathBuf};

use tracing::{debug, warn};

use crate::run::error::{CheckpointError, io};
use crate::run::folder::{LATEST, RunLock};
use crate::run::manifest::{
    FileEntry, MANIFEST, Manifest, ManifestFields, check_names, checkpoint_name, examine, seal,
};
use crate::run::metrics::MetricsLog;
use crate::run::vfs::{
    Content, Summary, Vfs, discard, remove_tree, sibling, summarize, write_file,
};

/// The files of a checkpoint, each with what writes it.
pub type Files<'a> = &'a [(&'a str, Content<'a>)];

/// One whole save: the metrics log up to here, the checkpoint, `LATEST`, and only then what need
/// not stay any more.
///
/// The log comes first because a checkpoint promises the lines up to its step.
pub fn save(
    vfs: &dyn Vfs,
    lock: &RunLock,
    metrics: &mut MetricsLog,
    step: u64,
    files: Files,
    fields: &ManifestFields,
    keep: usize,
) -> Result<PathBuf, CheckpointError> {
    metrics.sync(vfs)?;
    let dir = write_checkpoint(vfs, lock, step, files, fields)?;
    metrics.saved(step);
    lock.prune(vfs, keep)?;
    Ok(dir)
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
    files: Files,
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
    check_names(files.iter().map(|(name, _)| *name))?;

    let dir = run.path().join(checkpoint_name(step));
    let (manifest_sha256, replaced) = match is_there(&dir, step, files, fields)? {
        Some(manifest_sha256) => {
            // Its name may not be durable yet: the save that gave it may have been stopped there.
            vfs.sync_dir(run.path()).map_err(io("fsync", run.path()))?;
            (manifest_sha256, None)
        }
        None => {
            let staging = sibling(&dir, "tmp");
            let published = stage(vfs, &staging, &dir, step, files, fields)
                .and_then(|sha256| Ok((sha256, publish(vfs, run.path(), &staging, &dir)?)));
            if published.is_err()
                && let Err(left) = remove_tree(vfs, &staging)
            {
                warn!(error = %left, "a temporary folder is left behind, the next start removes it");
            }
            published?
        }
    };
    lock.note_whole(&dir);
    run.write_latest(vfs, &dir, &manifest_sha256)?;
    if let Some(old) = replaced {
        discard(vfs, run.path(), &[old])?;
    }
    debug!(step, dir = %dir.display(), "checkpoint");
    Ok(dir)
}

/// The SHA-256 of the manifest, if `dir` already is the checkpoint that is to be written.
fn is_there(
    dir: &Path,
    step: u64,
    files: Files,
    fields: &ManifestFields,
) -> Result<Option<String>, CheckpointError> {
    let Ok((existing, sha256)) = examine(dir, dir, step) else {
        return Ok(None);
    };
    let mut entries = Vec::new();
    for (name, content) in files {
        let summary = summarize(content).map_err(io("write", &dir.join(name)))?;
        entries.push(entry(name, summary));
    }
    Ok((existing == Manifest::new(step, entries, fields)).then_some(sha256))
}

fn entry(name: &str, summary: Summary) -> FileEntry {
    FileEntry {
        name: name.to_string(),
        length: summary.length,
        sha256: summary.sha256,
    }
}

/// Writes the folder under a temporary name, reads all of it back, and returns the SHA-256 of its manifest; errors name
/// the folder it is to be.
fn stage(
    vfs: &dyn Vfs,
    staging: &Path,
    dir: &Path,
    step: u64,
    files: Files,
    fields: &ManifestFields,
) -> Result<String, CheckpointError> {
    vfs.create_dir(staging).map_err(io("create", dir))?;
    let write = |name: &str, content: Content| {
        write_file(vfs, &staging.join(name), &dir.join(name), content)
    };
    let mut entries = Vec::new();
    for (name, content) in files {
        entries.push(entry(name, write(name, content)?));
    }
    let manifest = seal(&Manifest::new(step, entries, fields));
    let expected = write(MANIFEST, &|out| out.write_all(&manifest))?.sha256;
    vfs.sync_dir(staging).map_err(io("fsync", dir))?;

    let (_, found) = examine(staging, dir, step)?;
    if found != expected {
        return Err(CheckpointError::Checksum {
            path: dir.join(MANIFEST),
            expected,
            found,
        });
    }
    Ok(expected)
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
    vfs.rename(staging, dir).map_err(io("create", dir))?;
    vfs.sync_dir(run).map_err(io("fsync", run))?;
    Ok(replaced)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;
