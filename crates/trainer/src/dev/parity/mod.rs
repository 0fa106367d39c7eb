//! Reference cases: folders with inputs and outputs computed by diffusers, PEFT and transformers, recomputed here.
//!
//! A case is `case.json` (kind, tolerances, where the model is), `inputs.safetensors`, `expected.safetensors`. Cases of a
//! network are the same for every family; the other files say how kinds of their own are computed.

mod autoencoder;
mod case;
mod flux2;
mod img2img;
mod lora;
mod network;
mod optimizer;
mod pictures;
mod pipeline;
mod report;
mod schedule;
mod text;
mod train;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use burn::tensor::Device;
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use flux_model::flux2::schedule::empirical_mu;
use lora_core::files::safetensors::serialize;

use self::case::{Case, Tensors};
use self::report::Report;
use crate::cli::{ParityArgs, UsageError};
use crate::device;
use crate::output::say;

/// Runs the cases and prints one line a tensor.
///
/// # Errors
/// A device that cannot be opened.
pub fn run(args: &ParityArgs) -> anyhow::Result<ExitCode> {
    let device = device::open(args.device.as_deref().unwrap_or(device::default_name()))?;
    if !(args.tolerance_scale.is_finite() && args.tolerance_scale >= 1.0) {
        return Err(UsageError("--tolerance-scale must be a number of at least 1".into()).into());
    }
    if args.tolerance_scale != 1.0 {
        say!("tolerances scaled by {}", args.tolerance_scale)?;
    }
    let (mut passed, mut failed, mut unreadable) = (0, 0, 0);
    for dir in &args.cases {
        let case = match Case::open(dir) {
            Ok(case) => case,
            Err(error) => {
                say!("{}: cannot be read: {error:#}", dir.display())?;
                unreadable += 1;
                continue;
            }
        };
        say!("{} ({})", case.name, case.kind)?;
        let mut report = match compute(&case, &device.device) {
            Ok(report) => report,
            Err(error) => {
                say!("  FAIL {error:#}")?;
                failed += 1;
                continue;
            }
        };
        for line in &mut report.lines {
            line.bound *= args.tolerance_scale;
            let verdict = if line.passed() { "ok" } else { "FAIL" };
            say!(
                "  {:<60} {:>10.3e} {:>10.3e} {verdict}",
                line.name,
                line.error,
                line.bound
            )?;
        }
        let bad = report.lines.iter().filter(|line| !line.passed()).count();
        failed += bad;
        passed += report.lines.len() - bad;
        if let Some(out) = &args.out {
            write_actual(&case, &report.actual, out)?;
        }
    }
    say!("{passed} passed, {failed} failed")?;
    Ok(match (unreadable, failed) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(1),
        _ => ExitCode::from(2),
    })
}

/// What the case computes to, and how that compares.
fn compute(case: &Case, device: &Device) -> anyhow::Result<Report> {
    match (case.family.as_str(), case.kind.as_str()) {
        ("flux1", "vae" | "single_file_vae") => autoencoder::compute(case, device),
        ("flux1", "tiny_vae") => autoencoder::compute_tiny(case, device),
        ("flux1", "clip_text") => text::clip(case, device),
        ("flux1", "t5_encoder") => text::t5(case, device),
        ("flux1", "tokenizer") => text::tokenizers(case),
        ("flux1", "scheduler") => {
            schedule::scheduler(case, device, |config, tokens, _| config.mu(tokens))
        }
        ("flux1", "timestep_sampling") => schedule::timestep_sampling(case),
        ("flux1", "optimizer") => optimizer::compute(case, device),
        ("flux1", "img2img") => img2img::compute(case, device),
        ("flux1", "pipeline") => pipeline::compute(case, device),
        ("flux2", "vae" | "single_file_vae") => flux2::autoencoder(case, device),
        ("flux2", "qwen3_text") => flux2::qwen3(case, device),
        ("flux2", "tokenizer") => flux2::tokenizer(case),
        ("flux2", "scheduler") => {
            schedule::scheduler(case, device, |_, tokens, steps| empirical_mu(tokens, steps))
        }
        ("flux2", "pipeline") => flux2::pipeline(case, device),
        _ => families::named(&case.family, NetworkCase(case, device))
            .with_context(|| format!("unknown family `{}`", case.family))?,
    }
}

/// A case of a velocity network.
struct NetworkCase<'a>(&'a Case, &'a Device);

impl Visitor for NetworkCase<'_> {
    type Output = anyhow::Result<Report>;

    fn visit<F: Family>(self) -> Self::Output {
        let Self(case, device) = self;
        match case.kind.as_str() {
            "transformer_forward" => network::component::<F>(case, device),
            "single_file_transformer" => network::single_file::<F>(case, device),
            "lora_forward" => lora::forward::<F>(case, device),
            "lora_format" => lora::format::<F>(case, device),
            "train" => train::compute::<F>(case, device),
            kind => bail!("unknown kind `{kind}` of family `{}`", case.family),
        }
    }
}

/// The same names, shapes and types as expected.
fn write_actual(case: &Case, actual: &Tensors, out: &Path) -> anyhow::Result<()> {
    let tensors = case
        .expected
        .names()
        .filter_map(|name| {
            let dtype = case.expected.info(name)?.dtype;
            let tensor = actual.get(name)?;
            Some((
                name.to_string(),
                if tensor.dtype.is_float() {
                    tensor.cast(dtype)
                } else {
                    tensor.clone()
                },
            ))
        })
        .collect();
    let folder = out.join(&case.name);
    let path = folder.join("actual.safetensors");
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&path, serialize(&tensors, &BTreeMap::new())))
        .with_context(|| format!("write {}", path.display()))
}
