//! SIGKILL: at random moments, inside a save, at every system call of a save, and on every backend of the program.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::rig::{Bits, Process, Rig, STEPS, checkpoints, lines};
use crate::tally::{Tally, Trial};
use crate::trace;

/// Runs killed once and runs killed five times, a quarter of the kills inside a save.
pub fn random(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let (once, often) = (rig.count(5, 100), rig.count(3, 20));
    let (mut kills, mut inside, mut runs) = (0, 0, 0);
    for kills_of_run in std::iter::repeat_n(1, once).chain(std::iter::repeat_n(5, often)) {
        let trial = killed_run(rig, kills_of_run, &mut kills, &mut inside);
        runs += 1;
        tally.count_as(kills_of_run, format!("run {runs}"), trial);
    }
    tally.expect(once + 5 * often);
    if 4 * inside < tally.trials {
        tally.fail(format!("only {inside} kills were inside a save"));
    }
    tally.note =
        format!("{runs} runs, {often} of them killed 5 times; {inside} kills inside a save");
    Ok(())
}

/// Starts somewhere in the run, kills it, resumes it, ..., and lets it finish.
fn killed_run(rig: &Rig, wanted: usize, kills: &mut usize, inside: &mut usize) -> Result<Trial> {
    let start = |rig: &Rig| match rig.below(STEPS - 4) {
        0 => Ok(rig.fresh("run")), // from the very beginning, cache and all
        step => rig.run_at(&[step]),
    };
    let mut run = start(rig)?;
    let (mut done, mut attempts) = (0, 0);
    while done < wanted {
        attempts += 1;
        ensure!(
            attempts < 20 * wanted,
            "the run is always faster than the kill"
        );
        let in_save = kills.is_multiple_of(4);
        match kill_once(rig, &run, in_save)? {
            Killed::Running { unfinished } => {
                if in_save && !unfinished {
                    continue; // it came just after the save: a kill, but not the one that is counted
                }
                done += 1;
                *kills += 1;
                *inside += usize::from(unfinished);
            }
            Killed::Finished => {
                if let Trial::Ended(Some(differs)) = rig.compare(&run)? {
                    return Ok(Trial::Ended(Some(differs)));
                }
                run = start(rig)?;
            }
        }
    }
    rig.finish(&run)
}

enum Killed {
    /// It was running; `unfinished` if it was killed inside a save.
    Running { unfinished: bool },
    /// It had come to its end.
    Finished,
}

fn kill_once(rig: &Rig, run: &Path, in_save: bool) -> Result<Killed> {
    let acknowledged = acknowledged(run);
    let mut process = Process::start(rig.train(run, &["--resume"]))?;
    let begun = format!(".tmp-{}-", process.id());
    let unfinished = || {
        let names = fs::read_dir(run).into_iter().flatten().flatten();
        names.map(|entry| entry.file_name()).any(|name| {
            let name = name.to_string_lossy();
            name.starts_with("ckpt-") && name.contains(&begun)
        })
    };
    if in_save {
        process.wait_until(unfinished)?;
        sleep(Duration::from_micros(rig.below(5000)));
    } else {
        // While it starts, or after a random step; in time alone, a busy machine would make it the same moment always.
        let steps = rig.below(STEPS) as usize;
        process.wait_until(|| steps < 10 || lines(run) >= steps)?;
        sleep(Duration::from_micros(rig.below(300_000)));
    }
    let before = acknowledged.max(self::acknowledged(run));
    if !process.kill()? {
        process.wait()?.ok()?;
        return Ok(Killed::Finished);
    }
    let newest = if run.is_dir() {
        rig.newest_step(run)?
    } else {
        None
    };
    ensure!(
        newest >= before,
        "step {before:?} was acknowledged, after the kill the newest is {newest:?}"
    );
    Ok(Killed::Running {
        unfinished: unfinished(),
    })
}

/// The step that `LATEST` names.
fn acknowledged(run: &Path) -> Option<u64> {
    let latest = fs::read_to_string(run.join("LATEST")).ok()?;
    latest.lines().next()?.strip_prefix("ckpt-")?.parse().ok()
}

/// At every call of one save that changes a file or folder: before it, which is after the one before.
pub fn syscall(rig: &Rig, tally: &mut Tally) -> Result<()> {
    if let Some(why) = trace::unavailable() {
        tally.note = why.into();
        return Ok(());
    }
    let run = rig.run_near_end()?;
    let counted = trace::train(rig, &run, &["--resume"], None)?;
    counted.ended.ok()?;
    let calls: Vec<_> = counted
        .calls
        .into_iter()
        .filter(|call| !call.only_reads())
        .collect();
    ensure!(calls.len() >= 40, "a save made only {} calls", calls.len());
    let chosen = rig.sample(&calls, rig.count(12, usize::MAX));
    for call in &chosen {
        let trial = (|| {
            let run = rig.run_near_end()?;
            let inject = format!("{}:signal=KILL:when={}", call.name, call.nth);
            let killed = trace::train(rig, &run, &["--resume"], Some(&inject))?;
            if !killed.killed_in(call, &run) {
                return Ok(Trial::Missed);
            }
            let newest = rig.newest_step(&run)?;
            ensure!(
                newest >= Some(STEPS - 3),
                "the newest checkpoint is {newest:?} of {:?}",
                checkpoints(&run)
            );
            rig.finish(&run)
        })();
        tally.count(call.describe(), trial);
    }
    tally.expect(chosen.len());
    tally.note = format!(
        "before {} of the {} calls of a resumed run and its saves",
        chosen.len(),
        calls.len()
    );
    Ok(())
}

/// On each backend that the program was built for: killed, resumed, killed again, against a run of that backend.
pub fn backends(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let mut tried = Vec::new();
    let steps = rig.count(12, STEPS as usize);
    let mut devices = vec![("flex", steps, 20), ("ndarray", steps, 20)];
    if !rig.options.quick {
        devices.push(("wgpu", 6, 3)); // minutes, where it is software
    }
    for (device, steps, all) in devices {
        let (last, steps) = (steps - 2, format!("--set=train.steps={steps}"));
        let every = "--set=checkpoint.every=2";
        let args = ["--device", device, &steps, every, "--resume"];
        let straight = rig.fresh("straight");
        let ended = rig.run(rig.train(&straight, &args))?;
        if ended.err.contains("is not in this binary") {
            continue;
        }
        ended.ok()?;
        let expected = Bits::of(&straight)?;
        let kills = rig.count(3, all);
        let trial = (|| {
            let run = rig.fresh("run");
            for _ in 0..kills {
                let mut process = Process::start(rig.train(&run, &args))?;
                // A step or two beyond what is there, so that many kills fit into a run.
                let wanted = last.min(lines(&run) + rig.below(3) as usize);
                process.wait_until(|| lines(&run) >= wanted)?;
                sleep(Duration::from_micros(rig.below(20_000)));
                ensure!(process.kill()?, "the run is faster than the kill");
            }
            rig.run(rig.train(&run, &args))?.ok()?;
            rig.compare_with(&run, &expected)
        })();
        tally.count_as(kills, device, trial);
        tried.push(format!("{kills} kills of a run on {device}"));
    }
    tally.expect(rig.count(3, 20));
    tally.note = tried.join(", ");
    Ok(())
}
