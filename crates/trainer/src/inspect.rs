//! `flux-lora inspect`: what is in a LoRA file, a model folder, a run folder or a checkpoint, as text.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use flux_model::WeightsError;
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use flux_model::lora::{ModelShape, read};
use flux_model::pipeline::PipelineFolder;
use flux_model::weights::Checkpoint;

use crate::convert::table;
use crate::nearest::one_line;
use crate::run::checkpoint::{Opened, State, is_checkpoint_folder};
use crate::run::error::Rejected;
use crate::run::folder::RunDir;
use crate::run::manifest::{Verified, verify};

/// Describes what is at `path`.
///
/// # Errors
/// Nothing there, or nothing this program knows.
pub fn describe(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    if path.is_dir() {
        if is_checkpoint_folder(path) {
            checkpoint(&mut text, verify(path)?)?;
        } else if path.join("model_index.json").is_file() {
            model(&mut text, path)?;
        } else if path.join("run.lock").is_file() || RunDir::open(path)?.has_checkpoints()? {
            run(&mut text, path)?;
        } else {
            lora(&mut text, path)?;
        }
    } else {
        lora(&mut text, path)?;
    }
    Ok(text)
}

fn model(text: &mut String, path: &Path) -> anyhow::Result<()> {
    struct Describe(PipelineFolder);
    impl Visitor for Describe {
        type Output = Result<(String, Vec<&'static str>), WeightsError>;
        fn visit<F: Family>(self) -> Self::Output {
            let path = self.0.root().to_path_buf();
            let lines = F::open(self.0)?.describe()?;
            let mut components = vec!["transformer", "vae"];
            let encoders = F::TEXT_FOLDERS.iter();
            components.extend(encoders.filter(|name| name.starts_with("text_encoder")));
            Ok((
                format!("{} pipeline {}\n{lines}", F::NAME, path.display()),
                components,
            ))
        }
    }
    let folder = PipelineFolder::open(path)?;
    let (lines, components) = families::of_folder(&folder.clone(), Describe(folder))??;
    text.push_str(&lines);
    for component in components {
        match Checkpoint::open(&path.join(component)) {
            Ok(checkpoint) => writeln!(
                text,
                "{component}: {} tensors in {}",
                checkpoint.names().count(),
                checkpoint.path().display()
            )?,
            Err(error) => writeln!(text, "{component}: {error}")?,
        }
    }
    Ok(())
}

fn run(text: &mut String, path: &Path) -> anyhow::Result<()> {
    let run = RunDir::open(path)?;
    writeln!(text, "run folder {}", path.display())?;
    for found in run.checkpoints()? {
        let state = match verify(&found.dir) {
            Ok(_) => "verified".to_string(),
            Err(reason) => format!(
                "NOT VALID: {}",
                Rejected {
                    path: found.dir.clone(),
                    reason
                }
            ),
        };
        writeln!(
            text,
            "  step {:>8}  {}  {state}",
            found.step,
            found.dir.display()
        )?;
    }
    if run.has_checkpoints()? {
        checkpoint(text, run.newest_valid()?.0)?;
    }
    Ok(())
}

fn checkpoint(text: &mut String, verified: Verified) -> anyhow::Result<()> {
    writeln!(text, "checkpoint {} (verified)", verified.dir.display())?;
    for file in &verified.manifest.files {
        writeln!(
            text,
            "  {:<24} {:>12} bytes  sha256 {}",
            file.name,
            file.length,
            &file.sha256[..16]
        )?;
    }
    let Opened { state, config, .. } = Opened::read(verified)?;
    let State {
        progress,
        epoch,
        samples,
        fingerprint,
        events,
        ..
    } = state;
    writeln!(
        text,
        "step:         {} of {}",
        progress.step, config.train.steps
    )?;
    writeln!(text, "epoch:        {epoch}")?;
    writeln!(text, "samples:      {}", samples.len())?;
    writeln!(
        text,
        "lora:         r {}, alpha {}",
        config.lora.r, config.lora.lora_alpha
    )?;
    writeln!(
        text,
        "made with:    flux-lora {} on {} ({})",
        fingerprint.version, fingerprint.device, fingerprint.hardware
    )?;
    writeln!(text, "cpu features: {}", fingerprint.cpu_features)?;
    writeln!(text, "kernels: {}", fingerprint.kernels)?;
    writeln!(text, "binary:       sha256 {}", fingerprint.binary)?;
    for event in events {
        writeln!(
            text,
            "event:        after step {}: {}",
            event.step, event.what
        )?;
    }
    Ok(())
}

fn lora(text: &mut String, path: &Path) -> anyhow::Result<()> {
    let set = read(path, &ModelShape::default())?;
    writeln!(text, "LoRA {}", path.display())?;
    for (format, modules) in &set.report.formats {
        writeln!(text, "format {format}: {modules} modules")?;
    }
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let mut parameters = 0;
    for (component, _, update) in set.iter() {
        parameters += update
            .tensors()
            .iter()
            .map(|tensor| tensor.shape().iter().product::<usize>())
            .sum::<usize>();
        let kind = match (update.kind(), update.rank()) {
            (_, Some(rank)) => {
                let alpha = update.alpha.unwrap_or(update.scale * rank as f64);
                format!("rank {rank}, alpha {alpha}")
            }
            (Some(kind), _) if kind.peft_type().is_some() => {
                format!("{kind}, scale {}", update.scale)
            }
            (Some(_), _) => "full".into(),
            (None, _) => "bias only".into(),
        };
        let dora = if update.magnitude.is_some() {
            ", DoRA"
        } else {
            ""
        };
        *kinds
            .entry(format!("{component}: {kind}{dora}"))
            .or_default() += 1;
    }
    for (kind, count) in kinds {
        writeln!(text, "{kind}: {count} modules")?;
    }
    writeln!(
        text,
        "parameters: {parameters}; keys used: {}; ignored: {}",
        set.report.used,
        set.report.ignored.len()
    )?;
    for line in set.report.ignored_lines() {
        writeln!(text, "{line}")?;
    }
    for warning in &set.report.warnings {
        writeln!(text, "warning: {warning}")?;
    }
    for line in table(&set.report.readings) {
        writeln!(text, "{line}")?;
    }
    for (component, module, _) in set.iter() {
        writeln!(text, "  {component}.{module}")?;
    }
    for (key, value) in &set.metadata {
        writeln!(text, "metadata {}: {}", one_line(key), one_line(value))?;
    }
    Ok(())
}
