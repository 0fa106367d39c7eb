//! The configuration of a run as a whole: where it is read from, and the rules that involve more than one section.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use flux_model::lora::WriteOptions;
use flux_model::weights::BaseDtype;
use lora_core::files::digest::sha256_hex;
use lora_core::files::strict_json::read_file;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::checkpoint::CheckpointSection;
use super::dataset::DatasetSection;
use super::ema::EmaSection;
use super::error::{ConfigError, set_error, value_error};
use super::export::ExportSection;
use super::keys::{check_keys, check_optimizer};
use super::logging::LoggingSection;
use super::lora::LoraSection;
use super::lr_scheduler::LrSchedulerSection;
use super::memory::MemorySection;
use super::model::ModelSection;
use super::optimizer::OptimizerSection;
use super::preset;
use super::read::{
    Origins, absolute, deserialize_error, insert, lay_over, move_recompute, parse, parse_override,
};
use super::rules::Invalid;
use super::sample::SampleSection;
use super::train::TrainSection;
use super::validation::ValidationSection;
use crate::hub::HubId;
use crate::nearest::{one_line, shown};

/// A run configuration is a page of text; a larger file is something else.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Everything that defines a training run. Only `model.path` and `dataset.path` have no default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The frozen base model.
    pub model: ModelSection,
    /// Images and captions.
    pub dataset: DatasetSection,
    /// Which layers are adapted, and how.
    pub lora: LoraSection,
    /// How gradients become updates.
    pub optimizer: OptimizerSection,
    /// How the learning rate changes over the run.
    pub lr_scheduler: LrSchedulerSection,
    /// The loop and its loss.
    pub train: TrainSection,
    /// What is in memory, and what is read or computed again instead.
    pub memory: MemorySection,
    /// When the run is saved.
    pub checkpoint: CheckpointSection,
    /// What the finished LoRA is written as.
    pub export: ExportSection,
    /// What is written for other programs while the run goes.
    pub logging: LoggingSection,
    /// Preview images; without this section none are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<SampleSection>,
    /// The loss on pictures that are not trained on; without this section it is not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationSection>,
    /// A moving average of the weights; without this section there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaSection>,
}

impl RunConfig {
    /// Reads a configuration file, with `overrides` of the form `section.key=value` on top.
    ///
    /// An override means the same as that line in the file: its value is read as TOML or, where that fails, as a bare
    /// string, and relative paths start at the file's folder either way. The returned paths are absolute.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Self::load_on(None, path, overrides)
    }

    /// The same on a preset, whose values count where the file has none.
    pub fn load_on(
        preset: Option<&str>,
        path: &Path,
        overrides: &[String],
    ) -> Result<Self, ConfigError> {
        let cannot_read = |source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        };
        let not_text = |problem: &str| ConfigError::NotText {
            path: path.to_path_buf(),
            problem: problem.into(),
        };
        let bytes = read_file(path, MAX_FILE_BYTES).map_err(|error| match error.kind() {
            io::ErrorKind::FileTooLarge => not_text("it is larger than 1 MiB"),
            _ => cannot_read(error),
        })?;
        let text = String::from_utf8(bytes).map_err(|error| match error.as_bytes() {
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => not_text("it is UTF-16 text: save it as UTF-8"),
            _ => not_text("it is not UTF-8 text"),
        })?;

        let mut config = Self::from_toml_on(preset, &text, path, overrides)?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = fs::canonicalize(folder).map_err(cannot_read)?;
        for (key, path) in config.paths_mut() {
            let written = absolute(&folder, path);
            if key == "model.path" && is_repository(path) && !written.exists() {
                continue;
            }
            *path = written;
            if path.to_str().is_none() {
                let problem = format!("the path `{}` is not UTF-8", shown(path));
                return Err(value_error(key, "", problem));
            }
        }
        Ok(config)
    }

    /// Reads a configuration from text; `file` only names it in errors, and paths stay as written.
    pub fn from_toml(text: &str, file: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Self::from_toml_on(None, text, file, overrides)
    }

    pub(super) fn from_toml_on(
        preset: Option<&str>,
        text: &str,
        file: &Path,
        overrides: &[String],
    ) -> Result<Self, ConfigError> {
        let mut own = parse(text, file)?;
        move_recompute(&mut own);
        let mut origins = Origins::new(text, file);
        let mut table = Table::new();
        if let Some(name) = preset {
            table = parse(preset::text(name)?, Path::new(name))?;
            origins.preset = Some((name, table.clone()));
        }
        lay_over(&mut table, own);
        for text in overrides {
            let (keys, value) = parse_override(text)?;
            origins.set.insert(keys[..2].join("."));
            insert(&mut table, &keys, value).map_err(|problem| set_error(text, &problem))?;
        }
        move_recompute(&mut table);
        check_keys(&table, &origins)?;
        check_optimizer(&table, &origins)?;
        let mut config: Self = table
            .try_into()
            .map_err(|error| deserialize_error(&error, &origins))?;
        config.lr_scheduler = config.lr_scheduler.resolved();
        config.check().map_err(|(key, problem)| {
            let place = origins.place(key);
            value_error(key, &place, problem)
        })?;
        Ok(config)
    }

    /// Checks ranges and the rules that involve more than one key, for a configuration made or changed by a program.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check()
            .map_err(|(key, problem)| value_error(key, "", problem))
    }

    /// The whole configuration with every default written out; [`RunConfig::from_toml`] gives the same value back.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string_pretty(self).map_err(|error| ConfigError::Write {
            problem: one_line(&error.to_string()),
        })
    }

    /// SHA-256 of [`RunConfig::to_toml`], in hex.
    pub fn digest(&self) -> Result<String, ConfigError> {
        Ok(sha256_hex(self.to_toml()?.as_bytes()))
    }

    /// The sides of images in pixels, with their keys: models may want them to be multiples of more than 16.
    pub(crate) fn sides(&self) -> Vec<(&'static str, u32)> {
        let resolutions = self.dataset.resolution.as_slice().iter();
        let mut sides: Vec<_> = resolutions
            .map(|&side| ("dataset.resolution", side))
            .collect();
        sides.push(("dataset.bucket_step", self.dataset.bucket_step));
        if let Some(sample) = &self.sample {
            sides.extend([
                ("sample.height", sample.height),
                ("sample.width", sample.width),
            ]);
        }
        sides
    }

    /// Whether the finished LoRA is the average of `[ema]`.
    pub(crate) fn exports_ema(&self) -> bool {
        self.ema.as_ref().is_some_and(|ema| ema.export)
    }

    /// How the finished LoRA is written: of a run that trains more than factors, what a format cannot hold is left out, and said.
    pub(crate) fn write_options(&self) -> WriteOptions {
        WriteOptions {
            lossy: self.lora.trains_in_full(),
            ..WriteOptions::default()
        }
    }

    /// What is allowed and hardly meant, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let (warmup, steps) = (self.lr_scheduler.warmup_steps, self.train.steps);
        if warmup == 0 || warmup < steps {
            return Vec::new();
        }
        let reached = self.optimizer.learning_rate * (steps - 1) as f64 / warmup as f64;
        let reached = match reached {
            0.0 => "is 0 throughout, so nothing is learned".to_string(),
            rate => format!("rises to {rate:.1e} and never reaches it"),
        };
        vec![format!(
            "the warm-up (`lr_scheduler.warmup_steps` = {warmup}) is as long as the run or longer (`train.steps` = {steps}): the learning rate, {:.1e}, {reached}",
            self.optimizer.learning_rate
        )]
    }

    /// Every path in the configuration, with its key.
    fn paths_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut PathBuf)> {
        [
            ("model.path", Some(&mut self.model.path)),
            ("model.transformer", self.model.transformer.as_mut()),
            ("model.vae", self.model.vae.as_mut()),
            ("dataset.reference", self.dataset.reference.as_mut()),
            ("dataset.mask", self.dataset.mask.as_mut()),
            ("lora.init_from", self.lora.init_from.as_mut()),
            (
                "sample.preview_vae",
                self.sample
                    .as_mut()
                    .and_then(|sample| sample.preview_vae.as_mut()),
            ),
        ]
        .into_iter()
        .filter_map(|(key, path)| path.map(|path| (key, path)))
        .chain(
            self.dataset
                .folders
                .iter_mut()
                .flat_map(|folder| {
                    let beside = [folder.reference.as_mut(), folder.mask.as_mut()];
                    [Some(&mut folder.path)].into_iter().chain(beside).flatten()
                })
                .map(|path| ("dataset.folders", path)),
        )
        .chain(
            self.validation
                .iter_mut()
                .flat_map(|validation| {
                    [
                        ("validation.path", validation.path.as_mut()),
                        ("validation.reference", validation.reference.as_mut()),
                        ("validation.mask", validation.mask.as_mut()),
                    ]
                })
                .filter_map(|(key, path)| path.map(|path| (key, path))),
        )
        .chain(
            Some(&mut self.dataset.path)
                .filter(|path| !path.as_os_str().is_empty())
                .map(|path| ("dataset.path", path)),
        )
    }

    /// The rules; the error is a key and what is wrong with its value.
    fn check(&self) -> Result<(), Invalid> {
        self.model.check()?;
        self.dataset.check()?;
        self.lora.check()?;
        let few_bits = matches!(self.model.base_dtype, BaseDtype::Q8 | BaseDtype::Nf4);
        if few_bits && !self.lora.modules_to_save.is_empty() {
            let problem = format!(
                "cannot be together with model.base_dtype = \"{}\": what is trained in full starts from the weights as the file has them; use \"as-stored\" or \"bf16\"",
                self.model.base_dtype
            );
            return Err(("lora.modules_to_save", problem));
        }
        self.optimizer.check()?;
        if self.optimizer.text_encoder_lr.is_some() && self.lora.text_encoders().is_empty() {
            let problem =
                "has no effect where no text encoder is trained: add `[lora.text_encoder]`";
            return Err(("optimizer.text_encoder_lr", problem.into()));
        }
        self.lr_scheduler.check(self.optimizer.learning_rate)?;
        self.train.check()?;
        self.memory.check(&self.lora)?;
        self.checkpoint.check()?;
        self.export.check(self.lora.peft_type)?;
        if let Some(validation) = &self.validation {
            validation.check()?;
        }
        if let Some(ema) = &self.ema {
            ema.check(&self.optimizer.rule)?;
        }
        self.sample.as_ref().map_or(Ok(()), SampleSection::check)
    }
}

/// Whether a path has the form of a repository of the Hub.
fn is_repository(path: &Path) -> bool {
    path.to_str()
        .is_some_and(|text| HubId::parse(text).is_some())
}
