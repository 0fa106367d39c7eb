//! `flux-lora bench sample`: what an image from a pipeline folder costs: encoding its caption, a denoising step, decoding.
//!
//! Loading is not counted, and each part runs once before it is timed. One part is in memory at a time, as in
//! `flux-lora sample`. `tests/reference/time_sampling.py` times the same of diffusers.

use std::time::{Duration, Instant};

use anyhow::Context;
use flux_model::families::{self, Visitor};
use flux_model::family::{Condition, Family, TextEncoders};

use super::{median, peak_rss_mib};
use crate::cli::SampleBenchArgs;
use crate::device;
use crate::generate::{ImageSettings, decode, generate_latents};
use crate::memory::base_for_sampling;
use crate::models::open_pipeline;

const CAPTION: &str = "a photograph of a red fox in deep snow, soft light";

/// Times the parts.
///
/// # Errors
/// A folder that is no pipeline, or files that cannot be read.
pub fn run(args: &SampleBenchArgs) -> anyhow::Result<()> {
    struct Work<'a>(&'a SampleBenchArgs);
    impl Visitor for Work<'_> {
        type Output = anyhow::Result<()>;
        fn visit<F: Family>(self) -> Self::Output {
            time::<F>(self.0)
        }
    }
    let folder = open_pipeline(&args.model, None, None, true)?;
    families::of_folder(&folder, Work(args))?
}

fn time<F: Family>(args: &SampleBenchArgs) -> anyhow::Result<()> {
    let family = F::open(open_pipeline(&args.model, None, None, true)?)?;
    let named = device::open(args.device.as_deref().unwrap_or(device::default_name()))?;
    let device = named.device.clone();
    let guidance_scale = family.sampling().guidance_scale;

    let encoders = family.text_encoders(&device).context("load the encoders")?;
    let encode = |caption| encoders.encode(&[caption], args.tokens, &device);
    let mut texts = encode(CAPTION)?;
    let caption = timed(args.rounds, || encode(CAPTION).map_err(Into::into))?;
    let text = F::text(texts.remove(0), &device);
    let negative = match family.negative_prompt(guidance_scale) {
        Some(prompt) => Some(F::text(encode(prompt)?.remove(0), &device)),
        None => None,
    };
    drop(encoders);

    let network = family.network(base_for_sampling(&family, false, &named)?, &device)?;
    let settings = |num_inference_steps| ImageSettings {
        height_px: args.size,
        width_px: args.size,
        num_inference_steps,
        guidance_scale,
        seed: 0,
        start: None,
    };
    let denoise = |steps| {
        let (none, settings) = (Condition::default(), settings(steps));
        let negative = negative.as_ref();
        generate_latents(
            &family,
            &network,
            &text,
            negative,
            &none,
            settings,
            &device,
            |_| (),
        )
    };
    let latents = denoise(1)?;
    let sync = || device.sync().map_err(|error| anyhow::anyhow!("{error:?}"));
    sync()?;
    let steps = args.steps.max(1);
    let step = timed(args.rounds, || {
        denoise(steps)?;
        sync()
    })? / steps as f64;
    drop(network);

    let autoencoder = family.autoencoder(&device)?;
    decode::<F>(&autoencoder, latents.clone());
    let image = timed(args.rounds, || {
        Ok(decode::<F>(&autoencoder, latents.clone()))
    })?;
    println!(
        "{}, {1} x {1} px, {2} tokens: caption {caption:.3} s, step {step:.3} s, decoding {image:.3} s; an image of {steps} steps {3:.3} s; peak RSS {4} MiB",
        named.name,
        args.size,
        args.tokens,
        caption + steps as f64 * step + image,
        peak_rss_mib().map_or("?".into(), |mib| mib.to_string()),
    );
    Ok(())
}

/// Median seconds of `rounds` calls.
fn timed<T>(rounds: usize, run: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<f64> {
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..rounds.max(1) {
        let started = Instant::now();
        run()?;
        times.push(started.elapsed());
    }
    Ok(median(&times))
}
