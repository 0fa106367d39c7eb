//! `flux-lora export`: a finished LoRA as a folder to upload: the formats that are asked for, samples, and a model card.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use flux_model::lora::{LoraFormat, LoraSet, ModelShape, WriteOptions, read, write};

use crate::cli::{ExportArgs, UsageError};
use crate::config::RunConfig;
use crate::hub::HubId;
use crate::nearest::one_line;
use crate::report::{Sample, open_run, samples};
use crate::run::folder::RunDir;
use crate::run::header;

/// What is known of a base model by its repository: what its licence is called on the Hub, and where the text is.
struct Licence {
    repository: &'static str,
    id: &'static str,
    name: Option<&'static str>,
}

const DEV_LICENCE: Option<&str> = Some("flux-1-dev-non-commercial-license");
const KLEIN_LICENCE: Option<&str> = Some("flux-non-commercial-license");
const LICENCES: [Licence; 9] = [
    Licence {
        repository: "black-forest-labs/FLUX.1-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-Krea-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-Kontext-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-Fill-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-schnell",
        id: "apache-2.0",
        name: None,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-base-4B",
        id: "apache-2.0",
        name: None,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-4B",
        id: "apache-2.0",
        name: None,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-base-9B",
        id: "other",
        name: KLEIN_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-9B",
        id: "other",
        name: KLEIN_LICENCE,
    },
];

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
/// A run without a finished LoRA, a folder that exists, a format that cannot hold the LoRA.
pub(crate) fn export(args: &ExportArgs) -> anyhow::Result<Exported> {
    let run = open_run(&args.run)?;
    let lora = run.lora_path();
    if !lora.is_file() {
        bail!(
            "{} has no finished LoRA yet: let the run end (or stop it and resume it with --steps), or use `flux-lora convert` on a checkpoint",
            run.path().display()
        );
    }
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
    let set = read(&lora, &ModelShape::default())?;
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let (mut notes, mut weights, mut files) = (Vec::new(), BTreeMap::new(), Vec::new());
    for format in formats {
        let file = match format {
            LoraFormat::Diffusers => format!("{name}.safetensors"),
            LoraFormat::Peft => format!("{name}-peft"),
            other => format!("{name}-{other}.safetensors"),
        };
        let written = write(&set, format, &folder.join(&file), &WriteOptions::default())
            .with_context(|| format!("write {file}"))?;
        notes.extend(
            written
                .notes
                .into_iter()
                .map(|note| format!("{file}: {note}")),
        );
        files.push(file.clone());
        weights.insert(format.name(), file);
    }
    let config = run_config(&run)?;
    let pictures = copy_samples(&run, &folder)?;
    files.extend(pictures.iter().map(|(_, file)| file.clone()));
    let card = Card {
        name: &name,
        base: base(args.base.as_deref(), &config)?,
        trigger: args
            .trigger
            .as_deref()
            .or(config.dataset.trigger_word.as_deref()),
        set: &set,
        config: &config,
        weights,
        pictures: &pictures,
    };
    if card.base.is_none() {
        notes.push("which base model this is for is not known here: name it with --base OWNER/NAME, and state the licence in README.md".into());
    }
    if card.trigger.is_none() {
        notes.push(
            "no trigger word is told: if the captions have one, name it with --trigger".into(),
        );
    }
    let readme = folder.join("README.md");
    fs::write(&readme, card.text()?).with_context(|| format!("write {}", readme.display()))?;
    files.push("README.md".into());
    Ok(Exported {
        folder,
        files,
        notes,
    })
}

fn name_of(run: &RunDir) -> String {
    let path = fs::canonicalize(run.path()).unwrap_or_else(|_| run.path().into());
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().replace(' ', "-")
}

fn formats(to: &[String]) -> anyhow::Result<Vec<LoraFormat>> {
    let mut formats = Vec::new();
    for name in to {
        match (name.as_str(), LoraFormat::parse(name)) {
            ("all", _) => formats.extend(LoraFormat::ALL),
            (_, Some(format)) => formats.push(format),
            _ => bail!(UsageError(format!(
                "--to {}: diffusers, peft, kohya, comfyui or all",
                one_line(name)
            ))),
        }
    }
    let mut seen = Vec::new();
    formats.retain(|format| {
        !seen.contains(format) && {
            seen.push(*format);
            true
        }
    });
    Ok(formats)
}

fn run_config(run: &RunDir) -> anyhow::Result<RunConfig> {
    let path = run.config_path();
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(RunConfig::from_toml(&text, &path, &[])?)
}

/// The last picture of each prompt, under a name of its own.
fn copy_samples(run: &RunDir, folder: &Path) -> anyhow::Result<Vec<(usize, String)>> {
    let mut last: BTreeMap<usize, Sample> = BTreeMap::new();
    for sample in samples(run) {
        last.insert(sample.index, sample);
    }
    let mut copied = Vec::new();
    for (index, sample) in last {
        let file = format!("sample-{index}.png");
        fs::copy(&sample.path, folder.join(&file))
            .with_context(|| format!("copy {}", sample.path.display()))?;
        copied.push((index, file));
    }
    Ok(copied)
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

/// `README.md` as the Hub reads it.
struct Card<'a> {
    name: &'a str,
    base: Option<String>,
    trigger: Option<&'a str>,
    set: &'a LoraSet,
    config: &'a RunConfig,
    /// File by format.
    weights: BTreeMap<&'static str, String>,
    /// Index of the prompt, and file.
    pictures: &'a [(usize, String)],
}

impl Card<'_> {
    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        self.front(&mut text)?;
        writeln!(text, "\n# {}\n", self.name)?;
        match &self.base {
            Some(base) => writeln!(text, "A LoRA for [{base}](https://huggingface.co/{base}).")?,
            None => writeln!(text, "A LoRA for a FLUX model.")?,
        }
        if let Some(trigger) = self.trigger {
            writeln!(text, "\nUse `{trigger}` in the prompt.")?;
        }
        if !self.pictures.is_empty() {
            writeln!(text, "\n| prompt | |\n|---|---|")?;
            for (index, file) in self.pictures {
                let prompt = self.prompt(*index).replace('|', "\\|");
                writeln!(text, "| {prompt} | ![{file}]({file}) |")?;
            }
        }
        self.use_it(&mut text)?;
        self.training(&mut text)?;
        self.licence(&mut text)?;
        Ok(text)
    }

    fn prompt(&self, index: usize) -> String {
        let prompts = self.config.sample.iter().flat_map(|sample| &sample.prompts);
        prompts
            .into_iter()
            .nth(index)
            .map(|prompt| one_line(prompt))
            .unwrap_or_default()
    }

    /// Metadata in YAML; strings are JSON's, which YAML reads.
    fn front(&self, text: &mut String) -> std::fmt::Result {
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        writeln!(
            text,
            "---\ntags:\n- text-to-image\n- lora\n- diffusers\n- template:diffusion-lora\n- flux"
        )?;
        if let Some(base) = &self.base {
            writeln!(text, "base_model: {base}")?;
        }
        if let Some(licence) = self.known() {
            writeln!(text, "license: {}", licence.id)?;
            if let Some(name) = licence.name {
                let repository = licence.repository;
                writeln!(
                    text,
                    "license_name: {name}\nlicense_link: https://huggingface.co/{repository}/blob/main/LICENSE.md"
                )?;
            }
        }
        if let Some(trigger) = self.trigger {
            writeln!(text, "instance_prompt: {}", quoted(trigger))?;
        }
        if !self.pictures.is_empty() {
            writeln!(text, "widget:")?;
            for (index, file) in self.pictures {
                writeln!(
                    text,
                    "- text: {}\n  output:\n    url: {file}",
                    quoted(&self.prompt(*index))
                )?;
            }
        }
        writeln!(text, "---")
    }

    fn known(&self) -> Option<&'static Licence> {
        let base = self.base.as_deref()?;
        LICENCES
            .iter()
            .find(|licence| licence.repository.eq_ignore_ascii_case(base))
    }

    fn use_it(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n## Use it")?;
        if let Some(file) = self.weights.get("diffusers") {
            let base = self.base.as_deref().unwrap_or("BASE_MODEL");
            let prompt = self
                .trigger
                .map_or_else(|| self.prompt(0), |trigger| format!("a photo of {trigger}"));
            let prompt = serde_json::Value::from(prompt);
            writeln!(
                text,
                "\n**diffusers**\n\n```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n\
                 pipe = DiffusionPipeline.from_pretrained(\"{base}\", torch_dtype=torch.bfloat16).to(\"cuda\")\n\
                 pipe.load_lora_weights(\"PATH_OR_REPOSITORY\", weight_name=\"{file}\")\n\
                 image = pipe({prompt}).images[0]\n```"
            )?;
            writeln!(
                text,
                "\n**flux-lora**\n\n```console\n$ flux-lora sample --model {base} --lora {file} --prompt {prompt} --out image.png\n```"
            )?;
        }
        let comfy = self
            .weights
            .get("comfyui")
            .or_else(|| self.weights.get("diffusers"));
        if let Some(file) = comfy {
            writeln!(
                text,
                "\n**ComfyUI**: put `{file}` into `models/loras` and use *Load LoRA*, strength 1."
            )?;
        }
        if let Some(file) = self.weights.get("kohya") {
            writeln!(
                text,
                "\n**Forge, kohya's sd-scripts**: `{file}` (Forge: `models/Lora`, and `<lora:{}:1>` in the prompt).",
                file.trim_end_matches(".safetensors")
            )?;
        }
        if let Some(folder) = self.weights.get("peft") {
            writeln!(
                text,
                "\n**PEFT**: the folder `{folder}`, with `PeftModel.from_pretrained(pipe.transformer, \"{folder}\")`."
            )?;
        }
        Ok(())
    }

    fn training(&self, text: &mut String) -> std::fmt::Result {
        let header = |key: &str| self.set.metadata.get(key).map(|value| one_line(value));
        let lora = &self.config.lora;
        let mut rows = vec![
            (
                "rank, alpha".to_string(),
                Some(format!("{}, {}", lora.r, lora.lora_alpha)),
            ),
            ("layers".to_string(), Some(self.set.len().to_string())),
        ];
        for (name, key) in [
            ("steps", "ss_steps"),
            ("pictures", "ss_num_train_images"),
            ("resolution", "modelspec.resolution"),
            ("pictures a step", "ss_total_batch_size"),
            ("optimizer", "ss_optimizer"),
            ("learning rate", "ss_learning_rate"),
            ("schedule", "ss_lr_scheduler"),
            ("seed", "ss_seed"),
            ("program", header::VERSION),
            ("SHA-256 of the base's transformer", header::BASE),
            ("SHA-256 of the data", header::DATA),
        ] {
            let value = header(key);
            let value = if key == header::VERSION {
                value.map(|version| format!("flux-lora {version}"))
            } else {
                value
            };
            rows.push((name.into(), value));
        }
        writeln!(text, "\n## Training\n\n| | |\n|---|---|")?;
        for (name, value) in rows
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
        {
            writeln!(text, "| {name} | {value} |")?;
        }
        writeln!(
            text,
            "\nThe header of each file has all settings (`{}`).",
            header::CONFIG
        )
    }

    fn licence(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n## Licence\n")?;
        match self.known() {
            Some(Licence {
                repository,
                name: Some(name),
                ..
            }) => writeln!(
                text,
                "This is a derivative of {repository}, so its [{name}](https://huggingface.co/{repository}/blob/main/LICENSE.md) holds for it: non-commercial use, and the licence has to come with it. Read it before you share or use this."
            ),
            Some(Licence { repository, id, .. }) => writeln!(
                text,
                "{id}, as {repository}, of which this is a derivative."
            ),
            None => writeln!(
                text,
                "A LoRA is a derivative of its base model: the base model's licence holds for it."
            ),
        }
    }
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
        assert_eq!(parse(&["kohya", "kohya"]).unwrap(), [LoraFormat::Kohya]);
        assert!(parse(&["a1111"]).is_err());
    }
}
