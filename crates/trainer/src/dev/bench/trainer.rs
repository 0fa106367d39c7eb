//! `flux-lora bench trainer`: what a training run costs beside forward pass, backward pass and update.
//!
//! A pipeline whose transformer is the model of `bench step` is written with random weights, and the program itself trains on it, without
//! recompute, saving after every second step. Steps with and without a save lie in turns, and what is between them is known from the
//! run's `timings.jsonl`: when each step ended, what it took, and how long it waited for its data.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use serde_json::{Value, json};

use super::median;
use super::model::{self, BASELINE};
use super::pipeline::{Scratch, Training, write_pictures, write_pipeline};
use crate::cli::TrainerBenchArgs;
use crate::dev::random_weights::copy_folder;
use crate::device;
use crate::output::say;
use crate::run::timings::{Timing, read_timings};

/// A small pipeline of the right family.
const TEMPLATE: &str = "tests/fixtures/parity/pipeline_dev/model";
/// Pixels along the side of an image token.
const TOKEN_PX: u32 = 16;

/// Runs it, prints what it found beside what is aimed at, and removes what was written unless it is to be kept.
///
/// # Errors
/// A folder that cannot be written, a run that fails.
pub fn run(args: &TrainerBenchArgs) -> anyhow::Result<()> {
    let work = args.dir.join("bench-trainer");
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let _scratch = Scratch {
        folder: work.clone(),
        is_kept: args.keep,
    };
    write_pipeline(TEMPLATE, &configurations()?, &work.join("pipeline"))?;
    let config = families::named("flux1", WriteRun(args, &work)).context("no FLUX.1")??;

    let [cold, warm] = ["cold", "warm"].map(|name| work.join(name));
    for run in [&cold, &warm] {
        if run.exists() {
            fs::remove_dir_all(run).with_context(|| format!("remove {}", run.display()))?;
        }
    }
    // The first run encodes; the second finds everything encoded, its files in the page cache.
    Training::start(&config, &cold, device::default_name(), false)?.finish()?;
    copy_folder(&cold.join("cache"), &warm.join("cache"))?;
    let began = Training::start(&config, &warm, device::default_name(), false)?
        .finish()?
        .began;
    let steps = Steps::of(&read_timings(&warm.join("timings.jsonl")))?;

    say!("\na step {:.3} s, {} of them", steps.median, args.steps)?;
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let rows = [
        (
            "of a run outside forward pass, backward pass and update",
            percent(steps.outside),
            "2 %",
        ),
        (
            "of that, until a micro-batch is on the device",
            percent(steps.waiting),
            "2 %",
        ),
        ("a save, of a step", percent(steps.save), "10 %"),
        (
            "from the start of the program to its first step",
            format!("{:.2} s", began.as_secs_f64()),
            "1 s",
        ),
    ];
    for (what, found, aim) in rows {
        say!("{what:<56} {found:>9}   (aim: {aim} at most)")?;
    }
    Ok(())
}

/// What the times of a run say.
struct Steps {
    /// What a step took, in seconds.
    median: f64,
    /// Parts of the time of steps without a save.
    outside: f64,
    waiting: f64,
    /// What a save took, as a part of a step.
    save: f64,
}

impl Steps {
    /// Of a run that saves after every second step: each save is made in the step that follows.
    fn of(timings: &[Timing]) -> anyhow::Result<Self> {
        let (mut plain, mut saving) = (Vec::new(), Vec::new());
        let (mut whole, mut outside, mut waiting) = (0.0, 0.0, 0.0);
        let mut took = Vec::new();
        for pair in timings.windows(2) {
            let (before, step) = (&pair[0], &pair[1]);
            let (Some(seconds), Some(waited)) = (step.seconds, step.waited) else {
                bail!("a step without its times");
            };
            if before.seconds.is_none() || step.step < 3 {
                continue; // the first steps are not like the others
            }
            let gap = step.time - before.time;
            let between = Duration::from_secs_f64((gap - seconds).max(0.0));
            if step.step.is_multiple_of(2) {
                took.push(Duration::from_secs_f64(seconds));
                plain.push(between);
                whole += gap;
                outside += gap - seconds + waited;
                waiting += waited;
            } else {
                saving.push(between);
            }
        }
        if plain.is_empty() || saving.is_empty() {
            bail!("the run made too few steps to tell");
        }
        let step = median(&took);
        Ok(Self {
            median: step,
            outside: outside / whole,
            waiting: waiting / whole,
            save: (median(&saving) - median(&plain)) / step,
        })
    }
}

/// The template's, with the transformer of `bench step` and text encoders of the widths that it reads.
fn configurations() -> anyhow::Result<BTreeMap<&'static str, Value>> {
    let read = |file: &str| -> anyhow::Result<Value> {
        let path = Path::new(TEMPLATE).join(file);
        let text = fs::read(&path).with_context(|| {
            format!(
                "read {}: run this in the repository, with `cargo xtask bench trainer`",
                path.display()
            )
        })?;
        Ok(serde_json::from_slice(&text)?)
    };
    let transformer = model::config(BASELINE);
    let [clip, t5] = ["text_encoder/config.json", "text_encoder_2/config.json"];
    let (mut of_clip, mut of_t5) = (read(clip)?, read(t5)?);
    of_clip["hidden_size"] = transformer["pooled_projection_dim"].clone();
    of_t5["d_model"] = transformer["joint_attention_dim"].clone();
    Ok(BTreeMap::from([
        ("transformer/config.json", transformer),
        (clip, of_clip),
        (t5, of_t5),
    ]))
}

/// Pictures and the configuration of the run, whose path it gives.
struct WriteRun<'a>(&'a TrainerBenchArgs, &'a Path);

impl Visitor for WriteRun<'_> {
    type Output = anyhow::Result<PathBuf>;

    fn visit<F: Family>(self) -> Self::Output {
        let Self(args, work) = self;
        let side = BASELINE.image_side as u32 * TOKEN_PX;
        let pictures = [
            ("a", "a red hill", 200),
            ("b", "a blue lake", 40),
            ("c", "a green meadow", 90),
            ("d", "a grey sea", 140),
        ];
        write_pictures(&work.join("data"), side, &pictures)?;
        let text = format!(
            r#"[model]
path = "pipeline"
base_dtype = "f32"
[dataset]
path = "data"
resolution = {side}
max_sequence_length = {tokens}
[lora]
r = {rank}
lora_alpha = {rank}
target_modules = {targets}
[train]
steps = {steps}
[memory]
recompute = "none"
[checkpoint]
every = 2
"#,
            tokens = BASELINE.text[0],
            rank = model::RANK,
            targets = json!(model::targets::<F>()),
            steps = args.steps,
        );
        let config = work.join("run.toml");
        fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_lies_in_the_step_after_it_and_is_no_part_of_the_steps() {
        let start = Timing {
            step: 0,
            time: 0.0,
            seconds: None,
            waited: None,
            memory_mb: None,
            started_on: Some("flex".into()),
        };
        let mut timings = vec![start];
        let mut time = 100.0;
        for step in 1..=8 {
            // 1 s a step, of which 0.01 s is waiting, 0.01 s between steps, a save of 0.1 s in odd ones
            time += if step % 2 == 1 { 1.11 } else { 1.01 };
            timings.push(Timing {
                step,
                time,
                seconds: Some(1.0),
                waited: Some(0.01),
                memory_mb: None,
                started_on: None,
            });
        }
        let found = Steps::of(&timings).expect("enough steps");
        let close = |found: f64, expected: f64| (found - expected).abs() < 1e-6;
        assert!(close(found.median, 1.0));
        assert!(close(found.save, 0.1), "{}", found.save);
        assert!(close(found.outside, 0.02 / 1.01), "{}", found.outside);
        assert!(close(found.waiting, 0.01 / 1.01), "{}", found.waiting);
        assert!(Steps::of(&timings[..3]).is_err());
    }
}
