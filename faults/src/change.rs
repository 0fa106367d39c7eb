//! What changed between the parts of a run: data, settings, threads, the program.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::rig::{Bits, Process, Rig, STEPS, checkpoint, copy, digest, model, picture};
use crate::tally::{Tally, Trial};

/// Images and captions changed under a run.
pub fn data(rig: &Rig, tally: &mut Tally) -> Result<()> {
    type Change = fn(&Path) -> Result<()>;
    let changes: [(&str, &[&str], Change); 6] = [
        ("an image edited", &["1.png"], |data| {
            Ok(picture(72, 96, 9).save(data.join("1.png"))?)
        }),
        ("an image added", &["5.png"], |data| {
            picture(80, 80, 5).save(data.join("5.png"))?;
            Ok(fs::write(data.join("5.txt"), "one more")?)
        }),
        ("an image removed", &["4.png"], |data| {
            fs::remove_file(data.join("4.png"))?;
            Ok(fs::remove_file(data.join("4.txt"))?)
        }),
        ("a caption changed", &["0.png"], |data| {
            Ok(fs::write(data.join("0.txt"), "another caption")?)
        }),
        ("an image renamed", &["3.png", "9.png"], |data| {
            fs::rename(data.join("3.png"), data.join("9.png"))?;
            Ok(fs::rename(data.join("3.txt"), data.join("9.txt"))?)
        }),
        ("two changes at once", &["0.png", "2.png"], |data| {
            fs::write(data.join("0.txt"), "another caption")?;
            Ok(picture(96, 96, 7).save(data.join("2.png"))?)
        }),
    ];
    for (what, named, change) in &changes {
        let trial = (|| {
            let (data, run) = (rig.fresh("data"), rig.run_near_end()?);
            copy(&rig.path("data"), &data, &|_| true)?;
            let path = format!("dataset.path=\"{}\"", data.display());
            let args = ["--resume", "--set", &path];
            change(&data)?;
            let named = [&["--adopt-data"], *named].concat();
            refused_and_untouched(rig, &run, &args, &named)?;
            let adopt = [&args[..], &["--adopt-data"]].concat();
            rig.run(rig.train(&run, &adopt))?.ok()?;
            ensure!(
                rig.inspect(&run)?.out.contains("data changed"),
                "inspect does not show it"
            );
            Ok(Trial::Survived)
        })();
        tally.count(*what, trial);
    }
    tally.count("the base model changed", base_model(rig));
    tally.count("data moved, nothing changed", moved(rig));
    tally.expect(changes.len() + 2);
    tally.note = "refused with the list, folder untouched, accepted with --adopt-data; moved data is no change".into();
    Ok(())
}

/// Resuming must fail, naming `parts`, and leave the run folder as it was.
fn refused_and_untouched(rig: &Rig, run: &Path, args: &[&str], parts: &[&str]) -> Result<()> {
    let before = digest(run)?;
    rig.run(rig.train(run, args))?.refused(parts)?;
    ensure!(
        digest(run)? == before,
        "a refused resume changed the run folder"
    );
    Ok(())
}

fn base_model(rig: &Rig) -> Result<Trial> {
    let (folder, run) = (rig.fresh("model"), rig.run_near_end()?);
    copy(&model(), &folder, &|_| true)?;
    let weights = folder.join("transformer/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&weights)?;
    let end = bytes.len();
    bytes[end - 4] ^= 1; // the last bit of the last weight
    fs::write(&weights, bytes)?;
    let path = format!("model.path=\"{}\"", folder.display());
    let args = ["--resume", "--set", &path];
    refused_and_untouched(rig, &run, &args, &["base model", "--adopt-data"])?;
    rig.run(rig.train(&run, &[&args[..], &["--adopt-data"]].concat()))?
        .ok()?;
    Ok(Trial::Survived)
}

fn moved(rig: &Rig) -> Result<Trial> {
    let (data, run) = (rig.fresh("data"), rig.run_near_end()?);
    copy(&rig.path("data"), &data, &|_| true)?;
    let path = format!("dataset.path=\"{}\"", data.display());
    rig.finish_with(&run, &["--set", &path])
}

/// Settings that may change and settings that may not.
pub fn settings(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let refused: [(&str, &[&str]); 6] = [
        (
            "train.batch_size=1",
            &["`train.batch_size` was 2 and is now 1", "--adopt-config"],
        ),
        (
            "train.seed=8",
            &["`train.seed` was 7 and is now 8", "--adopt-config"],
        ),
        (
            "train.gradient_accumulation_steps=1",
            &["gradient_accumulation_steps", "--adopt-config"],
        ),
        (
            "dataset.caption_dropout=0.5",
            &["dataset.caption_dropout", "--adopt-config"],
        ),
        ("lora.r=8", &["`lora.r` was 4 and is now 8"]),
        ("lora.lora_alpha=9", &["`lora.lora_alpha` was 7", "9"]),
    ];
    for (set, parts) in refused {
        let trial = (|| {
            let run = rig.run_near_end()?;
            refused_and_untouched(rig, &run, &["--resume", "--set", set], parts)?;
            rig.finish(&run)
        })();
        tally.count(set, trial);
    }
    let accepted = [
        ("train.steps=42", "`train.steps` was 40 and is now 42"),
        ("optimizer.learning_rate=0.001", "optimizer.learning_rate"),
        ("checkpoint.every=2", "checkpoint.every"),
    ];
    for (set, event) in accepted {
        let trial = (|| {
            let run = rig.run_near_end()?;
            rig.run(rig.train(&run, &["--resume", "--set", set]))?
                .ok()?;
            let text = rig.inspect(&run)?.ok()?.out;
            let mut events = text.lines().filter(|line| line.starts_with("event:"));
            ensure!(
                events.any(|line| line.contains(event)),
                "no event `{event}` in: {text}"
            );
            Ok(Trial::Survived)
        })();
        tally.count(set, trial);
    }
    tally.expect(9);
    tally.note =
        "6 refused with both values, folder untouched; 3 accepted and shown as events".into();
    Ok(())
}

/// Pictures large enough for a step to be split over threads; at the size of the other faults one thread does it all.
const LARGE: [&str; 6] = [
    "--resume",
    "--set",
    "dataset.resolution=128",
    "--set",
    "train.steps=9",
    "--set=checkpoint.keep=3",
];

/// 1, 2, 4, 8 threads, and resumed with another number.
pub fn threads(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let first = rig.fresh("one-thread");
    train_on(rig, &first, 1)?;
    let expected = Bits::of(&first)?;
    for threads in [2, 4, 8] {
        let trial = (|| {
            let run = rig.fresh("run");
            match train_on(rig, &run, threads)? {
                true => rig.compare_with(&run, &expected),
                false => Ok(Trial::Missed),
            }
        })();
        tally.count(format!("{threads} threads"), trial);
    }
    for (before, after) in [(1, 8), (8, 1), (2, 4), (8, 2)] {
        let trial = (|| {
            let (whole, run) = (rig.fresh("whole"), rig.fresh("run"));
            let fired = train_on(rig, &whole, before)?;
            copy(&whole, &run, &|name| {
                ["cache", "metrics.jsonl", "run.lock", &checkpoint(3)].contains(&name)
            })?;
            match fired & train_on(rig, &run, after)? {
                true => rig.compare_with(&run, &expected),
                false => Ok(Trial::Missed),
            }
        })();
        tally.count(format!("{before}, resumed on {after} threads"), trial);
    }
    tally.expect(7);
    tally.note =
        "2, 4, 8 threads against 1; resumed on 8, 1, 4, 2 after 1, 8, 2, 8; steps large enough to be split".into();
    Ok(())
}

/// Trains a run to its end; false if the process never had that many threads.
fn train_on(rig: &Rig, run: &Path, threads: usize) -> Result<bool> {
    let mut command = rig.train(run, &LARGE);
    command.env("RAYON_NUM_THREADS", threads.to_string());
    let mut process = Process::start(command)?;
    let tasks = format!("/proc/{}/task", process.id());
    let mut most = 0;
    process.wait_until(|| {
        most = most.max(fs::read_dir(&tasks).map_or(0, Iterator::count));
        false
    })?;
    process.wait()?.ok()?;
    Ok(most > threads) // the main thread and the pool
}

/// The program with one byte more is another program.
pub fn fingerprint(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let other = rig.path("other-program");
    fs::copy(rig.program(), &other)?;
    OpenOptions::new()
        .append(true)
        .open(&other)?
        .write_all(&[0])?;
    let trial = (|| {
        let run = rig.run_at(&[STEPS / 2])?;
        let before = digest(&run)?;
        let ended = rig.run(rig.train_with(&other, &run, &["--resume"]))?;
        ended.refused(&["another binary", "--allow-inexact"])?;
        ensure!(
            digest(&run)? == before,
            "a refused resume changed the run folder"
        );
        rig.run(rig.train_with(&other, &run, &["--resume", "--allow-inexact"]))?
            .ok()?;
        let text = rig.inspect(&run)?.ok()?.out;
        let event = text
            .lines()
            .find(|line| line.starts_with("event:") && line.contains("binary"));
        event.context("the change is not among the events")?;
        rig.compare(&run)
    })();
    tally.count("one byte more", trial);
    tally.expect(1);
    tally.note =
        "refused with both digests, accepted with --allow-inexact, folder untouched until then"
            .into();
    Ok(())
}
