//! The metrics log of a run: one JSON object a line, cut back on resume to what the checkpoint promises.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use lora_core::files::strict_json::parse_json;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::run::error::{CheckpointError, io};
use crate::run::folder::RunLock;
use crate::run::vfs::{Vfs, replace_file};

/// A longer line is not one of ours, which have some hundred bytes.
const LINE_LIMIT: u64 = 1 << 20;

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
    let mut log = match open_log(path) {
        Err(error) if error.is_not_found() => {
            return Ok(Truncated {
                kept: 0,
                dropped: 0,
            });
        }
        log => log?,
    };
    let stays = |line: &[u8]| metrics_step(line).is_some_and(|step| Some(step) <= resumed);
    let (mut kept, mut dropped, mut torn, mut unended) = (0, 0, None, false);
    let mut line = Vec::new();
    while next_line(&mut log, &mut line).map_err(io("read", path))? {
        if stays(&line) {
            if let Some(line) = torn {
                let path = path.to_path_buf();
                return Err(CheckpointError::MetricsLine { path, line });
            }
            kept += 1;
            unended = !line.ends_with(b"\n");
        } else {
            dropped += 1;
            if metrics_step(&line).is_none() {
                torn = torn.or(Some(kept + dropped));
            }
        }
    }
    if dropped > 0 || unended {
        replace_file(vfs, path, &|out| {
            let (mut log, mut line) = (BufReader::new(File::open(path)?), Vec::new());
            while next_line(&mut log, &mut line)? {
                if stays(&line) {
                    out.write_all(line.strip_suffix(b"\n").unwrap_or(&line))?;
                    out.write_all(b"\n")?;
                }
            }
            Ok(())
        })?;
    }
    Ok(Truncated { kept, dropped })
}

/// A log for reading; a pipe would block for ever.
fn open_log(path: &Path) -> Result<BufReader<File>, CheckpointError> {
    if !fs::metadata(path).map_err(io("read", path))?.is_file() {
        let problem = io::Error::other("it is not a regular file");
        return Err(io("read", path)(problem));
    }
    Ok(BufReader::new(File::open(path).map_err(io("read", path))?))
}

/// The next line with its end, false after the last; one that is too long to be ours comes as an empty one.
fn next_line(log: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let read = log.by_ref().take(LINE_LIMIT).read_until(b'\n', line)?;
    if read as u64 == LINE_LIMIT && !line.ends_with(b"\n") {
        log.skip_until(b'\n')?;
        line.clear();
    }
    Ok(read > 0)
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
            vfs.create_file(&path).map_err(io("create", &path))?;
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
