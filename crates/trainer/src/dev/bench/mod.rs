//! `flux-lora bench`: what the numbers in docs/benchmarks.md are measured with.

mod full_size;
mod lora;
mod lora_core;
mod model;
mod ops;
mod pipeline;
mod plot;
mod quality;
mod sample;
mod scaling;
mod step;
mod trainer;

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::cli::BenchCommand;
use crate::taken::kib_field;

/// Runs one benchmark and prints its figures.
///
/// # Errors
/// An argument that does not fit, or what the measured work returns.
pub fn run(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Step(args) => step::run(args),
        BenchCommand::Ops(args) => ops::run(args),
        BenchCommand::Lora(args) => lora::run(args),
        BenchCommand::FullSize(args) => full_size::run(args),
        BenchCommand::LoraCore(args) => lora_core::run(args),
        BenchCommand::Quality(args) => quality::run(args),
        BenchCommand::Sample(args) => sample::run(args),
        BenchCommand::Scaling(args) => scaling::run(args),
        BenchCommand::Trainer(args) => trainer::run(args),
    }
}

/// What `flux-lora bench` with these arguments prints, run in a process of its own so that peak memory belongs to it.
fn in_own_process(args: &[&str]) -> anyhow::Result<String> {
    printed(
        Command::new(std::env::current_exe()?)
            .arg("bench")
            .args(args),
    )
}

/// What a command prints.
fn printed(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("start {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?} failed");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Seconds; 0 if there are none.
fn median(times: &[Duration]) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    times
        .get(times.len() / 2)
        .map_or(0.0, Duration::as_secs_f64)
}

/// Time that this process has computed, all threads together, in hundredths of a second.
fn cpu_seconds() -> anyhow::Result<f64> {
    let stat =
        std::fs::read_to_string("/proc/self/stat").context("this system tells no CPU time")?;
    let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
    let fields: Vec<f64> = fields
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    let [user, system] = [11, 12].map(|at| fields.get(at).copied().unwrap_or(0.0));
    Ok((user + system) / 100.0)
}

/// Largest resident memory of this process, where the system tells it.
fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(kib_field(&status, "VmHWM:")? >> 20)
}
