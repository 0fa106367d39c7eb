//! `timings.jsonl`: what a run took, which no resume could write again in the same bits. One JSON object a line, each with
//! its `step`; cut back with the metrics log, and never in the way of a run: a log that cannot be read is begun anew.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lora_core::files::strict_json::parse_json;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::run::metrics::truncate_metrics;
use crate::run::vfs::Vfs;
use crate::taken::own_memory;

/// A line of the log: a step, or the start of a part of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Steps done.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// What the step took, in seconds, saving and previews aside; `None` in a start's line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// In how many of them it waited for its data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waited: Option<f64>,
    /// Memory of the program after the step, mapped files not counted, in megabytes, where the system tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<f64>,
    /// Device of the part of the run that starts after `step` steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_on: Option<String>,
}

impl Timing {
    /// A step that is just done, in which nothing was computed while it `waited`.
    pub fn of_step(step: u64, took: Duration, waited: Duration) -> Self {
        Self {
            step,
            time: unix_time(),
            seconds: Some(took.as_secs_f64()),
            waited: Some(waited.as_secs_f64()),
            memory_mb: own_memory().map(|bytes| (bytes as f64 / 1e3).round() / 1e3),
            started_on: None,
        }
    }

    /// A run, or the rest of one, that begins after `step` steps.
    pub fn of_start(step: u64, device: &str) -> Self {
        Self {
            step,
            time: unix_time(),
            seconds: None,
            waited: None,
            memory_mb: None,
            started_on: Some(device.into()),
        }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// All lines of a log that can be read; none where there is no log.
pub fn read_timings(path: &Path) -> Vec<Timing> {
    let text = fs::read(path).unwrap_or_default();
    let lines = text.split(|&byte| byte == b'\n');
    lines.filter_map(|line| parse_json(line).ok()).collect()
}

/// The log, open for appending.
#[derive(Debug)]
pub(crate) struct TimingLog {
    path: PathBuf,
    /// `None` after a failure, which was told.
    file: Option<File>,
}

impl TimingLog {
    /// Opens the log of a run resumed from step `resumed`, or of one that begins.
    pub(crate) fn open(vfs: &dyn Vfs, path: PathBuf, resumed: Option<u64>) -> Self {
        if let Err(error) = truncate_metrics(vfs, &path, resumed) {
            warn!("{error}: the times of this run are written anew");
            let _ = fs::remove_file(&path);
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|error| give_up(&path, &error)).ok();
        Self { path, file }
    }

    /// Appends a line.
    pub(crate) fn append(&mut self, timing: &Timing) {
        let Some(file) = &mut self.file else { return };
        let written = serde_json::to_string(timing)
            .map_err(std::io::Error::from)
            .and_then(|line| file.write_all(format!("{line}\n").as_bytes()));
        if let Err(error) = written {
            give_up(&self.path, &error);
            self.file = None;
        }
    }
}

fn give_up(path: &Path, error: &std::io::Error) {
    warn!(
        "write {}: {error}; the times of this run are lost from here on",
        path.display()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::vfs::RealFs;

    #[test]
    fn a_resume_keeps_the_times_up_to_its_checkpoint_and_where_it_started() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("timings.jsonl");
        let mut log = TimingLog::open(&RealFs, path.clone(), None);
        log.append(&Timing::of_start(0, "flex"));
        for step in 1..=4 {
            log.append(&Timing::of_step(
                step,
                Duration::from_millis(250),
                Duration::ZERO,
            ));
        }
        let mut log = TimingLog::open(&RealFs, path.clone(), Some(2));
        log.append(&Timing::of_start(2, "flex"));
        log.append(&Timing::of_step(
            3,
            Duration::from_millis(500),
            Duration::ZERO,
        ));
        let lines = read_timings(&path);
        let steps: Vec<u64> = lines.iter().map(|line| line.step).collect();
        assert_eq!(steps, [0, 1, 2, 2, 3]);
        assert_eq!(lines[3].started_on.as_deref(), Some("flex"));
        assert_eq!(lines[4].seconds, Some(0.5));
        assert!(lines[4].time > 1.7e9, "seconds since 1970");
    }

    #[test]
    fn a_damaged_log_does_not_stop_a_run() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("timings.jsonl");
        fs::write(&path, "nonsense\n{\"step\":1,\"time\":1.0}\n").expect("writable");
        let mut log = TimingLog::open(&RealFs, path.clone(), Some(5));
        log.append(&Timing::of_step(6, Duration::ZERO, Duration::ZERO));
        assert_eq!(read_timings(&path).len(), 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_in_megabytes() {
        let step = Timing::of_step(6, Duration::ZERO, Duration::ZERO);
        let memory = step.memory_mb.expect("Linux tells");
        assert!((2.0..100_000.0).contains(&memory), "{memory}");
    }
}
