//! What can go wrong with a run folder and its checkpoints.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

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

    /// A folder with files of somebody else's.
    #[error("{} is not a run folder, but holds {holds}, and nothing of yours is to be overwritten; choose another --output, or an empty folder", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The first thing in it.
        holds: String,
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
    #[error("{} has format version {found}, this program reads {read}; use the version that wrote it", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that is read here.
        read: u32,
    },

    /// The folder was renamed: its name says one step, its manifest another.
    #[error("{} holds step {found}; rename the folder to {name}", path.display())]
    Step {
        /// The folder.
        path: PathBuf,
        /// The step in its manifest.
        found: u64,
        /// The name of a folder of that step.
        name: String,
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
        "`{name}` cannot be a file of a checkpoint: a plain name that occurs once, other than MANIFEST.json"
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
