//! Numbers that are none, and memory that is not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::rig::{EVERY_STEP, Rig, STEPS, checkpoint, checkpoints, copy, model, sha256};
use crate::tally::{Tally, Trial};

const WEIGHTS: &str = "transformer/diffusion_pytorch_model.safetensors";

/// NaN and infinity in base weights and in checkpoints; learning rates that make a run diverge.
pub fn nan(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let poisons = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for poison in poisons {
        tally.count(
            format!("{poison} in the base model"),
            in_base_model(rig, poison),
        );
        for file in ["lora.safetensors", "optimizer.safetensors"] {
            let trial = in_checkpoint(rig, file, poison);
            tally.count(format!("{poison} in {file}"), trial);
        }
    }
    for rate in ["1e30", "1e38", "1e200"] {
        for steps in [&[][..], &[STEPS / 2]] {
            let trial = diverging(rig, rate, steps);
            tally.count(format!("learning rate {rate} after {steps:?}"), trial);
        }
    }
    // Finite in all they do: only the size of the loss tells, or that nothing is learned any more.
    let explodes = [
        "lora.target_modules=\"all-linear\"",
        "optimizer.learning_rate=1",
    ];
    tally.count(
        "a loss that explodes",
        guarded(rig, &explodes, "has diverged"),
    );
    let collapses = ["optimizer.learning_rate=1e3"];
    tally.count(
        "a run that collapses",
        guarded(rig, &collapses, "has collapsed"),
    );
    tally.expect(17);
    tally.note = "9 poisoned base models and checkpoints, 6 runs of which nothing was saved, 2 that only the guard stops".into();
    Ok(())
}

fn in_base_model(rig: &Rig, poison: f32) -> Result<Trial> {
    let (folder, run) = (rig.fresh("model"), rig.run_near_end()?);
    copy(&model(), &folder, &|_| true)?;
    poison_last(&folder.join(WEIGHTS), poison)?;
    let path = format!("model.path=\"{}\"", folder.display());
    for run in [rig.fresh("run"), run] {
        let ended = rig.run(rig.train(&run, &["--resume", "--adopt-data", "--set", &path]))?;
        ended.refused(&["not finite", "tensor `"])?;
    }
    Ok(Trial::Survived)
}

/// The manifest is made to fit, so only the numbers are wrong.
fn in_checkpoint(rig: &Rig, file: &str, poison: f32) -> Result<Trial> {
    let run = rig.run_near_end()?;
    let folder = run.join(checkpoint(STEPS - 3));
    let before = fs::read(folder.join(file))?;
    poison_last(&folder.join(file), poison)?;
    let after = fs::read(folder.join(file))?;
    let manifest = fs::read_to_string(folder.join("MANIFEST.json"))?;
    let body = manifest.replace(&sha256(&before), &sha256(&after));
    let seal = body
        .rfind(",\n  \"sha256\"")
        .context("a manifest without seal")?;
    let sealed = format!(
        "{},\n  \"sha256\": \"{}\"\n}}\n",
        &body[..seal],
        sha256(&body.as_bytes()[..seal])
    );
    fs::write(folder.join("MANIFEST.json"), &sealed)?;
    let latest = format!("{}\n{}\n", checkpoint(STEPS - 3), sha256(sealed.as_bytes()));
    fs::write(run.join("LATEST"), latest)?;
    let ended = rig.run(rig.train(&run, &["--resume"]))?;
    ensure!(
        !ended.err.contains("damaged"),
        "the manifest was not made to fit: {}",
        ended.err
    );
    ended.refused(&["not finite"])?;
    Ok(Trial::Survived)
}

fn poison_last(path: &Path, poison: f32) -> Result<()> {
    let mut bytes = fs::read(path)?;
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&poison.to_le_bytes());
    fs::write(path, bytes)?;
    Ok(())
}

/// Must stop, naming step and samples; nothing of it is saved, and the run goes on from before the mistake.
fn diverging(rig: &Rig, rate: &str, steps: &[u64]) -> Result<Trial> {
    let run = match steps {
        [] => rig.fresh("run"),
        steps => rig.run_at(steps)?,
    };
    let set = format!("optimizer.learning_rate={rate}");
    let args = [&["--resume", "--set", &set], &EVERY_STEP[..]].concat();
    let ended = rig.run(rig.train(&run, &args))?;
    ended.refused(&["at step ", ".png", "the last checkpoint is untouched"])?;
    only_finite(rig, &run)?;
    // Warm-up: the first step of a run has learning rate 0.
    let (newest, good) = (rig.newest_step(&run)?, steps.first().unwrap_or(&1));
    ensure!(newest == Some(*good), "the newest checkpoint is {newest:?}");
    let [step] = steps else {
        return Ok(Trial::Survived);
    };
    let back = run.join(checkpoint(*step));
    rig.run(rig.train(&run, &["--resume", &back.display().to_string()]))?
        .ok()?;
    rig.compare(&run)
}

/// Must be stopped by the guard, and go on without it.
fn guarded(rig: &Rig, settings: &[&str], says: &str) -> Result<Trial> {
    let common = ["train.steps=8", "checkpoint.every=8", "checkpoint.keep=2"];
    let args = |more: &[&'static str]| -> Vec<String> {
        let all = settings.iter().chain(&common).chain(more);
        all.map(|set| format!("--set={set}")).collect()
    };
    let train = |more: &[&'static str]| {
        let (run, args) = (rig.fresh("run"), args(more));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        (rig.run(rig.train(&run, &args)), run)
    };
    let (ended, run) = train(&[]);
    ended?.refused(&[says, "optimizer.learning_rate", "at step ", ".png"])?;
    ensure!(checkpoints(&run)?.is_empty(), "it was saved");
    train(&["train.divergence_factor=none"]).0?.ok()?;
    Ok(Trial::Survived)
}

/// Every checkpoint is whole and holds numbers only.
fn only_finite(rig: &Rig, run: &Path) -> Result<()> {
    for name in checkpoints(run)? {
        rig.inspect(&run.join(&name))?.ok()?;
        for file in ["lora.safetensors", "optimizer.safetensors"] {
            all_finite(&run.join(&name).join(file))?;
        }
    }
    Ok(())
}

/// Every number of a safetensors file of f32.
fn all_finite(path: &Path) -> Result<()> {
    let bytes = fs::read(path)?;
    let (length, rest) = bytes.split_first_chunk::<8>().context("no header")?;
    let length = u64::from_le_bytes(*length) as usize;
    let header: Value = serde_json::from_slice(&rest[..length])?;
    let tensors = header.as_object().context("no tensors")?.iter();
    for (name, info) in tensors.filter(|(name, _)| *name != "__metadata__") {
        ensure!(info["dtype"] == "F32", "{name} is not f32");
    }
    let values = rest[length..].as_chunks::<4>().0.iter();
    let bad = values
        .filter(|v| !f32::from_le_bytes(**v).is_finite())
        .count();
    ensure!(
        bad == 0,
        "{bad} values of {} are not finite",
        path.display()
    );
    Ok(())
}

/// NaN in loss, gradient or update of a chosen step, by a program that was built for it.
pub fn nan_injected(rig: &Rig, tally: &mut Tally) -> Result<()> {
    if rig.options.canary_program.is_none() {
        tally.note = "skipped: no --canary-program".into();
        return Ok(());
    }
    let each = rig.count(2, 13);
    let rig = Rig::of_canary(&rig.options, None)?;
    for place in ["loss", "gradient", "update"] {
        for _ in 0..each {
            let step = 2 + rig.below(STEPS - 1);
            let from = (step - 1).saturating_sub(rig.below(4)).max(1);
            let trial = (|| {
                let run = rig.run_at(&[from])?;
                let mut train = rig.train(&run, &[&["--resume"], &EVERY_STEP[..]].concat());
                train.env("FLUX_LORA_CANARY", format!("nan-{place}:{step}"));
                let named = format!("at step {step}, ");
                rig.run(train)?
                    .refused(&[&named, ".png", "the last checkpoint is untouched"])?;
                only_finite(&rig, &run)?;
                let newest = rig.newest_step(&run)?;
                ensure!(
                    newest == Some(step - 1),
                    "the newest checkpoint is {newest:?}"
                );
                rig.finish(&run)
            })();
            tally.count(format!("{place} of step {step}"), trial);
        }
    }
    tally.expect(3 * each);
    tally.note = "loss, gradient, update of random steps; step and samples named, not saved, resumed from the step before".into();
    Ok(())
}

/// Address space from far too little to just too little: the last checkpoint stays.
pub fn out_of_memory(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let limited = |run: &PathBuf, limit_kib: u64| {
        let mut command = Command::new("bash");
        let train = rig.train(run, &["--resume"]);
        command.args(["-c", &format!("ulimit -v {limit_kib}; exec \"$0\" \"$@\"")]);
        command.arg(train.get_program()).args(train.get_args());
        rig.dress(&mut command);
        rig.run(command)
    };
    // The least with which a run ends well, to a MiB.
    let (mut low, mut high) = (1 << 10, 16 << 20);
    while high - low > 1 << 10 {
        let (middle, run) = ((low + high) / 2, rig.run_near_end()?);
        match limited(&run, middle)?.status.success() {
            true => high = middle,
            false => low = middle,
        }
    }
    let trials = rig.count(5, 30);
    for i in 0..trials {
        // Half of them in the last 64 MiB, where the run has begun.
        let below = if i % 2 == 0 {
            rig.below(64 << 10)
        } else {
            rig.below(high - (1 << 10))
        };
        let limit = high.saturating_sub(below + 1).max(1 << 10);
        let trial = (|| {
            let run = rig.run_near_end()?;
            let ended = limited(&run, limit)?;
            if ended.status.success() {
                return Ok(Trial::Missed);
            }
            let newest = rig.newest_step(&run)?;
            ensure!(
                newest >= Some(STEPS - 3),
                "the newest checkpoint is {newest:?}"
            );
            rig.finish(&run)
        })();
        tally.count(format!("{limit} KiB"), trial);
    }
    tally.expect(trials / 2);
    tally.note = format!(
        "address space limits below {} MiB, with which it runs",
        high >> 10
    );
    Ok(())
}
