//! `flux-lora export`: a finished LoRA as a folder to upload: the formats that are asked for, samples, and a model card.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, bail};
use flux_model::lora::{
    LoraFormat, LoraFormatError, LoraSet, ModelShape, WriteOptions, read, write,
};
use lora_core::files::safetensors::TensorFile;
use lora_core::kinds::parts::Kind;
use lora_core::training::optimizers::OptimizerConfig;
use tracing::warn;

use self::card::{Card, LICENCES};
use crate::cli::{ExportArgs, UsageError, Which};
use crate::config::RunConfig;
use crate::hub::HubId;
use crate::nearest::one_line;
use crate::report::{Sample, open_run, samples};
use crate::run::checkpoint::{AVERAGE, LORA, read_state};
use crate::run::folder::RunDir;
use crate::run::header;
use crate::run::manifest::Verified;

mod card;

/// What was written.
pub(crate) struct Exported {
    /// The folder.
    pub(crate) folder: PathBuf,
    /// The files in it.
    pub(crate) files: Vec<String>,
    /// What is to be seen to by hand.
    pub(crate) notes: Vec<String>,
}

/// Writes the folder.
///
/// # Errors
/// A run without the LoRA that is asked for, a folder that exists, a format that cannot hold the LoRA.
pub(crate) fn export(args: &ExportArgs) -> anyhow::Result<Exported> {
    let run = open_run(&args.run)?;
    let chosen = chosen(&run, args.which)?;
    let folder = args
        .out
        .clone()
        .unwrap_or_else(|| run.path().join("export"));
    let taken =
        fs::read_dir(&folder).map_or(folder.exists(), |mut entries| entries.next().is_some());
    if taken && !args.overwrite {
        bail!(UsageError(format!(
            "{} exists: choose another --out, or add --overwrite",
            folder.display()
        )));
    }
    let name = match &args.name {
        Some(name) => name.clone(),
        None => name_of(&run),
    };
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || !name.chars().all(plain) || name.starts_with('.') {
        bail!(UsageError(format!(
            "--name {}: letters, digits, `-`, `_` and `.` alone",
            one_line(&name)
        )));
    }
    let formats = formats(&args.to)?;
    let config = run_config(&run)?;
    let set = chosen.read()?;
    let formats = match formats.is_empty() {
        true => usual(&set),
        false => formats,
    };
    let shown = last_samples(&run, chosen.step);
    let base = base(args.base.as_deref(), &config)?;
    let trigger = args.trigger.as_deref();
    let trigger = trigger.or(config.dataset.trigger_word.as_deref());
    let (files, mut notes) = whole_or_nothing(&folder, |part| {
        let (weights, notes) = write_weights(&set, &formats, &config.write_options(), &name, part)?;
        let pictures = copy_samples(&shown, part)?;
        let mut files: Vec<String> = weights.values().cloned().collect();
        files.extend(pictures.iter().map(|(_, file)| file.clone()));
        files.push("README.md".into());
        let card = Card {
            name: &name,
            base: base.clone(),
            trigger,
            set: &set,
            config: &config,
            weights,
            pictures: &pictures,
        };
        fs::write(part.join("README.md"), card.text()?).context("write README.md")?;
        Ok((files, notes))
    })?;
    if base.is_none() {
        notes.push("which base model this is for is not known here: name it with --base OWNER/NAME, and state the licence in README.md".into());
    }
    if trigger.is_none() {
        notes.push(
            "no trigger word is told: if the captions have one, name it with --trigger".into(),
        );
    }
    let shown = shown.values().map(|sample| sample.step).max();
    notes.extend(other_samples(args.which, chosen.step, shown, &config));
    Ok(Exported {
        folder,
        files,
        notes,
    })
}

/// Writes the LoRA in each of `formats` into `folder`; back come the files by format, and what is to be said of them. A format
/// that was not asked for by its name and cannot hold the LoRA is left out.
fn write_weights(
    set: &LoraSet,
    formats: &[Asked],
    options: &WriteOptions,
    name: &str,
    folder: &Path,
) -> anyhow::Result<(BTreeMap<&'static str, String>, Vec<String>)> {
    let (mut weights, mut notes) = (BTreeMap::new(), Vec::new());
    for &Asked { format, by_name } in formats {
        let file = match format {
            LoraFormat::Diffusers => format!("{name}.safetensors"),
            LoraFormat::Peft => format!("{name}-peft"),
            other => format!("{name}-{other}.safetensors"),
        };
        match write(set, format, &folder.join(&file), options) {
            Ok(written) => {
                let said = written.lost_lines().into_iter().chain(written.notes);
                notes.extend(said.map(|note| format!("{file}: {note}")));
                weights.insert(format.name(), file);
            }
            Err(error @ LoraFormatError::Unrepresentable { .. }) if !by_name => {
                notes.push(format!("left out: {error}"));
            }
            Err(error @ LoraFormatError::Unrepresentable { .. }) => {
                bail!("{error}; --to all leaves out what cannot hold it");
            }
            Err(error) => return Err(error).with_context(|| format!("write {file}")),
        }
    }
    if weights.is_empty() {
        bail!("no format can hold this LoRA: {}", notes.join("; "));
    }
    Ok((weights, notes))
}

/// Has `fill` write into a folder of its own in `folder`, and moves what is there up: what fails leaves `folder` as it was.
fn whole_or_nothing<T>(
    folder: &Path,
    fill: impl FnOnce(&Path) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let existed = folder.exists();
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let filled = || {
        let part = tempfile::Builder::new().prefix(".part-").tempdir_in(folder);
        let part = part.with_context(|| format!("write to {}", folder.display()))?;
        let filled = fill(part.path())?;
        move_files(part.path(), folder)
            .with_context(|| format!("write to {}", folder.display()))?;
        Ok(filled)
    };
    let filled = filled();
    if filled.is_err() && !existed {
        let _ = fs::remove_dir(folder); // it is empty, or somebody else's by now
    }
    filled
}

fn move_files(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => {
                fs::create_dir_all(&target)?;
                move_files(&entry.path(), &target)?;
            }
            false => fs::rename(entry.path(), target)?,
        }
    }
    Ok(())
}

/// The weights that are exported.
struct Chosen {
    file: PathBuf,
    /// Steps after which they were so.
    step: Option<u64>,
    /// The checkpoint they are from.
    checkpoint: Option<Verified>,
}

impl Chosen {
    /// The LoRA, with a header that says how it was made, which a checkpoint's has not.
    fn read(&self) -> anyhow::Result<LoraSet> {
        let mut set = read(&self.file, &ModelShape::default())?;
        if let Some(Verified { dir, manifest, .. }) = &self.checkpoint {
            let state = read_state(dir)?;
            let config = RunConfig::from_toml(&state.config, &dir.join("state.json"), &[])?;
            let data = &manifest.dataset_digest;
            let header = header::header(&config, &state, data, manifest.step, &set.shape)?;
            set.metadata.extend(header);
        }
        Ok(set)
    }
}

fn chosen(run: &RunDir, which: Which) -> anyhow::Result<Chosen> {
    let in_run = |file: PathBuf, missing: &str| {
        if !file.is_file() {
            bail!("{} {missing}", run.path().display());
        }
        let header = TensorFile::open(&file)?;
        let step = header.metadata().get(header::STEPS);
        Ok(Chosen {
            step: step.and_then(|step| step.parse().ok()),
            file,
            checkpoint: None,
        })
    };
    let in_checkpoint = |name: &str, missing: &str| {
        let (checkpoint, rejected) = run.newest_valid()?;
        for rejected in rejected {
            warn!("passed over: {rejected}");
        }
        let file = checkpoint.path(name).with_context(|| missing.to_string())?;
        Ok(Chosen {
            file,
            step: Some(checkpoint.manifest.step),
            checkpoint: Some(checkpoint),
        })
    };
    match which {
        Which::Finished => in_run(
            run.lora_path(),
            "has no finished LoRA yet: let the run end, or export what it has: --which last, or best where it validates",
        ),
        Which::Best => in_run(
            run.best_path(),
            "has no LoRA of a best validation: a run has one after its first validation, with a [validation] section",
        ),
        Which::Last => in_checkpoint(LORA, "the checkpoint has no LoRA"),
        Which::Average => in_checkpoint(
            AVERAGE,
            "the run keeps no average: [ema] or optimizer.name = \"schedule_free_adamw\" does",
        ),
    }
}

fn name_of(run: &RunDir) -> String {
    let path = fs::canonicalize(run.path()).unwrap_or_else(|_| run.path().into());
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().replace(' ', "-")
}

/// A format to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    format: LoraFormat,
    /// Whether it was named, and not only meant by `all` or by nothing.
    by_name: bool,
}

/// What is written where no format is named: what most programs read, or of an adapter that is no LoRA whatever can hold it.
fn usual(set: &LoraSet) -> Vec<Asked> {
    let is_lora = |kind| matches!(kind, Kind::Lora | Kind::Whole);
    let plain = set
        .iter()
        .all(|(_, _, update)| update.kind().is_none_or(is_lora));
    let formats = match plain {
        true => &[LoraFormat::Diffusers, LoraFormat::Kohya][..],
        false => &LoraFormat::ALL,
    };
    let asked = |&format: &LoraFormat| Asked {
        format,
        by_name: false,
    };
    formats.iter().map(asked).collect()
}

fn formats(to: &[String]) -> anyhow::Result<Vec<Asked>> {
    let mut formats: Vec<Asked> = Vec::new();
    let mut add = |format: LoraFormat, by_name: bool| match formats
        .iter_mut()
        .find(|asked| asked.format == format)
    {
        Some(asked) => asked.by_name |= by_name,
        None => formats.push(Asked { format, by_name }),
    };
    for name in to {
        match (name.as_str(), LoraFormat::parse(name)) {
            ("all", _) => LoraFormat::ALL
                .into_iter()
                .for_each(|format| add(format, false)),
            (_, Some(format)) => add(format, true),
            _ => bail!(UsageError(format!(
                "--to {}: diffusers, peft, kohya, comfyui or all",
                one_line(name)
            ))),
        }
    }
    Ok(formats)
}

fn run_config(run: &RunDir) -> anyhow::Result<RunConfig> {
    let path = run.config_path();
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(RunConfig::from_toml(&text, &path, &[])?)
}

/// The last picture of each prompt up to a step.
fn last_samples(run: &RunDir, until: Option<u64>) -> BTreeMap<usize, Sample> {
    let samples = samples(run).into_iter();
    let samples = samples.filter(|sample| until.is_none_or(|until| sample.step <= until));
    samples.map(|sample| (sample.index, sample)).collect()
}

/// Copies each under a name of its own; back come the indices of their prompts with the files.
fn copy_samples(
    samples: &BTreeMap<usize, Sample>,
    folder: &Path,
) -> anyhow::Result<Vec<(usize, String)>> {
    let copy = |(index, sample): (&usize, &Sample)| {
        let file = format!("sample-{index}.png");
        fs::copy(&sample.path, folder.join(&file))
            .with_context(|| format!("copy {}", sample.path.display()))?;
        Ok((*index, file))
    };
    samples.iter().map(copy).collect()
}

/// What is said where the samples are not of the weights that are exported.
fn other_samples(
    which: Which,
    exported: Option<u64>,
    shown: Option<u64>,
    config: &RunConfig,
) -> Option<String> {
    let (exported, shown) = (exported?, shown?);
    let schedule_free = matches!(config.optimizer.rule, OptimizerConfig::ScheduleFreeAdamw(_));
    let of_average = (config.ema.as_ref()).map_or(schedule_free, |ema| ema.sample);
    let is_average = match which {
        Which::Last => false,
        Which::Average => true,
        Which::Finished | Which::Best => {
            (config.ema.as_ref()).map_or(schedule_free, |ema| ema.export)
        }
    };
    if shown != exported {
        return Some(format!(
            "the samples are those after step {shown}, and the LoRA is that after step {exported}"
        ));
    }
    (of_average != is_average).then(|| {
        let of = if of_average {
            "the average of the weights"
        } else {
            "the weights themselves"
        };
        format!("the samples were made with {of}, which is not what is exported")
    })
}

/// The repository of the base model: as named, as the configuration names it, or by the name of the folder.
fn base(named: Option<&str>, config: &RunConfig) -> anyhow::Result<Option<String>> {
    if let Some(named) = named {
        return match HubId::parse(named) {
            Some(id) => Ok(Some(id.repository)),
            None => bail!(UsageError(format!(
                "--base {}: write OWNER/NAME",
                one_line(named)
            ))),
        };
    }
    let path = &config.model.path;
    if let Some(id) = path.to_str().and_then(HubId::parse) {
        return Ok(Some(id.repository));
    }
    let found = path.iter().rev().find_map(|part| {
        let part = part.to_string_lossy();
        let cached = part
            .strip_prefix("models--")
            .map(|name| name.replacen("--", "/", 1));
        let known = LICENCES.iter().map(|licence| licence.repository);
        cached.or_else(|| {
            known
                .into_iter()
                .find(|known| known.ends_with(&format!("/{part}")))
                .map(String::from)
        })
    });
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_known_by_what_the_configuration_says() {
        let base = |path: &str| {
            let mut config = RunConfig::default();
            config.model.path = path.into();
            super::base(None, &config).unwrap()
        };
        assert_eq!(base("anna/my-flux@v2").as_deref(), Some("anna/my-flux"));
        assert_eq!(
            base("/models/FLUX.1-dev").as_deref(),
            Some("black-forest-labs/FLUX.1-dev")
        );
        let cached = "/c/hub/models--black-forest-labs--FLUX.1-schnell/snapshots/0123";
        assert_eq!(
            base(cached).as_deref(),
            Some("black-forest-labs/FLUX.1-schnell")
        );
        assert_eq!(base("/models/mine"), None);
        assert!(super::base(Some("nonsense"), &RunConfig::default()).is_err());
    }

    #[test]
    fn formats_are_named_once() {
        let parse =
            |names: &[&str]| formats(&names.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(parse(&["kohya", "all"]).unwrap().len(), 4);
        let kohya = [Asked {
            format: LoraFormat::Kohya,
            by_name: true,
        }];
        assert_eq!(parse(&["kohya", "kohya"]).unwrap(), kohya);
        assert!(parse(&["a1111"]).is_err());
    }
}
