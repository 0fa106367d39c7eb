//! How much memory the program takes.
//!
//! Of its own: files that are mapped are not counted, whose memory the system takes back when it needs it. The one peak that the
//! system keeps has them in it, so a thread looks again and again.

use std::fs::File;
use std::io::{self, Seek};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::info;

/// Where the system says what this process takes.
const STATUS: &str = "/proc/self/status";

/// Bytes that this process has in memory and no file has, where the system tells.
pub(crate) fn own_memory() -> Option<u64> {
    of_status(&File::open(STATUS).ok()?)
}

fn of_status(status: &File) -> Option<u64> {
    kib_field(&io::read_to_string(status).ok()?, "RssAnon:")
}

/// What each phase of a run took at most, where the system tells it, and how long.
pub struct Peaks {
    phases: Vec<(&'static str, Option<u64>, Duration)>,
    began: Instant,
    /// Of this phase so far, as a thread sees it.
    most: Arc<AtomicU64>,
}

impl Peaks {
    /// Begins to measure.
    pub fn begin() -> Self {
        const INTERVAL: Duration = Duration::from_millis(20);
        let most = Arc::new(AtomicU64::new(0));
        let watched = Arc::downgrade(&most);
        let watch = move || {
            let mut status = File::open(STATUS).ok()?;
            while let Some(most) = watched.upgrade() {
                status.rewind().ok()?;
                most.fetch_max(of_status(&status)?, Ordering::Relaxed);
                drop(most);
                thread::sleep(INTERVAL);
            }
            Some(())
        };
        // Without a thread it is what is taken where phases end.
        let _watching = thread::Builder::new().name("memory".into()).spawn(watch);
        Self {
            phases: Vec::new(),
            began: Instant::now(),
            most,
        }
    }

    /// What came since the last call was `phase`, or more of it.
    pub fn end(&mut self, phase: &'static str) {
        let most = self.most.swap(0, Ordering::Relaxed);
        let (peak, took) = (own_memory().map(|now| most.max(now)), self.began.elapsed());
        match self.phases.iter_mut().find(|(name, ..)| *name == phase) {
            Some((_, most, time)) => {
                *most = peak.max(*most);
                *time += took;
            }
            None => self.phases.push((phase, peak, took)),
        }
        self.began = Instant::now();
    }

    /// Says it all.
    pub fn say(&self) {
        let phases = self.phases.iter().map(|(phase, peak, took)| {
            let peak = peak.map_or_else(|| "unknown".into(), gib);
            format!("{phase} {peak} ({:.1} s)", took.as_secs_f64())
        });
        info!(peak = phases.collect::<Vec<_>>().join(", "), "memory");
    }
}

/// A number of KiB in what the system says, in bytes.
pub(crate) fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// For people.
pub(crate) fn gib(bytes: u64) -> String {
    match bytes as f64 / (1u64 << 20) as f64 {
        mib if mib < 1000.0 => format!("{mib:.0} MiB"),
        mib => format!("{:.2} GiB", mib / 1024.0),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_seen_that_is_gone_when_its_phase_ends() {
        let mut peaks = Peaks::begin();
        let before = own_memory().expect("Linux tells");
        let most = std::hint::black_box(vec![1u8; 256 << 20]);
        thread::sleep(Duration::from_millis(500));
        drop(most);
        peaks.end("first");
        let (_, peak, _) = peaks.phases[0];
        let peak = peak.expect("Linux tells");
        // Other tests give and take at the same time.
        assert!(peak > before + (128 << 20), "{peak} after {before}");
    }
}
