//! What a person sees of a long job: a bar on a terminal, now and then a line elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tracing::info;

/// A bar of `length` items named `what`; invisible where stderr is no terminal.
pub fn bar(what: &str, length: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        info!(count = length, "{what}");
    }
    let style = ProgressStyle::with_template("{prefix:>16} {bar:30} {pos}/{len} {eta} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length)
        .with_style(style)
        .with_prefix(what.to_string())
}

/// Progress of a training run.
pub struct TrainReport {
    bar: ProgressBar,
    steps: u64,
    /// Lines instead of a bar.
    lines: bool,
    mean_loss: Option<f64>,
}

impl TrainReport {
    /// A run of `steps` steps of which `done` are done.
    pub fn new(done: u64, steps: u64) -> Self {
        let bar = bar("train", steps).with_position(done);
        bar.reset_eta();
        Self {
            bar,
            steps,
            lines: !std::io::stderr().is_terminal(),
            mean_loss: None,
        }
    }

    /// One more step.
    pub fn step(&mut self, step: u64, loss: f64, lr: f64, took: Duration) {
        let mean_loss = self.mean_loss.map_or(loss, |mean| 0.9 * mean + 0.1 * loss);
        self.mean_loss = Some(mean_loss);
        let seconds = took.as_secs_f64();
        self.bar.set_position(step);
        self.bar.set_message(format!(
            "loss {loss:.4} (mean {mean_loss:.4}) lr {lr:.2e} {seconds:.2} s/step"
        ));
        let every = (self.steps / 20).max(1);
        if self.lines && (step.is_multiple_of(every) || step == self.steps) {
            let left = Duration::from_secs_f64(seconds * (self.steps - step) as f64);
            info!(
                step,
                of = self.steps,
                loss = format!("{loss:.4}"),
                mean_loss = format!("{mean_loss:.4}"),
                lr = format!("{lr:.2e}"),
                s_per_step = format!("{seconds:.2}"),
                left_s = left.as_secs(),
                "train"
            );
        }
    }

    /// Runs `f` while the bar is out of the way.
    pub fn suspend<T>(&self, f: impl FnOnce() -> T) -> T {
        self.bar.suspend(f)
    }

    /// Leaves the bar as it is.
    pub fn finish(&self) {
        self.bar.abandon();
    }
}
