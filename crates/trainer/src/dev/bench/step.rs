//! `flux-lora bench step`: one training step of a random model, with and without recompute, with recompute that keeps
//! results, and without the project's own kernels; or in turns with the same step in torch with PEFT.
//!
//! The model, adapter and inputs are those of the project's torch baseline, 122 M base parameters, 2.1 M in the adapter,
//! 256 image and 128 text tokens, or those of a published model. Phases are wall time; GFLOP/s count the multiplications of linear layers and
//! attention that the maths needs (recompute does more).

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::tensor::Device;
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use flux_model::weights::Compute;
use lora_core::ops::composed;
use lora_core::state::count_parameters;
use lora_core::training::recompute::Recomputed;
use serde_json::json;

use super::model::{self, BASELINE};
use super::{cpu_seconds, in_own_process, median, peak_rss_mib, printed};
use crate::cli::StepBenchArgs;
use crate::device::{self, NamedDevice};
use crate::heap;
use crate::output::{print, say};
use crate::step::step;
use crate::workers::Workers;

/// What is timed.
const VARIANTS: [&str; 4] = ["plain", "recompute", "kept", "composed"];

/// Runs one variant, or each in a process of its own so that peak memory belongs to it.
///
/// # Errors
/// An unknown device or variant.
pub fn run(args: &StepBenchArgs) -> anyhow::Result<()> {
    let name = args.device.as_deref().unwrap_or(device::default_name());
    if let Some(variant) = &args.variant {
        let device = device::open(name)?;
        let run = |blocks, with_results| {
            let work = TimeSteps {
                args,
                device: &device,
                variant,
                recomputed: Recomputed {
                    blocks,
                    with_results,
                },
                steps: args.steps.max(1),
            };
            let family = args.model.map_or("flux1", model::family);
            families::named(family, work).with_context(|| format!("no {family}"))?
        };
        return match variant.as_str() {
            "plain" => run(0, 0),
            "recompute" => run(usize::MAX, 0),
            "kept" => run(usize::MAX, usize::MAX),
            "composed" => composed(|| run(0, 0)),
            other => bail!("unknown variant `{other}`: {}", VARIANTS.join(", ")),
        };
    }
    if let Some(python) = &args.torch {
        let beside = BesideTorch { args, python };
        return families::named("flux1", beside).context("no FLUX.1")?;
    }
    for variant in VARIANTS {
        let [batch, resolution] = [args.batch, args.resolution].map(|n| n.to_string());
        let (steps, compute) = (args.steps.to_string(), args.compute.to_string());
        let model = args.model.map(|model| model.to_string());
        let mut words = vec!["step", "--device", name, "--variant", variant];
        words.extend(["--steps", &steps, "--compute", &compute]);
        if let Some(model) = &model {
            words.extend([
                "--model",
                model,
                "--batch",
                &batch,
                "--resolution",
                &resolution,
            ]);
        }
        print(in_own_process(&words)?)?;
    }
    Ok(())
}

/// Times one variant.
struct TimeSteps<'a> {
    args: &'a StepBenchArgs,
    device: &'a NamedDevice,
    variant: &'a str,
    recomputed: Recomputed,
    steps: usize,
}

impl Visitor for TimeSteps<'_> {
    type Output = anyhow::Result<()>;

    fn visit<F: Family>(self) -> Self::Output {
        let (raw, autodiff) = (&self.device.device, self.device.device.clone().autodiff());
        let compute = self.args.compute;
        if let Some(problem) = compute.problem(raw) {
            bail!("--compute {compute}: {problem}");
        }
        let (network, size) = match self.args.model {
            Some(model) => {
                let (config, size) =
                    model::published(model, self.args.batch as usize, self.args.resolution);
                (model::drawn::<F>(config, compute, &autodiff)?, size)
            }
            None if compute == Compute::F32 => (model::network::<F>(&autodiff)?, BASELINE),
            None => (
                model::drawn::<F>(model::config(BASELINE), compute, &autodiff)?,
                BASELINE,
            ),
        };
        let mut training = model::training::<F>(network)?;
        let count = count_parameters(&training.model);
        let rule = model::rule(self.recomputed, 1e-4);

        let drawn = model::draw_of::<F>(size, 0, &autodiff);
        let mut workers = Workers::alone(&autodiff);
        let (mut gradient_time, mut total, mut losses) = (Vec::new(), Vec::new(), Vec::new());
        let mut began = None;
        for i in 0..=self.steps {
            if i == 1 {
                began = cpu_seconds().ok(); // the first step is not like the others
            }
            let started = Instant::now();
            let draw = |_, _: &Device| Ok(drawn.clone());
            let stepped = step(&mut training, &rule, &mut workers, draw)?;
            raw.sync().map_err(|error| anyhow::anyhow!("{error:?}"))?;
            if i > 0 {
                gradient_time.push(stepped.backward);
                total.push(started.elapsed());
                losses.push(stepped.losses[0]);
            }
        }
        let pairs = total.iter().zip(&gradient_time);
        let optimizer_time: Vec<Duration> =
            pairs.map(|(total, backward)| *total - *backward).collect();
        let seconds = median(&total);
        let cpu = began.and_then(|began| Some(cpu_seconds().ok()? - began));
        let cpu = cpu.map(|cpu| format!("{:.3}", cpu / self.steps as f64));
        say!(
            "{} {:9}: base {:.1} M, LoRA {:.2} M; step {seconds:.3} s (forward+backward {:.3}, optimizer {:.3}; min {:.3}); CPU {} s; {:.1} GFLOP/s; peak RSS {} MiB; loss {} -> {}",
            self.device.name,
            self.variant,
            (count.total - count.trainable) as f64 / 1e6,
            count.trainable as f64 / 1e6,
            median(&gradient_time),
            median(&optimizer_time),
            total.iter().min().map_or(0.0, Duration::as_secs_f64),
            cpu.as_deref().unwrap_or("?"),
            size.flops() / seconds / 1e9,
            peak_rss_mib().map_or("?".into(), |mib| mib.to_string()),
            losses[0],
            losses[losses.len() - 1],
        )?;
        Ok(())
    }
}

/// The same step in torch with PEFT, relative to the repository.
const SCRIPT: &str = "tests/reference/time_step.py";

/// This program and torch in turns.
struct BesideTorch<'a> {
    args: &'a StepBenchArgs,
    python: &'a Path,
}

impl Visitor for BesideTorch<'_> {
    type Output = anyhow::Result<()>;

    fn visit<F: Family>(self) -> Self::Output {
        if !Path::new(SCRIPT).is_file() {
            bail!(
                "{SCRIPT} is not here: run this in the repository, with `cargo xtask bench step`"
            );
        }
        let case = json!({
            "transformer": model::config(BASELINE),
            "targets": model::targets::<F>(),
            "rank": model::RANK,
            "image_side": BASELINE.image_side,
            "text_tokens": BASELINE.text[0],
        });
        let steps = self.args.steps.max(1).to_string();
        let mut table = vec![format!(
            "{:<8} {:<28} {:>9} {:>7} {:>9} {:>7} {:>9} {:>7}",
            "threads", "", "step, s", "ratio", "CPU, s", "ratio", "peak MiB", "ratio"
        )];
        for &threads in &self.args.threads {
            let threads = threads.max(1).to_string();
            for (torch, more, variants) in [
                ("torch", None, ["plain"].as_slice()),
                (
                    "torch, checkpointing",
                    Some("--checkpoint"),
                    &["recompute", "kept"],
                ),
            ] {
                let mut theirs = Command::new(self.python);
                theirs
                    .arg(SCRIPT)
                    .arg(case.to_string())
                    .args(["--steps", &steps, "--threads", &threads])
                    .args(more)
                    .env("OMP_NUM_THREADS", &threads)
                    .env_remove(heap::VARIABLE); // torch as it is
                let mut sides = vec![(torch.to_string(), theirs, Vec::new())];
                for variant in variants {
                    let mut own = Command::new(std::env::current_exe()?);
                    own.args(["bench", "step", "--steps", &steps, "--variant", variant])
                        .env("RAYON_NUM_THREADS", &threads);
                    sides.push((format!("flux-lora, {variant}"), own, Vec::new()));
                }
                for _ in 0..self.args.rounds.max(1) {
                    for (_, command, found) in &mut sides {
                        let said = printed(command)?;
                        print(&said)?;
                        found.push(Figures::of(&said)?);
                    }
                }
                let theirs = Figures::median(&sides[0].2);
                for (name, _, found) in &sides {
                    let row = Figures::median(found).0.into_iter();
                    let row = row.zip(theirs.0).zip([3, 3, 0]);
                    let cells = row.map(|((own, theirs), digits)| {
                        format!(" {own:>9.digits$} {:>7.2}", own / theirs)
                    });
                    table.push(format!(
                        "{threads:<8} {name:<28}{}",
                        cells.collect::<String>()
                    ));
                }
            }
        }
        Ok(say!("\n{}", table.join("\n"))?)
    }
}

/// Seconds of a step, CPU seconds of it, peak memory in MiB.
struct Figures([f64; 3]);

impl Figures {
    /// From the line that either side prints.
    fn of(said: &str) -> anyhow::Result<Self> {
        let number = |before: &str| -> anyhow::Result<f64> {
            let (_, rest) = said
                .split_once(before)
                .with_context(|| format!("no `{before}` in {said:?}"))?;
            let word = rest.split_whitespace().next().unwrap_or_default();
            word.parse()
                .with_context(|| format!("no number after `{before}` in {said:?}"))
        };
        Ok(Self([
            number("; step ")?,
            number("; CPU ")?,
            number("; peak RSS ")?,
        ]))
    }

    /// Of some, each figure for itself.
    fn median(all: &[Self]) -> Self {
        Self([0, 1, 2].map(|i| {
            let mut values: Vec<f64> = all.iter().map(|figures| figures.0[i]).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_what_both_sides_print() {
        let own = "flex plain: base 121.7 M, LoRA 2.14 M; step 0.512 s (forward+backward 0.500, optimizer 0.012; min 0.501); CPU 0.940 s; 300.0 GFLOP/s; peak RSS 755 MiB; loss 1 -> 2";
        let torch = "torch 2.8.0, 2 threads, plain: base 121.7 M, LoRA 2.14 M; step 0.900 s; CPU 1.400 s; peak RSS 1585 MiB; loss 1 -> 2";
        let figures = |said| Figures::of(said).expect("a line of figures").0;
        assert_eq!(figures(own), [0.512, 0.94, 755.0]);
        assert_eq!(figures(torch), [0.9, 1.4, 1585.0]);
        assert!(Figures::of("torch: no such thing").is_err());
    }
}
