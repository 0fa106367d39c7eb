//! The metrics log of a run: one JSON object a line, cut back on resume to what the checkpoint promises.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use lora_core::files::strict_json::{parse_json, read_file};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::run::error::{CheckpointError, io};
use crate::run::folder::RunLock;
use crate::run::vfs::{Vfs, replace_file};

/// A metrics log larger than this is not one of ours: some ten million lines.
const METRICS_LIMIT: u64 = 4 << 30;

/// What [`truncate_metrics`] did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truncated {
    /// Lines that stay.
    pub kept: usize,
    /// Lines that went, a torn one at the end included.
    pub dropped: usize,
}

/// Cuts the metrics log back to what a run resumed from step `resumed` has written: lines of later
/// steps go, and so does a torn end. With `None`, for a run that begins, all go. A log that does
/// not exist is an empty one.
///
/// # Errors
/// An unreadable line with lines that stay after it. A stopped write cannot leave that, so it is
/// not ours to drop.
pub fn truncate_metrics(
    vfs: &dyn Vfs,
    path: &Path,
    resumed: Option<u64>,
) -> Result<Truncated, CheckpointError> {
    let text = match read_file(path, METRICS_LIMIT) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(Truncated {
                kept: 0,
                dropped: 0,
            });
        }
        text => text.map_err(io("read", path))?,
    };
    let mut kept = Vec::new();
    let mut torn = None;
    let mut dropped = 0;
    for (index, line) in text.split_inclusive(|byte| *byte == b'\n').enumerate() {
        match metrics_step(line) {
            Some(step) if Some(step) <= resumed => {
                if let Some(line) = torn {
                    let path = path.to_path_buf();
                    return Err(CheckpointError::MetricsLine { path, line });
                }
                kept.push(line.strip_suffix(b"\n").unwrap_or(line));
                continue;
            }
            Some(_) => {}
            None => torn = torn.or(Some(index + 1)),
        }
        dropped += 1;
    }
    let bytes: Vec<u8> = kept
        .iter()
        .flat_map(|line| line.iter().chain(b"\n"))
        .copied()
        .collect();
    if bytes != text {
        replace_file(vfs, path, &bytes)?;
    }
    let kept = kept.len();
    Ok(Truncated { kept, dropped })
}

/// The metrics log of a run, open for appending.
///
/// A line is safe from a power loss only after [`MetricsLog::sync`]; [`save`](crate::run::transaction::save) calls it.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    length: u64,
    /// The step of the newest checkpoint: lines up to it are final.
    saved: Option<u64>,
}

impl MetricsLog {
    /// Opens the log of a run resumed from step `resumed`, or of one that begins, after
    /// [`truncate_metrics`]. The lock proves that nobody else appends.
    pub fn open(
        vfs: &dyn Vfs,
        lock: &RunLock,
        resumed: Option<u64>,
    ) -> Result<Self, CheckpointError> {
        let path = lock.run().metrics_path();
        let Truncated { kept, dropped } = truncate_metrics(vfs, &path, resumed)?;
        debug!(path = %path.display(), resumed, kept, dropped, "metrics log");
        if !path.exists() {
            let run = lock.run().path();
            vfs.create_file(&path, b"").map_err(io("create", &path))?;
            // Otherwise a power loss could leave a checkpoint without its log.
            vfs.sync_dir(run).map_err(io("fsync", run))?;
        }
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(io("open", &path))?;
        let length = file.metadata().map_err(io("read", &path))?.len();
        Ok(Self {
            path,
            file,
            length,
            saved: resumed,
        })
    }

    /// Appends one line, an object with a field `step`, which must be later than the newest
    /// checkpoint: a resume from that one would keep the line and the run write it again.
    pub fn append(&mut self, vfs: &dyn Vfs, line: &impl Serialize) -> Result<(), CheckpointError> {
        self.check_length()?;
        let json = |source| CheckpointError::Json {
            path: self.path.clone(),
            source,
        };
        let mut text = serde_json::to_string(line).map_err(json)?;
        let MetricsStep { step } = serde_json::from_str(&text).map_err(json)?;
        if let Some(saved) = self.saved.filter(|saved| step <= *saved) {
            let path = self.path.clone();
            return Err(CheckpointError::MetricsOrder { path, step, saved });
        }
        text.push('\n');
        if let Err(source) = vfs.append(&self.path, &self.file, text.as_bytes()) {
            // A part of the line may be there. If it cannot be taken back, the next call notices.
            if let Err(error) = self.file.set_len(self.length) {
                warn!(path = %self.path.display(), %error, "a torn line stays until the next resume");
            }
            return Err(io("write", &self.path)(source));
        }
        self.length += text.len() as u64;
        Ok(())
    }

    /// Notes that the checkpoint of `step` is acknowledged: lines up to it are final.
    pub(crate) fn saved(&mut self, step: u64) {
        self.saved = Some(step);
    }

    /// Makes every line so far survive a power loss.
    pub fn sync(&mut self, vfs: &dyn Vfs) -> Result<(), CheckpointError> {
        self.check_length()?;
        vfs.sync_file(&self.path, &self.file)
            .map_err(io("fsync", &self.path))
    }

    fn check_length(&self) -> Result<(), CheckpointError> {
        let found = self.file.metadata().map_err(io("read", &self.path))?.len();
        if found != self.length {
            let path = self.path.clone();
            let expected = self.length;
            return Err(CheckpointError::Length {
                path,
                expected,
                found,
            });
        }
        Ok(())
    }
}

/// The one field of a metrics line that is read here.
#[derive(Deserialize)]
struct MetricsStep {
    step: u64,
}

fn metrics_step(line: &[u8]) -> Option<u64> {
    parse_json::<MetricsStep>(line).ok().map(|line| line.step)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;
