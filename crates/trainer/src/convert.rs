//! `flux-lora convert`, and what names LoRA files on the command line.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use flux_model::families;
use flux_model::lora::{LoraFormat, ModelShape, Reading, WriteOptions, read, write};
use flux_model::pipeline::PipelineFolder;
use lora_core::files::host::Dtype;

use crate::adapters::{self, LoadedLora};
use crate::cli::ConvertArgs;
use crate::cli::UsageError;
use crate::models::open_pipeline;
use crate::output::Output;

/// Writes one LoRA in another format, or in all.
///
/// # Errors
/// An output that exists (without `--overwrite`), is the input or is named like something else; a LoRA that cannot be read,
/// or that a format cannot hold.
pub(crate) fn convert(args: &ConvertArgs, output: Output) -> anyhow::Result<()> {
    let dtype = match args.dtype.as_deref() {
        None => None,
        Some("f32") => Some(Dtype::F32),
        Some("f16") => Some(Dtype::F16),
        Some("bf16") => Some(Dtype::Bf16),
        Some(other) => bail!(UsageError(format!("--dtype {other}: f32, f16 or bf16"))),
    };
    let outputs = match args.to.as_str() {
        "all" => {
            let one_file = args.output.extension().is_some_and(is_safetensors);
            check_extension(&args.output, !one_file)?;
            let named = |format| (format, beside(&args.output, format));
            LoraFormat::ALL.map(named).to_vec()
        }
        name => match LoraFormat::parse(name) {
            Some(format) => {
                check_extension(&args.output, format == LoraFormat::Peft)?;
                vec![(format, args.output.clone())]
            }
            None => bail!(UsageError(format!(
                "--to {name}: diffusers, peft, kohya, comfyui or all"
            ))),
        },
    };
    for (format, out) in &outputs {
        check_output(args, *format, out)?;
    }
    let shape = match &args.model {
        Some(model) => families::shape(&open_pipeline(model, None, None, args.offline)?)?,
        None => ModelShape::default(),
    };
    let say = |line: String| output.text("converted", &format!("{line}\n"));
    let set = read(&args.input, &shape)?;
    for line in set.report.ignored_lines() {
        say(line)?;
    }
    for warning in &set.report.warnings {
        say(format!("warning: {warning}"))?;
    }
    if set.report.is_of_either {
        bail!(
            "{}: what is written says for which model it is: name it with --model",
            args.input.display()
        );
    }
    let options = WriteOptions {
        dtype,
        lossy: args.lossy,
    };
    for (format, out) in &outputs {
        make_parent(out)?;
        let report = write(&set, *format, out, &options)?;
        say(format!(
            "{format}: {} modules in {}",
            report.modules,
            out.display()
        ))?;
        for loss in report.losses {
            say(format!("  lost {}: {}", loss.module, loss.reason))?;
        }
        for note in report.notes {
            say(format!("  note: {note}"))?;
        }
        for line in table(&report.readings) {
            say(format!("  {line}"))?;
        }
    }
    Ok(())
}

/// Who reads what of a file, as a table, and below each reader what it does otherwise.
pub(crate) fn table(readings: &[Reading]) -> Vec<String> {
    let mut lines = vec![format!(
        "{:<12}{:>8}{:>8}{:>12}",
        "reader", "loads", "drops", "otherwise"
    )];
    for reading in readings {
        let (drops, differs) = (reading.drops.len(), reading.differs.len());
        lines.push(format!(
            "{:<12}{:>8}{drops:>8}{differs:>12}",
            reading.reader, reading.loads
        ));
        lines.extend(reading.lines().into_iter().map(|line| format!("  {line}")));
    }
    lines
}

fn is_safetensors(extension: &OsStr) -> bool {
    extension.eq_ignore_ascii_case("safetensors")
}

/// A file is named `.safetensors`, a folder is not named like a file.
fn check_extension(output: &Path, is_folder: bool) -> anyhow::Result<()> {
    const FILES: [&str; 8] = [
        "safetensors",
        "bin",
        "pt",
        "pth",
        "ckpt",
        "json",
        "gguf",
        "zip",
    ];
    let extension = output.extension().unwrap_or_default();
    let named_like_a_file = FILES
        .iter()
        .any(|file| extension.eq_ignore_ascii_case(file));
    let problem = if is_folder && named_like_a_file {
        "the peft format is a folder: leave out the extension"
    } else if !is_folder && !is_safetensors(extension) {
        "what is written is a safetensors file: let its name end in `.safetensors`"
    } else {
        return Ok(());
    };
    bail!(UsageError(format!("{}: {problem}", output.display())))
}

/// Refuses an output that would take the place of the input or of anything else.
fn check_output(args: &ConvertArgs, format: LoraFormat, out: &Path) -> anyhow::Result<()> {
    let found = |path: &Path| fs::canonicalize(path).ok();
    if let (Some(input), Some(output)) = (found(&args.input), found(out)) {
        let inside = input.parent() == Some(&output) && format == LoraFormat::Peft;
        if input == output || inside {
            bail!(UsageError(format!(
                "{} is what is converted: choose another output",
                out.display()
            )));
        }
    }
    if format == LoraFormat::Peft {
        if out.exists() && !out.is_dir() {
            bail!(UsageError(format!(
                "{} is a file, but the peft format is a folder: choose another output",
                out.display()
            )));
        }
    } else if out.is_dir() {
        bail!(UsageError(format!(
            "{} is a folder, but {format} is one file: choose another output",
            out.display()
        )));
    }
    let taken = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => out.symlink_metadata().is_ok(),
    };
    if taken && !args.overwrite {
        bail!(UsageError(format!(
            "{} exists: choose another output, or add --overwrite",
            out.display()
        )));
    }
    Ok(())
}

/// Makes the folder that `path` is to be in.
pub(crate) fn make_parent(path: &Path) -> anyhow::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => fs::create_dir_all(parent)
            .with_context(|| format!("create the folder {}", parent.display())),
        _ => Ok(()),
    }
}

/// `lora.safetensors` to `lora-kohya.safetensors`, or to the folder `lora-peft`.
pub(crate) fn beside(path: &Path, format: LoraFormat) -> PathBuf {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
        .unwrap_or_default();
    let extension = if format == LoraFormat::Peft {
        ""
    } else {
        ".safetensors"
    };
    path.with_file_name(format!("{stem}-{format}{extension}"))
}

/// The LoRAs of `--lora FILE[=WEIGHT]` arguments, read against a pipeline.
pub(crate) fn load_loras(
    arguments: &[String],
    pipeline: &PipelineFolder,
) -> anyhow::Result<Vec<LoadedLora>> {
    let shape = families::shape(pipeline)?;
    let load = |(index, argument): (usize, &String)| {
        let (file, strength) = parse_lora(argument)?;
        Ok(LoadedLora {
            name: format!("lora{index}"),
            set: adapters::load(&file, &shape).context("--lora")?,
            strength,
        })
    };
    arguments.iter().enumerate().map(load).collect()
}

/// `FILE` or `FILE=WEIGHT`; what exists as a whole is a file, whatever is in its name.
fn parse_lora(text: &str) -> anyhow::Result<(PathBuf, f64)> {
    let whole = Path::new(text);
    let Some((file, weight)) = text.rsplit_once('=').filter(|_| !whole.exists()) else {
        return Ok((whole.into(), 1.0));
    };
    match weight.trim().parse::<f64>() {
        Ok(weight) if weight.is_finite() => Ok((file.into(), weight)),
        _ if Path::new(file).exists() => bail!(UsageError(format!(
            "--lora {text}: `{weight}` is not a weight"
        ))),
        _ => bail!(UsageError(format!(
            "--lora {text}: there is no such file, and `{weight}` is not a weight"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exists_is_a_file_whatever_is_in_its_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        for name in [
            "a.safetensors",
            "epoch=3-step=500.safetensors",
            "b=0.5",
            "c=",
        ] {
            fs::write(path(name), "").expect("writable");
        }
        fs::create_dir(path("peft=r8")).expect("writable");
        for (text, file, weight) in [
            ("a.safetensors", "a.safetensors", 1.0),
            ("a.safetensors=0.5", "a.safetensors", 0.5),
            ("a.safetensors=-1e-1", "a.safetensors", -0.1),
            (
                "epoch=3-step=500.safetensors",
                "epoch=3-step=500.safetensors",
                1.0,
            ),
            (
                "epoch=3-step=500.safetensors=0.7",
                "epoch=3-step=500.safetensors",
                0.7,
            ),
            ("b=0.5", "b=0.5", 1.0),
            ("b=0.5=2", "b=0.5", 2.0),
            ("c=", "c=", 1.0),
            ("peft=r8", "peft=r8", 1.0),
            ("peft=r8=0.25", "peft=r8", 0.25),
            ("absent", "absent", 1.0),
            ("absent=2", "absent", 2.0),
        ] {
            let parsed = parse_lora(&path(text)).expect(text);
            assert_eq!(parsed, (path(file).into(), weight), "{text}");
        }
        for (text, problem) in [
            ("a.safetensors=", "`` is not a weight"),
            ("a.safetensors=nan", "`nan` is not a weight"),
            (
                "epoch=4.safetensors",
                "there is no such file, and `4.safetensors` is not a weight",
            ),
        ] {
            let error = parse_lora(&path(text)).expect_err(text).to_string();
            assert!(error.ends_with(problem), "{error}");
        }
    }
}
