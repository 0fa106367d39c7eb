//! What is seen of a long job: a bar on a terminal, now and then a line elsewhere, an event a step for programs.
//!
//! Everything goes through `tracing`, so whoever sets up the subscriber decides what is shown: bars are drawn where the
//! target [`BARS`] is on and stderr is a terminal, events are sent to [`EVENTS`].

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing::{Level, info};

use crate::run::timings::Timing;

/// Target of bars, and of the lines that stand for them.
pub const BARS: &str = "flux_lora::bars";
/// Target of events for programs: numbers are numbers, nothing is rounded.
pub const EVENTS: &str = "flux_lora::events";

/// Between two lines about a job that is no training run.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress of a job of so many items.
pub struct Bar {
    bar: ProgressBar,
    what: &'static str,
    lines: bool,
    last_line: Cell<Instant>,
}

/// A bar of `length` items named `what`.
pub fn bar(what: &'static str, length: u64) -> Bar {
    let (lines, bar) = drawn(what, length);
    if lines {
        info!(target: BARS, count = length, "{what}");
    }
    Bar {
        bar,
        what,
        lines,
        last_line: Cell::new(Instant::now()),
    }
}

/// A bar of `length` bytes named `what`.
pub fn bytes_bar(what: &'static str, length: u64) -> Bar {
    let bar = bar(what, length);
    let style = ProgressStyle::with_template(
        "{prefix} {bar:20} {bytes}/{total_bytes} {bytes_per_sec} {eta_precise}",
    );
    bar.bar
        .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

impl Bar {
    /// So many more items are done.
    pub fn inc(&self, items: u64) {
        self.bar.inc(items);
        let (done, of) = (self.bar.position(), self.bar.length());
        info!(target: EVENTS, event = "progress", what = self.what, done, of);
        if self.lines && self.last_line.get().elapsed() >= LINE_EVERY {
            self.last_line.set(Instant::now());
            info!(target: BARS, done, of, "{}", self.what);
        }
    }

    /// Takes the bar away.
    pub fn finish_and_clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// The bar that is drawn, if one is.
static DRAWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Stderr, but what is written stands above the bar and not in it.
pub(crate) struct AboveBar;

impl Write for AboveBar {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let write = || io::stderr().write_all(bytes).map(|()| bytes.len());
        let bar = DRAWN.lock().ok().and_then(|bar| bar.clone());
        match bar.filter(|bar| !bar.is_finished()) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Whether lines stand for a bar, and the bar, which is not drawn then.
fn drawn(what: &'static str, length: u64) -> (bool, ProgressBar) {
    let on = tracing::enabled!(target: BARS, Level::INFO);
    let terminal = std::io::stderr().is_terminal();
    let target = match on && terminal {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style =
        ProgressStyle::with_template("{prefix} {bar:10} {pos}/{len} {eta_precise} {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(length), target)
        .with_style(style)
        .with_prefix(what);
    if let Ok(mut drawn) = DRAWN.lock() {
        *drawn = Some(bar.clone());
    }
    (on && !terminal, bar)
}

/// Progress of a training run.
pub struct TrainReport {
    bar: ProgressBar,
    steps: u64,
    lines: bool,
    mean_loss: Option<f64>,
    mean_seconds: Option<f64>,
    /// What is behind the bar, but for what is done between two steps.
    numbers: String,
}

impl TrainReport {
    /// A run of `steps` steps of which `done` are done.
    pub fn new(done: u64, steps: u64) -> Self {
        let (lines, bar) = drawn("train", steps);
        bar.set_position(done);
        bar.reset_eta();
        Self {
            bar,
            steps,
            lines,
            mean_loss: None,
            mean_seconds: None,
            numbers: String::new(),
        }
    }

    /// One more step.
    pub fn step(&mut self, loss: f64, grad_norm: f64, lr: f64, timing: &Timing) {
        let seconds = timing.seconds.unwrap_or_default();
        let smooth = |mean: Option<f64>, value| mean.map_or(value, |mean| 0.9 * mean + 0.1 * value);
        let mean_loss = *self.mean_loss.insert(smooth(self.mean_loss, loss));
        let mean_seconds = *self.mean_seconds.insert(smooth(self.mean_seconds, seconds));
        let step = timing.step;
        let left_s = mean_seconds * (self.steps - step) as f64;
        let memory = timing.memory_mb.map(|mb| shown((mb * 1e6) as u64));
        self.bar.set_position(step);
        // In this order, for a narrow terminal shows the beginning alone.
        self.numbers = format!(
            "loss {mean_loss:.4} {seconds:.2} s/step lr {lr:.2e} {}",
            memory.as_deref().unwrap_or_default()
        );
        self.bar.set_message(self.numbers.clone());
        info!(
            target: EVENTS,
            event = "step", step, of = self.steps, loss, mean_loss, grad_norm, lr, seconds, left_s,
            memory_mb = timing.memory_mb
        );
        let every = (self.steps / 20).max(1);
        if self.lines && (step.is_multiple_of(every) || step == self.steps) {
            info!(
                target: BARS,
                step,
                of = self.steps,
                loss = format!("{loss:.4}"),
                mean_loss = format!("{mean_loss:.4}"),
                lr = format!("{lr:.2e}"),
                s_per_step = format!("{seconds:.2}"),
                left_s = left_s.round() as u64,
                memory,
                "train"
            );
        }
    }

    /// Says what is done between two steps, which takes its time.
    pub fn doing(&self, what: &str) {
        self.bar.set_message(what.to_string());
        info!(target: EVENTS, event = "doing", what, step = self.bar.position());
    }

    /// Leaves the bar of a run that has come to its end, and takes that of another away.
    pub fn finish(&self) {
        if self.bar.position() < self.steps {
            return self.bar.finish_and_clear();
        }
        self.bar.abandon_with_message(self.numbers.clone());
    }
}

/// Bytes for people.
pub(crate) fn shown(bytes: u64) -> String {
    match bytes {
        0..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
