//! Reference cases: folders with inputs and outputs computed by diffusers, PEFT and transformers, recomputed here.
//!
//! A case is `case.json` (kind, tolerances, where the model is), `inputs.safetensors`, `expected.safetensors`. `kinds` says
//! how each kind is computed, `train_case` replays training; this file reads cases, compares and reports.

mod kinds;
mod train_case;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::{TensorFile, serialize};
use serde_json::Value;

use crate::cli::ParityArgs;
use crate::cli::UsageError;
use crate::device;

/// Tensors by name.
pub(crate) type Tensors = BTreeMap<String, HostTensor>;

/// One reference case.
pub(crate) struct Case {
    /// Its folder.
    dir: PathBuf,
    name: String,
    kind: String,
    /// `case.json`.
    json: Value,
    inputs: Option<TensorFile>,
    expected: TensorFile,
}

impl Case {
    fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("case.json");
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let json: Value =
            serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        let text = |key: &str| {
            json.get(key)
                .and_then(Value::as_str)
                .map(String::from)
                .with_context(|| format!("{} has no `{key}`", path.display()))
        };
        let inputs = dir.join("inputs.safetensors");
        Ok(Self {
            name: text("name")?,
            kind: text("kind")?,
            inputs: inputs
                .is_file()
                .then(|| TensorFile::open(&inputs))
                .transpose()?,
            expected: TensorFile::open(&dir.join("expected.safetensors"))?,
            dir: dir.into(),
            json,
        })
    }

    /// A value of `case.json` by JSON pointer.
    fn value(&self, pointer: &str) -> anyhow::Result<&Value> {
        self.json
            .pointer(pointer)
            .with_context(|| format!("case.json has no `{pointer}`"))
    }

    fn str(&self, pointer: &str) -> anyhow::Result<&str> {
        self.value(pointer)?
            .as_str()
            .with_context(|| format!("`{pointer}` of case.json is not a string"))
    }

    fn f64(&self, pointer: &str) -> anyhow::Result<f64> {
        self.value(pointer)?
            .as_f64()
            .with_context(|| format!("`{pointer}` of case.json is not a number"))
    }

    fn usize(&self, pointer: &str) -> anyhow::Result<usize> {
        let value = self
            .value(pointer)?
            .as_u64()
            .with_context(|| format!("`{pointer}` of case.json is not a count"))?;
        Ok(value as usize)
    }

    /// A path in `case.json`, relative to the case.
    fn path(&self, pointer: &str) -> anyhow::Result<PathBuf> {
        Ok(self.dir.join(self.str(pointer)?))
    }

    fn input(&self, name: &str) -> anyhow::Result<HostTensor> {
        let inputs = self
            .inputs
            .as_ref()
            .context("the case has no inputs.safetensors")?;
        Ok(inputs.read(name)?)
    }

    fn has_input(&self, name: &str) -> bool {
        self.inputs
            .as_ref()
            .is_some_and(|inputs| inputs.info(name).is_some())
    }

    fn tensor<const D: usize>(&self, name: &str, device: &Device) -> anyhow::Result<Tensor<D>> {
        let host = self.input(name)?;
        if host.shape.len() != D {
            bail!(
                "input `{name}` has shape {:?}, not {D} dimensions",
                host.shape
            );
        }
        Ok(Tensor::from_data(
            TensorData::new(host.to_f32(), host.shape),
            device,
        ))
    }

    fn tolerance(&self) -> f64 {
        self.f64("/tolerance/rel").unwrap_or(0.0)
    }
}

/// One compared quantity.
struct Line {
    name: String,
    error: f64,
    bound: f64,
}

impl Line {
    fn passed(&self) -> bool {
        self.error <= self.bound // false for NaN
    }
}

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
        println!("tolerances scaled by {}", args.tolerance_scale);
    }
    let (mut passed, mut failed, mut unreadable) = (0, 0, 0);
    for dir in &args.cases {
        let case = match Case::open(dir) {
            Ok(case) => case,
            Err(error) => {
                println!("{}: cannot be read: {error:#}", dir.display());
                unreadable += 1;
                continue;
            }
        };
        println!("{} ({})", case.name, case.kind);
        let (mut lines, actual) = match compute(&case, &device.device) {
            Ok(result) => result,
            Err(error) => {
                println!("  FAIL {error:#}");
                failed += 1;
                continue;
            }
        };
        for line in &mut lines {
            line.bound *= args.tolerance_scale;
            let verdict = if line.passed() { "ok" } else { "FAIL" };
            println!(
                "  {:<60} {:>10.3e} {:>10.3e} {verdict}",
                line.name, line.error, line.bound
            );
        }
        let bad = lines.iter().filter(|line| !line.passed()).count();
        failed += bad;
        passed += lines.len() - bad;
        if let Some(out) = &args.out {
            write_actual(&case, &actual, out)?;
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(match (unreadable, failed) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(1),
        _ => ExitCode::from(2),
    })
}

/// What the case computes to, and how that compares.
fn compute(case: &Case, device: &Device) -> anyhow::Result<(Vec<Line>, Tensors)> {
    if case.kind == "train" {
        let (actual, init) = train_case::replay(case, device)?;
        return Ok((train_case::compare(case, &actual, &init)?, actual));
    }
    let actual = kinds::compute(case, device)?;
    let mut lines = Vec::new();
    for name in case.expected.names() {
        let expected = case.expected.read(name)?;
        let error = actual
            .get(name)
            .map_or(f64::NAN, |actual| tensor_error(actual, &expected));
        let bound = if expected.dtype.is_float() {
            case.tolerance()
        } else {
            0.0
        };
        lines.push(Line {
            name: name.into(),
            error,
            bound,
        });
    }
    kinds::adjust(case, &actual, &mut lines)?;
    Ok((lines, actual))
}

/// `‖actual - expected‖ / ‖expected‖` in f64; infinite for another shape, and for integers unless they are equal.
fn tensor_error(actual: &HostTensor, expected: &HostTensor) -> f64 {
    if actual.shape != expected.shape {
        return f64::INFINITY;
    }
    if !expected.dtype.is_float() {
        return if actual.to_i64() == expected.to_i64() {
            0.0
        } else {
            f64::INFINITY
        };
    }
    relative_error(&actual.to_f64(), &expected.to_f64())
}

fn relative_error(actual: &[f64], expected: &[f64]) -> f64 {
    let difference: f64 = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - e) * (a - e))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    if difference == 0.0 {
        0.0
    } else {
        (difference / norm).sqrt()
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
