//! Attacks on training runs.
//!
//! `faults --program PATH [--canary-program PATH] [--test-features F] [--quick] [--seed N] [FAULT...]` drives the program `flux-lora` as a
//! user would, breaks what it stands on, and compares what the run ends in with a run that nothing happened to: adapter,
//! moments and log of losses, byte for byte. An injection that did not fire is not counted, and too few that fired is a failure.
//!
//! | file | idea |
//! |---|---|
//! | `rig` | the tiny run, copies of it, the program; `tally`: a row of the table |
//! | `trace` | the system calls of a process, and how to make one of them fail |
//! | `kill` | `sigkill-random`, `sigkill-syscall`, `backends` |
//! | `disk` | `errno`, `disk-full`, `sync-order`, `power-loss` |
//! | `damage` | `bit-flip`, `truncation`, `fallback` |
//! | `process` | `lock`, `signals`, `clock` |
//! | `numbers` | `nan`, `nan-injected`, `out-of-memory` |
//! | `change` | `data-changed`, `settings-changed`, `threads`, `fingerprint` |
//! | `canaries` | programs with a known fault, which the suite must find |

mod canaries;
mod change;
mod damage;
mod disk;
mod kill;
mod numbers;
mod process;
mod rig;
mod tally;
mod trace;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::rig::{Options, Rig};
use crate::tally::Tally;

/// A fault by its name; the error is for a rig that does not work, not for a trial.
pub type Fault = (&'static str, fn(&Rig, &mut Tally) -> Result<()>);

/// In the order of the table.
pub const FAULTS: [Fault; 21] = [
    ("sigkill-random", kill::random),
    ("sigkill-syscall", kill::syscall),
    ("backends", kill::backends),
    ("errno", disk::errno),
    ("disk-full", disk::full),
    ("sync-order", disk::sync_order),
    ("power-loss", disk::power_loss),
    ("bit-flip", damage::bit_flip),
    ("truncation", damage::truncation),
    ("fallback", damage::fallback),
    ("lock", process::lock),
    ("signals", process::signals),
    ("clock", process::clock),
    ("nan", numbers::nan),
    ("nan-injected", numbers::nan_injected),
    ("out-of-memory", numbers::out_of_memory),
    ("data-changed", change::data),
    ("settings-changed", change::settings),
    ("threads", change::threads),
    ("fingerprint", change::fingerprint),
    ("canaries", canaries::run),
];

fn main() -> ExitCode {
    let result =
        parse(std::env::args().skip(1)).and_then(|(options, faults)| run(&options, &faults));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Options, and the faults to try; all of them if none is named.
fn parse(mut words: impl Iterator<Item = String>) -> Result<(Options, Vec<Fault>)> {
    let (mut program, mut canary_program, mut test_features) = (None, None, None);
    let (mut quick, mut seed) = (false, 2026);
    let mut faults = Vec::new();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--program" => program = Some(value()?.into()),
            "--canary-program" => canary_program = Some(value()?.into()),
            "--test-features" => test_features = Some(value()?),
            "--seed" => seed = value()?.parse().context("--seed takes a whole number")?,
            "--quick" => quick = true,
            name => match FAULTS.into_iter().find(|(known, _)| *known == name) {
                Some(fault) => faults.push(fault),
                None => bail!(
                    "`{name}` is no fault; known: {}",
                    FAULTS.map(|f| f.0).join(", ")
                ),
            },
        }
    }
    let options = Options {
        program: program.context("--program PATH is needed")?,
        canary_program,
        test_features,
        quick,
        seed,
    };
    Ok((
        options,
        if faults.is_empty() {
            FAULTS.to_vec()
        } else {
            faults
        },
    ))
}

/// Prints the table; true if nothing failed.
fn run(options: &Options, faults: &[Fault]) -> Result<bool> {
    let rig = Rig::new(options).context("the straight run")?;
    let mut rows = Vec::new();
    for (name, fault) in faults {
        rows.push((*name, watch(name, |tally| fault(&rig, tally))));
    }
    print_table(&rows);
    Ok(!rows.iter().any(|(_, tally)| tally.failed()))
}

/// Runs a fault and says on stderr how it went.
fn watch(name: &str, fault: impl FnOnce(&mut Tally) -> Result<()>) -> Tally {
    let (started, mut tally) = (Instant::now(), Tally::default());
    if let Err(error) = fault(&mut tally) {
        tally.fail(format!("{error:#}"));
    }
    let state = if tally.failed() { "FAILED" } else { "ok" };
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("{name}: {state}, {} trials, {seconds:.1} s", tally.trials);
    for failure in tally.failures() {
        eprintln!("  {failure}");
    }
    tally
}

fn print_table(rows: &[(&str, Tally)]) {
    let head = ["fault", "trials", "survived", "bit-identical", "note"].map(String::from);
    let body = rows.iter().map(|(name, tally)| {
        let mut row = tally.row(name);
        if tally.failed() {
            row[4] = format!("FAILED; {}", row[4]);
        }
        row
    });
    let rows: Vec<[String; 5]> = std::iter::once(head).chain(body).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..4).map(width).collect();
    for [fault, trials, survived, identical, note] in &rows {
        println!(
            "{fault:<0$} | {trials:>1$} | {survived:>2$} | {identical:>3$} | {note}",
            widths[0], widths[1], widths[2], widths[3]
        );
    }
}
