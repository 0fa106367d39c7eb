//! The disk: calls that fail, writes that lie, no space left, and what must be durable before what.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};

use crate::rig::{Bits, Ended, Process, Rig, STEPS, checkpoint, copy};
use crate::tally::{Tally, Trial};
use crate::trace::{self, Call};

/// ENOSPC and EIO from every call of a save that changes a file or folder, and writes that store nothing
/// and claim one byte.
pub fn errno(rig: &Rig, tally: &mut Tally) -> Result<()> {
    if let Some(why) = trace::unavailable() {
        tally.note = why.into();
        return Ok(());
    }
    let run = rig.run_near_end()?;
    let counted = trace::train(rig, &run, &["--resume"], None)?;
    counted.ended.ok()?;
    let mut injections: Vec<(Call, &str)> = Vec::new();
    for call in counted.calls {
        let answers: &[&str] = match call.name.as_str() {
            "write" | "pwrite64" => &["error=ENOSPC", "error=EIO", "retval=1"],
            "openat" if call.only_reads() => &["error=EIO"],
            "openat" | "mkdir" | "fsync" | "fdatasync" => &["error=ENOSPC", "error=EIO"],
            _ => &["error=EIO"],
        };
        injections.extend(answers.iter().map(|answer| (call.clone(), *answer)));
    }
    let all = injections.len();
    let chosen = rig.sample(&injections, rig.count(12, usize::MAX));
    let (mut refused, mut tolerated) = (0, BTreeMap::new());
    for (call, answer) in &chosen {
        let trial = (|| {
            let run = rig.run_near_end()?;
            let inject = format!("{}:{answer}:when={}", call.name, call.nth);
            let failed = trace::train(rig, &run, &["--resume"], Some(&inject))?;
            if !failed.injected_in(&run) {
                return Ok(Trial::Missed);
            }
            if failed.ended.status.success() {
                // A process id in the lock, a cache, an old checkpoint: not worth a stop.
                *tolerated.entry(call.name.clone()).or_insert(0) += 1;
                return rig.compare_and_resume(&run);
            }
            refused += 1;
            check_refusal(rig, &run, &failed.ended)?;
            rig.finish(&run)
        })();
        tally.count(format!("{} {answer}", call.describe()), trial);
    }
    tally.expect(chosen.len());
    let tolerated: Vec<String> = tolerated
        .iter()
        .map(|(call, n)| format!("{n} {call}"))
        .collect();
    tally.note = format!(
        "{} of {all} calls and errors; {refused} stopped the run, it did without {}",
        chosen.len(),
        tolerated.join(", ")
    );
    Ok(())
}

/// One line that names something in the run folder, exit code 1, and the checkpoint from before.
fn check_refusal(rig: &Rig, run: &Path, ended: &Ended) -> Result<()> {
    ended.refused(&[&run.display().to_string()])?;
    let newest = rig.newest_step(run)?;
    ensure!(
        newest >= Some(STEPS - 3),
        "the newest checkpoint is {newest:?}"
    );
    Ok(())
}

impl Rig {
    /// A run that ended well although something failed must be whole: the same bits, and resumable.
    fn compare_and_resume(&self, run: &Path) -> Result<Trial> {
        let ended = self.fresh("ended");
        copy(run, &ended, &|_| true)?;
        match self.compare(run)? {
            Trial::Ended(None) => self.finish(&ended),
            differs => Ok(differs),
        }
    }
}

/// A rank and a choice of layers that make a checkpoint of a few tens of KiB.
const SMALL: [&str; 4] = [
    "--set",
    "lora.r=1",
    "--set",
    "lora.target_modules=[\"transformer_blocks.0.attn.to_q\"]",
];
const SIZE_KIB: u64 = 160;

/// A disk of 160 KiB on which 0, 4, 8, ... KiB are left before the last save.
pub fn full(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let disk = match Tmpfs::mount(rig) {
        Ok(disk) => disk,
        Err(why) => {
            tally.note = format!("skipped: a tmpfs cannot be mounted here ({why:#})");
            return Ok(());
        }
    };
    let small = rig.path("small");
    let straight = [&SMALL[..], &crate::rig::EVERY_STEP].concat();
    rig.run(rig.train(&small, &straight))?.ok()?;
    let expected = Bits::of(&small)?;
    let resume = [&SMALL[..], &["--resume"]].concat();

    let step = rig.count(5, 1) as u64;
    let (mut offsets, mut stopped, mut went_on) = (0, 0, false);
    while !went_on && 4 * offsets < SIZE_KIB {
        let free_kib = 4 * offsets;
        let trial = (|| {
            let run = disk.path.join("run");
            copy(&small, &run, &|name| {
                [
                    "metrics.jsonl",
                    &checkpoint(STEPS - 4),
                    &checkpoint(STEPS - 3),
                ]
                .contains(&name)
            })?;
            std::os::unix::fs::symlink(small.join("cache"), run.join("cache"))?;
            disk.fill(free_kib)?;
            let ended = rig.run(rig.train(&run, &resume))?;
            if ended.status.success() {
                went_on = true;
                fs::remove_dir_all(&run)?;
                return Ok(Trial::Missed);
            }
            stopped += 1;
            check_refusal(rig, &run, &ended)?;
            fs::remove_file(disk.path.join("filler"))?;
            rig.run(rig.train(&run, &resume))?.ok()?;
            rig.compare_with(&run, &expected)
        })();
        disk.empty()?;
        tally.count(format!("{free_kib} KiB free"), trial);
        offsets += step;
    }
    ensure!(went_on, "the run did not fit on {SIZE_KIB} KiB at all");
    tally.expect(rig.count(2, 8));
    tally.note = format!(
        "tmpfs of {SIZE_KIB} KiB with 0, {}, ... KiB free; from {} on the save fits",
        4 * step,
        4 * (offsets - step)
    );
    Ok(())
}

/// A small file system in memory, unmounted with the value.
struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    fn mount(rig: &Rig) -> Result<Self> {
        let path = rig.fresh("tmpfs");
        fs::create_dir(&path)?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={SIZE_KIB}k"), "tmpfs"]);
        mount.arg(&path);
        Process::start(mount)?.wait()?.ok()?;
        Ok(Self { path })
    }

    /// Writes a file that leaves `free_kib`.
    fn fill(&self, free_kib: u64) -> Result<()> {
        let mut df = Command::new("df");
        df.args(["-k", "--output=avail"]).arg(&self.path);
        let text = Process::start(df)?.wait()?.ok()?.out;
        let avail: u64 = text.lines().last().unwrap_or("").trim().parse()?;
        let filler = avail
            .checked_sub(free_kib)
            .context("the run folder leaves less than that")?;
        fs::write(self.path.join("filler"), vec![0; filler as usize * 1024])?;
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            match path.is_dir() {
                true => fs::remove_dir_all(&path)?,
                false => fs::remove_file(&path)?,
            }
        }
        Ok(())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // What cannot be unmounted goes with the machine.
        let _ = Command::new("umount").arg(&self.path).status();
    }
}

/// From a trace of a run and its saves: what a rename publishes is durable before, and the name itself is durable before
/// anything else is renamed or removed.
pub fn sync_order(rig: &Rig, tally: &mut Tally) -> Result<()> {
    if let Some(why) = trace::unavailable() {
        tally.note = why.into();
        return Ok(());
    }
    let run = rig.run_near_end()?;
    let traced = trace::train(rig, &run, &["--resume"], None)?;
    traced.ended.ok()?;
    let mut dirty: BTreeSet<PathBuf> = BTreeSet::new(); // files with new content, folders with new names
    let mut renamed: Option<(String, PathBuf)> = None; // the last rename, and the folder to be synced for it
    let mut owed = |renamed: &mut Option<(String, PathBuf)>, next: &str| {
        if let Some((call, _)) = renamed.take() {
            tally.fail(format!(
                "after {call}: the folder is not synced before {next}"
            ));
        }
    };
    let mut obligations = Vec::new();
    for call in &traced.calls {
        let paths = call.paths();
        let in_run = |path: &PathBuf| {
            path.starts_with(&run)
                && !path.starts_with(run.join("cache"))
                && !path.ends_with("run.lock")
        };
        let Some(path) = paths.first().filter(|path| in_run(path)) else {
            continue;
        };
        let folder = path.parent().unwrap_or(&run).to_path_buf();
        match call.name.as_str() {
            "write" | "pwrite64" => drop(dirty.insert(path.clone())),
            "fsync" | "fdatasync" => {
                dirty.remove(path);
                renamed.take_if(|(_, folder)| folder == path);
            }
            "openat" if call.line.contains("O_CREAT") => drop(dirty.insert(folder)),
            "rename" | "renameat" | "renameat2" => {
                owed(&mut renamed, &call.describe());
                // A checkpoint also promises the lines of the log up to its step.
                let published =
                    |file: &&PathBuf| file.starts_with(path) || file.ends_with("metrics.jsonl");
                let late = dirty.iter().find(published).cloned();
                obligations.push((call.describe(), late));
                renamed = Some((call.describe(), folder));
            }
            "unlink" | "unlinkat" | "rmdir" => owed(&mut renamed, &call.describe()),
            _ => {}
        }
    }
    owed(&mut renamed, "the end");
    for (rename, late) in obligations {
        let trial = match late {
            None => Ok(Trial::Survived),
            Some(path) => Err(anyhow!("{} is not synced before", path.display())),
        };
        tally.count(rename, trial);
    }
    tally.expect(5);
    tally.note =
        "renames of one save, from a trace: content synced before, name synced after".into();
    Ok(())
}

/// On a simulated disk, which can lose and reorder what a real one may: a unit test of the program, which has the calls.
pub fn power_loss(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let Some(features) = &rig.options.test_features else {
        tally.note = "skipped: no --test-features".into();
        return Ok(());
    };
    let test = if rig.options.quick {
        "no_power_loss_breaks_a_promise"
    } else {
        "ten_thousand_power_losses_break_no_promise"
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--release", "--workspace", "--locked", "--lib"]);
    cargo.args([
        "--features",
        features,
        "--",
        "--include-ignored",
        "--nocapture",
        test,
    ]);
    let output = cargo.output().context("start cargo")?;
    let out = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{out}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // Behind the name of the test, as tests are not captured.
    let states = out
        .lines()
        .find_map(|line| line.split_once("crash states: "));
    let (_, states) = states.context("the test did not run")?;
    let states = states.trim().parse()?;
    tally.count_as(states, "crash states", Ok(Trial::Survived));
    tally.expect(if rig.options.quick { 2_000 } else { 10_000 });
    tally.note = "crash states on a simulated disk: calls not yet synced lost, torn or reordered; LATEST and acknowledged saves hold".into();
    Ok(())
}
