//! `flux-lora bench step`: one training step of a mid-size random model, with and without recompute, and without the
//! project's own kernels.
//!
//! The model, adapter and inputs are those of the project's torch baseline: 122 M base parameters, 2.1 M in the adapter,
//! 256 image and 128 text tokens, f32. Phases are wall time; GFLOP/s count the multiplications of linear layers and
//! attention that the maths needs (recompute does more).

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::tensor::Device;
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use lora_core::ops::composed;
use lora_core::state::count_parameters;

use super::model::{self, BASELINE};
use super::{in_own_process, median, peak_rss_mib};
use crate::cli::StepBenchArgs;
use crate::device::{self, NamedDevice};
use crate::output::{print, say};
use crate::step::step;
use crate::workers::Workers;

/// Runs one variant, or each in a process of its own so that peak memory belongs to it.
///
/// # Errors
/// An unknown device or variant.
pub fn run(args: &StepBenchArgs) -> anyhow::Result<()> {
    let name = args.device.as_deref().unwrap_or(device::default_name());
    if let Some(variant) = &args.variant {
        let device = device::open(name)?;
        let run = |recompute| {
            let work = TimeSteps {
                device: &device,
                variant,
                recompute,
                steps: args.steps.max(1),
            };
            families::named("flux1", work).context("no FLUX.1")?
        };
        return match variant.as_str() {
            "recompute" => run(true),
            "plain" => run(false),
            "composed" => composed(|| run(false)),
            other => bail!("unknown variant `{other}`: plain, recompute or composed"),
        };
    }
    for variant in ["plain", "recompute", "composed"] {
        let steps = args.steps.to_string();
        let output = in_own_process(&[
            "step",
            "--device",
            name,
            "--variant",
            variant,
            "--steps",
            &steps,
        ])?;
        print(output)?;
    }
    Ok(())
}

/// Times one variant on FLUX.1.
struct TimeSteps<'a> {
    device: &'a NamedDevice,
    variant: &'a str,
    recompute: bool,
    steps: usize,
}

impl Visitor for TimeSteps<'_> {
    type Output = anyhow::Result<()>;

    fn visit<F: Family>(self) -> Self::Output {
        let (raw, autodiff) = (&self.device.device, self.device.device.clone().autodiff());
        let mut training = model::training::<F>(model::network::<F>(&autodiff)?)?;
        let count = count_parameters(&training.model);
        let rule = model::rule(if self.recompute { usize::MAX } else { 0 }, 1e-4);

        let mut workers = Workers::alone(&autodiff);
        let (mut gradient_time, mut total, mut losses) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..=self.steps {
            let started = Instant::now();
            let draw = |_, device: &Device| Ok(model::draw::<F>(0, device));
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
        say!(
            "{} {:9}: base {:.1} M, LoRA {:.2} M; step {seconds:.3} s (forward+backward {:.3}, optimizer {:.3}; min {:.3}); {:.1} GFLOP/s; peak RSS {} MiB; loss {} -> {}",
            self.device.name,
            self.variant,
            (count.total - count.trainable) as f64 / 1e6,
            count.trainable as f64 / 1e6,
            median(&gradient_time),
            median(&optimizer_time),
            total.iter().min().map_or(0.0, Duration::as_secs_f64),
            BASELINE.flops() / seconds / 1e9,
            peak_rss_mib().map_or("?".into(), |mib| mib.to_string()),
            losses[0],
            losses[losses.len() - 1],
        )?;
        Ok(())
    }
}
