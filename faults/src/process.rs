//! Other processes, signals and clocks.

use std::fs::{self, File};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use crate::rig::{EVERY_STEP, Process, Rig, STEPS, checkpoint, installed, lines};
use crate::tally::{Tally, Trial};

const AT_ONCE: usize = 50;

/// Fifty processes started at once on one folder: one runs. Then lock files that dead processes left.
pub fn lock(rig: &Rig, tally: &mut Tally) -> Result<()> {
    tally.count_as(AT_ONCE, "started at once", fifty(rig));
    let this = format!("{}\n", std::process::id());
    for left in [
        "",
        "1\n",
        "4194304\n",
        &this,
        "not a number",
        "99999999999999999999\nmore",
    ] {
        let trial = (|| {
            let run = rig.run_near_end()?;
            fs::write(run.join("run.lock"), left)?;
            rig.finish(&run)
        })();
        tally.count(format!("lock file with {left:?}"), trial);
    }
    tally.expect(AT_ONCE + 6);
    tally.note = format!("{AT_ONCE} at once, one ran; 6 stale lock files, one of a living process");
    Ok(())
}

fn fifty(rig: &Rig) -> Result<Trial> {
    let run = rig.run_at(&[STEPS / 2])?;
    let slow = ["--resume", "--set", "checkpoint.every=1"];
    let mut processes = (0..AT_ONCE)
        .map(|_| Process::start(rig.train(&run, &slow)))
        .collect::<Result<Vec<_>>>()?;
    let started = Instant::now();
    // The one that has the lock stands still while the others wait for it, so that it cannot end first.
    let mut winner = None;
    while processes.len() > 1 {
        if winner.is_none() {
            let holder = fs::read_to_string(run.join("run.lock"))?;
            winner = processes
                .iter()
                .map(Process::id)
                .find(|id| holder == format!("{id}\n"));
            winner.map_or(Ok(()), |id| signal("STOP", id))?;
        }
        ensure!(
            started.elapsed() < Duration::from_secs(300),
            "{} processes run",
            processes.len()
        );
        for i in (0..processes.len()).rev() {
            if !processes[i].is_running()? {
                processes.swap_remove(i).wait()?.refused(&["in use by"])?;
            }
        }
    }
    let Some(winner) = processes.pop() else {
        bail!("nobody ran");
    };
    signal("CONT", winner.id())?;
    winner.wait()?.ok()?;
    rig.compare(&run)
}

/// Sends a signal; that nobody is there is no error.
fn signal(name: &str, process: u32) -> Result<()> {
    let mut kill = Command::new("kill");
    kill.args([&format!("-{name}"), &process.to_string()]);
    Process::start(kill)?.wait()?;
    Ok(())
}

/// A run stopped by SIGINT and SIGTERM again and again, then by two signals at once.
pub fn signals(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let single = rig.count(10, 100);
    let no_saves = ["--resume", "--set", "checkpoint.every=1000"];
    let mut run = rig.fresh("run");
    let mut pending = 0;
    for attempt in 0..20 * single {
        if tally.trials + pending >= single {
            break;
        }
        let name = ["INT", "TERM"][attempt % 2];
        match stop(rig, &run, &no_saves, name) {
            Ok(Stopped::Saved) => pending += 1,
            Ok(Stopped::Finished) => {
                tally.count_as(pending, "stopped runs", rig.compare(&run));
                (run, pending) = (rig.fresh("run"), 0);
            }
            Err(error) => {
                tally.count(format!("SIG{name}"), Err(error));
                run = rig.fresh("run");
            }
        }
    }
    tally.count_as(pending, "the last stopped run", rig.finish(&run));
    tally.expect(single);

    let (double, before) = (rig.count(3, 20), tally.trials);
    for _ in 0..20 * double {
        if tally.trials == before + double {
            break;
        }
        tally.count("a second signal", abort(rig));
    }
    tally.expect(before + double);
    tally.note =
        format!("{single} saved and gone within a step, {double} aborted by a second signal");
    Ok(())
}

enum Stopped {
    Saved,
    Finished,
}

/// Waits for a random moment of the loop, signals, and checks that the step was finished, saved, and nothing else done.
fn stop(rig: &Rig, run: &std::path::Path, args: &[&str], signal: &str) -> Result<Stopped> {
    let mut process = Process::start(rig.train(run, args))?;
    let wanted = lines(run) + rig.below(5) as usize;
    let status = format!("/proc/{}/status", process.id());
    let in_loop = process.wait_until(|| catches(&status) && lines(run) >= wanted)?;
    std::thread::sleep(Duration::from_micros(rig.below(20_000)));
    if in_loop {
        self::signal(signal, process.id())?; // does nothing if the process has just ended
    }
    let at_signal = lines(run) as u64;
    let ended = process.wait()?.ok()?;
    if run.join("lora.safetensors").is_file() {
        return Ok(Stopped::Finished);
    }
    ensure!(
        ended.out.contains("stopped after step"),
        "it did not say that it stopped"
    );
    let newest = rig.newest_step(run)?.context("nothing was saved")?;
    ensure!(
        lines(run) as u64 == newest,
        "the log and the checkpoint disagree"
    );
    ensure!(
        newest <= at_signal + 1,
        "stopped {} steps later",
        newest - at_signal
    );
    Ok(Stopped::Saved)
}

/// Whether a process has its handlers for SIGINT and SIGTERM; before that, a signal is a kill like any other.
fn catches(status: &str) -> bool {
    let text = fs::read_to_string(status).unwrap_or_default();
    let mask = text.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 0x4002 == 0x4002)
}

/// SIGINT, and SIGTERM at once: gone without a save, and the run goes on from the checkpoint before.
fn abort(rig: &Rig) -> Result<Trial> {
    let run = rig.run_at(&[STEPS / 2])?;
    let mut process = Process::start(rig.train(&run, &["--resume"]))?;
    let status = format!("/proc/{}/status", process.id());
    // Two lines more than the checkpoint's: the log of a copy is one ahead.
    process.wait_until(|| catches(&status) && lines(&run) >= STEPS as usize / 2 + 2)?;
    let both = format!("kill -INT {0}; kill -TERM {0}", process.id());
    let mut shell = Command::new("sh");
    shell.args(["-c", &both]);
    Process::start(shell)?.wait()?;
    let started = Instant::now();
    let ended = process.wait()?;
    let took = started.elapsed();
    match ended.status.code() {
        Some(0) => return Ok(Trial::Missed), // the step was over before the second one came
        Some(code) => ensure!(code >= 128, "exit code {code}"),
        None => bail!("{}: the handlers were in place", ended.status),
    }
    ensure!(
        took < Duration::from_secs(2),
        "ended {took:?} after the second signal"
    );
    rig.newest_step(&run)?;
    rig.finish(&run)
}

/// Clocks and file times ten years off, forwards and backwards: the same bits and the same `LATEST`.
pub fn clock(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let latest = fs::read(rig.path("straight/LATEST"))?;
    for shuffled in [false, true] {
        let trial = (|| {
            let run = rig.run_at(&[STEPS - 5, STEPS - 4, STEPS - 3])?;
            touch(&run, shuffled)?;
            let args = [&["--resume"], &EVERY_STEP[..]].concat();
            rig.run(rig.train(&run, &args))?.ok()?;
            ensure!(fs::read(run.join("LATEST"))? == latest, "LATEST differs");
            rig.compare(&run)
        })();
        tally.count("file times", trial);
    }
    tally.note = "file times 10 years off in both orders".into();
    if !installed("faketime") {
        tally.note += "; skipped: faketime is not installed";
        return Ok(());
    }
    for shift in ["+3650d", "-3650d"] {
        for steps in [&[][..], &[STEPS / 2]] {
            let trial = (|| {
                let run = match steps {
                    [] => rig.fresh("run"),
                    steps => rig.run_at(steps)?,
                };
                // The shell says the year, so that a clock that did not move is noticed.
                let mut args = vec!["-f", shift, "sh", "-c", "date +%Y >&2; exec \"$0\" \"$@\""];
                let train = rig.train(&run, &[&["--resume"], &EVERY_STEP[..]].concat());
                let mut command = Command::new("faketime");
                rig.dress(&mut command);
                let program = rig.program().to_string_lossy().into_owned();
                args.push(&program);
                command.args(args).args(train.get_args());
                let ended = rig.run(command)?.ok()?;
                let year = ended.err.lines().next().unwrap_or_default().to_string();
                if year == this_year()? {
                    return Ok(Trial::Missed);
                }
                ensure!(fs::read(run.join("LATEST"))? == latest, "LATEST differs");
                rig.compare(&run)
            })();
            tally.count(format!("clock {shift}"), trial);
        }
    }
    tally.expect(6);
    tally.note += ", clock 10 years off in both directions, new and resumed runs; same LATEST";
    Ok(())
}

fn this_year() -> Result<String> {
    let mut date = Command::new("date");
    date.arg("+%Y");
    Ok(Process::start(date)?.wait()?.ok()?.out.trim().to_string())
}

/// The newest checkpoint gets the oldest time, or everything comes from the future.
fn touch(run: &std::path::Path, future: bool) -> Result<()> {
    let years = Duration::from_secs(10 * 365 * 24 * 3600);
    let now = SystemTime::now();
    for (age, step) in (STEPS - 5..=STEPS - 3).enumerate() {
        let hour = Duration::from_secs(3600 * age as u64);
        let time = if future {
            now + years + hour
        } else {
            now - years - hour
        };
        let folder = run.join(checkpoint(step));
        for entry in fs::read_dir(&folder)? {
            File::options()
                .write(true)
                .open(entry?.path())?
                .set_modified(time)?;
        }
        File::open(&folder)?.set_modified(time)?;
    }
    Ok(())
}
