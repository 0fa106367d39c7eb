//! `flux-lora convert`, and what names LoRA files on the command line.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use flux_model::families;
use flux_model::lora::{LoraFormat, ModelShape, WriteOptions, read, write};
use flux_model::pipeline::PipelineFolder;
use lora_core::files::host::Dtype;

use crate::adapters::{self, LoadedLora};
use crate::cli::ConvertArgs;
use crate::cli::UsageError;

/// Writes one LoRA in another format, or in all.
pub(crate) fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let dtype = match args.dtype.as_deref() {
        None => None,
        Some("f32") => Some(Dtype::F32),
        Some("f16") => Some(Dtype::F16),
        Some("bf16") => Some(Dtype::Bf16),
        Some(other) => bail!(UsageError(format!("--dtype {other}: f32, f16 or bf16"))),
    };
    let formats = match args.to.as_str() {
        "all" => LoraFormat::ALL.to_vec(),
        name => match LoraFormat::parse(name) {
            Some(format) => vec![format],
            None => bail!(UsageError(format!(
                "--to {name}: diffusers, peft, kohya, comfyui or all"
            ))),
        },
    };
    let shape = match &args.model {
        Some(model) => families::shape(&PipelineFolder::open(model)?)?,
        None => ModelShape::default(),
    };
    let set =
        read(&args.input, &shape).with_context(|| format!("read {}", args.input.display()))?;
    for (key, reason) in &set.report.ignored {
        println!("ignored `{key}`: {reason}");
    }
    let options = WriteOptions {
        dtype,
        lossy: args.lossy,
        ..WriteOptions::default()
    };
    for format in &formats {
        let out = if formats.len() == 1 {
            args.output.clone()
        } else {
            beside(&args.output, *format)
        };
        let report = write(&set, *format, &out, &options)
            .with_context(|| format!("write {} as {format}", out.display()))?;
        println!("{format}: {} modules in {}", report.modules, out.display());
        for loss in report.losses {
            println!("  lost {}: {}", loss.module, loss.reason);
        }
        for note in report.notes {
            println!("  note: {note}");
        }
    }
    Ok(())
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
            set: adapters::load(&file, &shape)?,
            strength,
        })
    };
    arguments.iter().enumerate().map(load).collect()
}

/// `FILE` or `FILE=WEIGHT`.
fn parse_lora(text: &str) -> anyhow::Result<(PathBuf, f64)> {
    match text.rsplit_once('=') {
        None => Ok((text.into(), 1.0)),
        Some((file, weight)) => match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() => Ok((file.into(), weight)),
            _ => bail!(UsageError(format!(
                "--lora {text}: `{weight}` is not a weight"
            ))),
        },
    }
}
