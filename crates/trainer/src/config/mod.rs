//! The run configuration: one TOML file, read strictly, kept with the run.
//!
//! Every section is a plain struct, and its `Default` is the only place where defaults live. [`RunConfig::load`] reads the
//! file, applies `--set section.key=value`, checks the rules that types cannot hold and makes paths absolute. Each mistake
//! is one line that names the key and where it was written. The known keys are read from the structs themselves
//! (`fields_of`), so there is no second list to keep in step.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use lora_core::{InitLoraWeights, LoraConfig, OneOrMany, Patterns, PeftType, Targets};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use crate::dataset::{content_digest, is_image_extension};
use crate::nearest::{nearest, one_line, shown};

/// A run configuration is a page of text; a larger file is something else.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Sides of images are multiples of this: 8 for the VAE, 2 for packing latents into tokens.
const SIDE_MULTIPLE_PX: u32 = 16;
/// Sides beyond this are typing errors.
const MAX_SIDE_PX: u32 = 8192;
/// Counts beyond this are typing errors, and their products would overflow.
const MAX_COUNT: usize = 1 << 16;
/// Longest text the T5 encoder is run on for FLUX.1, in tokens.
const MAX_SEQUENCE_LENGTH: usize = 512;

/// What may change between stopping and resuming: keys, or whole sections where the entry ends in a dot.
///
/// Steps already taken keep their meaning. Any other change would silently make the resumed run differ from one that was
/// never stopped.
const MAY_CHANGE_ON_RESUME: [&str; 12] = [
    // Where things are; what they hold is compared by digest.
    "model.path",
    "model.transformer",
    "model.vae",
    "dataset.path",
    // Another way to the same bits.
    "train.recompute",
    // Stops a run, and changes none.
    "train.divergence_factor",
    "train.steps",
    "optimizer.learning_rate",
    "lr_scheduler.",
    "checkpoint.",
    "export.",
    "sample.",
];

/// What diffusers' script and kohya's call some keys, where the spelling gives no hint.
const OTHER_NAMES: [(&str, &str); 17] = [
    ("adapter", "lora.init_from"),
    ("checkpointing_steps", "checkpoint.every"),
    ("checkpoints_total_limit", "checkpoint.keep"),
    ("dim", "lora.r"),
    ("discrete_flow_shift", "train.shift"),
    ("gradient_checkpointing", "train.recompute"),
    ("image_dir", "dataset.path"),
    ("instance_data_dir", "dataset.path"),
    ("lr", "optimizer.learning_rate"),
    ("network_alpha", "lora.lora_alpha"),
    ("network_dim", "lora.r"),
    ("pretrained_model_name_or_path", "model.path"),
    ("rank", "lora.r"),
    ("save_every_n_steps", "checkpoint.every"),
    ("train_data_dir", "dataset.path"),
    ("validation_prompt", "sample.prompts"),
    ("weighting_scheme", "train.timestep_sampling"),
];

/// Everything that defines a training run. Only `model.path` and `dataset.path` have no default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
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
    /// When the run is saved.
    pub checkpoint: CheckpointSection,
    /// What the finished LoRA is written as.
    pub export: ExportSection,
    /// Preview images; without this section none are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<SampleSection>,
}

/// The frozen base model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// Folder of a diffusers pipeline (`transformer`, `vae`, `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2`).
    /// Required.
    pub path: PathBuf,
    /// A single `.safetensors` file, in Black Forest Labs' layout, to use for the transformer instead of the folder's.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transformer: Option<PathBuf>,
    /// A single `.safetensors` file, in Black Forest Labs' layout, to use for the autoencoder instead of the folder's.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
}

/// Images and captions, and how they are brought into shape.
///
/// An image is cropped to the nearest of a few aspects, resized to about `resolution * resolution` pixels, and encoded once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetSection {
    /// Folder of images with captions, as [`crate::dataset::scan`] reads it. Required.
    pub path: PathBuf,
    /// Side in pixels of the square whose area no training image exceeds; a multiple of 16. Default 512.
    pub resolution: u32,
    /// Sides of training images are multiples of this many pixels; itself a multiple of 16. Smaller steps crop less and
    /// make more different sizes. Default 64.
    pub bucket_step: u32,
    /// Mirror images left to right, each time with probability 1/2. Default false.
    pub random_flip: bool,
    /// A caption is the file with the image's name and this extension, without the dot. Default "txt".
    pub caption_extension: String,
    /// Probability in [0, 1] of training on the empty caption instead of the image's own. Default 0.
    pub caption_dropout: f64,
    /// Length in tokens that captions are padded or cut to for the T5 encoder, 1 to 512. Default 512.
    pub max_sequence_length: usize,
}

impl Default for DatasetSection {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            resolution: 512,
            bucket_step: 64,
            random_flip: false,
            caption_extension: "txt".into(),
            caption_dropout: 0.0,
            max_sequence_length: 512,
        }
    }
}

/// Which layers are adapted, and how. Names and meanings are those of PEFT's `LoraConfig`, `LoHaConfig` and `LoKrConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSection {
    /// Kind of the update: "LORA", "LOHA" (element-wise product of two low-rank products) or "LOKR" (Kronecker product).
    /// Default "LORA".
    #[serde(skip_serializing_if = "is_lora")]
    pub peft_type: PeftType,
    /// Rank of the update: columns of A, rows of B. Default 16.
    pub r: usize,
    /// Numerator of the scale `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`). Default 16.
    pub lora_alpha: f64,
    /// Layers to adapt: a list of path endings, or one regular expression for the whole path, or "all-linear".
    /// Default: the attention and feed-forward layers that diffusers' FLUX script adapts.
    pub target_modules: Targets,
    /// Layers to leave alone though `target_modules` names them, in the same forms. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Targets>,
    /// Only layers with these indices in their path, where `target_modules` is a list: a number or a list. PEFT finds no index
    /// in a container at the root, so name FLUX's blocks in `target_modules` instead. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Names of the containers whose indices `layers_to_transform` means. Default: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Other ranks for the layers whose path matches the key. Default: none.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub rank_pattern: Patterns<usize>,
    /// Other alphas for the layers whose path matches the key. Default: none.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub alpha_pattern: Patterns<f64>,
    /// Scale by `lora_alpha / sqrt(r)`. Default false.
    pub use_rslora: bool,
    /// Learn the magnitude of each weight row apart from its direction (DoRA). Default false.
    pub use_dora: bool,
    /// Probability in [0, 1) of dropping an input of the adapter. Default 0.
    pub lora_dropout: f64,
    /// How A and B start: "gaussian", true (uniform A, zero B), false (both random), "orthogonal", or as a part of the base
    /// weight, which the update is then less: "pissa", "pissa_niter_N", "olora". LOHA and LOKR: true (no change at first) or
    /// false. Default "gaussian", for LOHA and LOKR true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_lora_weights: Option<InitLoraWeights>,
    /// LOKR: factor the outer matrix as well, where the rank is below half its longer side. Default false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub decompose_both: bool,
    /// LOKR: size of the outer matrix where it divides the layer's, else the largest divisor up to it; -1 for the divisor
    /// nearest to the square root. Default -1.
    #[serde(skip_serializing_if = "is_minus_one")]
    pub decompose_factor: i64,
    /// LoRA file to continue from instead of fresh weights. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
}

impl Default for LoraSection {
    fn default() -> Self {
        let targets = [
            "attn.to_k",
            "attn.to_q",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_k_proj",
            "attn.add_q_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ];
        Self {
            peft_type: PeftType::Lora,
            r: 16,
            lora_alpha: 16.0,
            target_modules: Targets::List(targets.map(String::from).to_vec()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            use_rslora: false,
            use_dora: false,
            lora_dropout: 0.0,
            init_lora_weights: None,
            decompose_both: false,
            decompose_factor: -1,
            init_from: None,
        }
    }
}

fn is_lora(kind: &PeftType) -> bool {
    *kind == PeftType::Lora
}

fn is_minus_one(value: &i64) -> bool {
    *value == -1
}

impl LoraSection {
    /// The same as PEFT's configuration.
    pub fn config(&self) -> LoraConfig {
        LoraConfig {
            peft_type: self.peft_type,
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            decompose_both: self.decompose_both,
            decompose_factor: self.decompose_factor,
            r: self.r,
            lora_alpha: self.lora_alpha,
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            lora_bias: false,
            lora_dropout: self.lora_dropout,
            init_lora_weights: self.init_lora_weights.unwrap_or(match self.peft_type {
                PeftType::Lora => InitLoraWeights::Gaussian,
                PeftType::Loha | PeftType::Lokr => InitLoraWeights::Default,
            }),
            ..LoraConfig::default()
        }
    }
}

/// How gradients become updates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSection {
    /// The update rule. Default "adamw".
    pub name: OptimizerName,
    /// Size of an update, before the schedule. Default 1e-4.
    pub learning_rate: f64,
    /// Decay per step of the running mean of the gradient and of its square, each in [0, 1). Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment, above 0. Default 1e-8.
    pub eps: f64,
    /// Decoupled decay: each step takes `learning_rate * weight_decay` of every factor off. Default 1e-2.
    pub weight_decay: f64,
    /// Gradients are scaled down when their norm over all factors together exceeds this; "none" leaves them. Default 1.
    #[serde(with = "number_or_none")]
    pub max_grad_norm: Option<f64>,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            name: OptimizerName::default(),
            learning_rate: 1e-4,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 1e-2,
            max_grad_norm: Some(1.0),
        }
    }
}

/// The update rules on offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerName {
    /// Adam with decoupled weight decay, arXiv:1711.05101.
    #[default]
    Adamw,
}

/// How the learning rate changes over the run; the rules of diffusers' `get_scheduler`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LrSchedulerSection {
    /// The shape of the curve. Default "constant".
    pub name: LrSchedulerName,
    /// Optimizer steps over which the rate rises from 0; not for "constant". Default 0.
    pub warmup_steps: u64,
    /// Periods of the cosine over the run: 0.5 falls to 0 at the last step. Only for "cosine". Default 0.5.
    pub num_cycles: f64,
}

impl Default for LrSchedulerSection {
    fn default() -> Self {
        Self {
            name: LrSchedulerName::default(),
            warmup_steps: 0,
            num_cycles: 0.5,
        }
    }
}

/// Learning-rate curves, named as in diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerName {
    /// The same rate throughout.
    #[default]
    Constant,
    /// A rise, then the same rate throughout.
    ConstantWithWarmup,
    /// A rise, then a straight fall to 0 at the last step.
    Linear,
    /// A rise, then a cosine.
    Cosine,
}

/// The loop and its loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// Optimizer steps in the whole run. Default 1000.
    pub steps: u64,
    /// Images in one pass through the model. Default 1.
    pub batch_size: usize,
    /// Passes whose mean gradient makes one optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Where all randomness of the run comes from. Default 42.
    pub seed: u64,
    /// Guidance strength told to a guidance-distilled model; 1 is closest to plain flow matching. Default 1.
    pub guidance: f64,
    /// Density that sigma, the share of noise, is drawn from. Default "none".
    pub timestep_sampling: TimestepSampling,
    /// Centre of "logit_normal". Default 0.
    pub logit_mean: f64,
    /// Width of "logit_normal", above 0. Default 1.
    pub logit_std: f64,
    /// Weight of the middle in "mode", -1 to 1.75. Default 1.29.
    pub mode_scale: f64,
    /// Width of "sigmoid", above 0. Default 1.
    pub sigmoid_scale: f64,
    /// Moves the drawn sigma towards noise: a number `s` gives `s * sigma / (1 + (s - 1) * sigma)`, "flux" the shift that
    /// sampling uses at the image's size. Default 1, no shift.
    pub shift: TimestepShift,
    /// Weight of a sample in the loss as a function of sigma. Default "none".
    pub loss_weighting: LossWeighting,
    /// Keep only each block's input and compute its activations again in the backward pass: less memory, more time.
    /// Default true.
    pub recompute: bool,
    /// The run is stopped as diverged when a loss exceeds this many times the loss of predicting 0 for the same samples, or
    /// every gradient is 0; "none" stops only where a number is not finite. An update about to be saved is tried on its last
    /// micro-batch first, which costs one forward pass a save. Default 10.
    #[serde(with = "number_or_none")]
    pub divergence_factor: Option<f64>,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 1,
            gradient_accumulation_steps: 1,
            seed: 42,
            guidance: 1.0,
            timestep_sampling: TimestepSampling::default(),
            logit_mean: 0.0,
            logit_std: 1.0,
            mode_scale: 1.29,
            sigmoid_scale: 1.0,
            shift: TimestepShift::default(),
            loss_weighting: LossWeighting::default(),
            recompute: true,
            divergence_factor: Some(10.0),
        }
    }
}

/// Densities of sigma.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSampling {
    /// Uniform in [0, 1].
    #[default]
    None,
    /// `sigmoid(logit_mean + logit_std * n)` with `n` normal.
    LogitNormal,
    /// Heavy in the middle, arXiv:2403.03206 equation 20, by `mode_scale`.
    Mode,
    /// `sigmoid(sigmoid_scale * n)` with `n` normal.
    Sigmoid,
}

/// How the drawn sigma is moved towards noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TimestepShift {
    /// By this factor at every image size; 1 leaves sigma alone.
    Constant(f64),
    /// By `exp(mu)`, where `mu` grows with the number of image tokens as in FLUX's sampler.
    Flux,
}

impl Default for TimestepShift {
    fn default() -> Self {
        Self::Constant(1.0)
    }
}

/// Weights in the loss, named as in diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossWeighting {
    /// 1.
    #[default]
    None,
    /// `1 / sigma^2`.
    SigmaSqrt,
    /// `2 / (pi * (1 - 2 * sigma + 2 * sigma^2))`.
    Cosmap,
}

/// When the run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSection {
    /// Save each time this many optimizer steps are done, and at the end. Default 100.
    pub every: u64,
    /// Newest checkpoints to keep, at least 2: one more than the one being trusted. Default 2.
    pub keep: usize,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self {
            every: 100,
            keep: 2,
        }
    }
}

/// Preview images made while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleSection {
    /// Texts to make an image of, each time. Required in this section.
    pub prompts: Vec<String>,
    /// Make previews each time this many optimizer steps are done. Default 100.
    pub every: u64,
    /// Denoising steps for an image. Default 20.
    pub num_inference_steps: usize,
    /// Guidance strength told to a guidance-distilled model. Default 3.5.
    pub guidance_scale: f64,
    /// Height in pixels, a multiple of 16. Default 512.
    pub height: u32,
    /// Width in pixels, a multiple of 16. Default 512.
    pub width: u32,
    /// Seed of the previews' own noise. Default 42.
    pub seed: u64,
}

impl Default for SampleSection {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            every: 100,
            num_inference_steps: 20,
            guidance_scale: 3.5,
            height: 512,
            width: 512,
            seed: 42,
        }
    }
}

/// What the finished LoRA is written as.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportSection {
    /// Formats: "diffusers" (`lora.safetensors`, always written), "peft", "kohya", "comfyui" (`lora-kohya.safetensors` and
    /// so on, beside it). Default ["diffusers"]. With `lora.peft_type` LOHA or LOKR, `lora.safetensors` has LyCORIS keys under
    /// diffusers' names, which ComfyUI and ai-toolkit read but diffusers does not, and "kohya" is refused.
    pub formats: Vec<ExportFormat>,
}

impl Default for ExportSection {
    fn default() -> Self {
        Self {
            formats: vec![ExportFormat::Diffusers],
        }
    }
}

/// A LoRA file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportFormat {
    /// diffusers.
    Diffusers,
    /// A PEFT folder.
    Peft,
    /// kohya sd-scripts.
    Kohya,
    /// ComfyUI.
    Comfyui,
}

/// One key that differs between two configurations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// `section.key`.
    pub key: String,
    /// Value before, as TOML writes it, or `unset`.
    pub old: String,
    /// Value after, as TOML writes it, or `unset`.
    pub new: String,
    /// Whether a run may take the new value on resume and still be exact.
    pub allowed: bool,
}

/// Why a configuration was refused; the program exits with 2 on any of these.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read `{}`", shown(path))]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The file is not the text of a configuration.
    #[error("`{}` is not a run configuration: {problem}", shown(path))]
    NotText {
        /// The configuration file.
        path: PathBuf,
        /// What was found instead.
        problem: String,
    },
    /// The file breaks TOML's grammar.
    #[error("{}:{line}:{column}: {problem}", shown(path))]
    Syntax {
        /// The configuration file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A section that does not exist.
    #[error("unknown section `{section}`{place}: did you mean `{nearest}`?")]
    UnknownSection {
        /// As written.
        section: String,
        /// Where, with its preposition: ` in run.toml:3`.
        place: String,
        /// The known section that is spelled most like it.
        nearest: String,
    },
    /// A key that does not exist.
    #[error("unknown key `{key}`{place}: did you mean `{nearest}`?")]
    UnknownKey {
        /// `section.key` as written.
        key: String,
        /// Where, with its preposition: ` in run.toml:3`.
        place: String,
        /// The known key that is spelled most like it.
        nearest: String,
    },
    /// A key with a value it cannot have.
    #[error("`{key}`{place}: {problem}")]
    Value {
        /// `section.key`.
        key: String,
        /// Where, with its preposition: ` in run.toml:3`; empty for a default or a value set by the program.
        place: String,
        /// What is wrong with it, and what is allowed.
        problem: String,
    },
    /// A `--set` that cannot be read.
    #[error("`--set {text}`: {problem}")]
    Set {
        /// As given.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A value that TOML cannot hold.
    #[error("cannot write the configuration as TOML: {problem}")]
    Write {
        /// What TOML cannot hold.
        problem: String,
    },
}

impl RunConfig {
    /// Reads a configuration file, with `overrides` of the form `section.key=value` on top.
    ///
    /// An override means the same as that line in the file: its value is read as TOML or, where that fails, as a bare
    /// string, and relative paths start at the file's folder either way. The returned paths are absolute.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let cannot_read = |source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        };
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
            .map_err(cannot_read)?;
        let not_text = |problem: &str| ConfigError::NotText {
            path: path.to_path_buf(),
            problem: problem.into(),
        };
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(not_text("it is larger than 1 MiB"));
        }
        let text = String::from_utf8(bytes).map_err(|_| not_text("it is not UTF-8 text"))?;

        let mut config = Self::from_toml(&text, path, overrides)?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = fs::canonicalize(folder).map_err(cannot_read)?;
        for (key, path) in config.paths_mut() {
            *path = absolute(&folder, path);
            if path.to_str().is_none() {
                let problem = format!("the path `{}` is not UTF-8", shown(path));
                return Err(value_error(key, "", problem));
            }
        }
        Ok(config)
    }

    /// Reads a configuration from text; `file` only names it in errors, and paths stay as written.
    pub fn from_toml(text: &str, file: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut table = parse(text, file)?;
        let mut origins = Origins::new(text, file);
        for text in overrides {
            let (keys, value) = parse_override(text)?;
            origins.set.insert(keys[..2].join("."));
            insert(&mut table, &keys, value).map_err(|problem| set_error(text, &problem))?;
        }
        check_keys(&table, &origins)?;
        let config: Self = table
            .try_into()
            .map_err(|error| deserialize_error(&error, &origins))?;
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
        Ok(content_digest(self.to_toml()?.as_bytes()))
    }

    /// What changes from this configuration, the recorded one, to `new`, in the order of the keys.
    ///
    /// What steps already taken do not depend on is `allowed`: how many there will be, the learning rate and its schedule,
    /// `checkpoint`, `sample`, where files are and `train.recompute`. Any other change would make the resumed run differ
    /// silently from one that was never stopped.
    pub fn diff(&self, new: &Self) -> Result<Vec<Change>, ConfigError> {
        let (old, new) = (self.flatten()?, new.flatten()?);
        let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        let shown = |value: Option<&String>| value.cloned().unwrap_or_else(|| "unset".into());
        Ok(keys
            .into_iter()
            .filter(|key| old.get(*key) != new.get(*key))
            .map(|key| Change {
                key: key.clone(),
                old: shown(old.get(key)),
                new: shown(new.get(key)),
                allowed: may_change_on_resume(key),
            })
            .collect())
    }

    /// Every `section.key` with its value as TOML writes it; as text, so that the order of patterns counts.
    fn flatten(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let sections = Table::try_from(self).map_err(|error| ConfigError::Write {
            problem: one_line(&error.to_string()),
        })?;
        let mut flat = BTreeMap::new();
        for (section, keys) in sections {
            for (key, value) in keys.as_table().into_iter().flatten() {
                flat.insert(format!("{section}.{key}"), value.to_string());
            }
        }
        Ok(flat)
    }

    /// Every path in the configuration, with its key.
    fn paths_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut PathBuf)> {
        [
            ("model.path", Some(&mut self.model.path)),
            ("model.transformer", self.model.transformer.as_mut()),
            ("model.vae", self.model.vae.as_mut()),
            ("dataset.path", Some(&mut self.dataset.path)),
            ("lora.init_from", self.lora.init_from.as_mut()),
        ]
        .into_iter()
        .filter_map(|(key, path)| path.map(|path| (key, path)))
    }

    /// The rules; the error is a key and what is wrong with its value.
    fn check(&self) -> Result<(), Invalid> {
        self.model.check()?;
        self.dataset.check()?;
        self.lora.check()?;
        self.optimizer.check()?;
        self.lr_scheduler.check()?;
        self.train.check()?;
        self.checkpoint.check()?;
        self.export.check(self.lora.peft_type)?;
        self.sample.as_ref().map_or(Ok(()), SampleSection::check)
    }
}

/// Whether a run may take another value for `key` (`section.key`) on resume and still be exact.
fn may_change_on_resume(key: &str) -> bool {
    MAY_CHANGE_ON_RESUME
        .iter()
        .any(|entry| key == *entry || (entry.ends_with('.') && key.starts_with(entry)))
}

// Rules

/// A key and what is wrong with its value.
type Invalid = (&'static str, String);

/// What a number must be, in words and as a test; NaN and infinity are never it.
struct Rule(&'static str, fn(f64) -> bool);

const FINITE: Rule = Rule("a finite number", |_| true);
const ABOVE_0: Rule = Rule("above 0", |x| x > 0.0);
const AT_LEAST_0: Rule = Rule("at least 0", |x| x >= 0.0);
const BELOW_1: Rule = Rule("at least 0 and below 1", |x| (0.0..1.0).contains(&x));
const PROBABILITY: Rule = Rule("between 0 and 1", |x| (0.0..=1.0).contains(&x));
/// Above `2 / (pi - 2)` the "mode" density folds back and leaves [0, 1] (arXiv:2403.03206, section 3.1).
const MODE_SCALE: Rule = Rule("between -1 and 1.75", |x| {
    (-1.0..=2.0 / (std::f64::consts::PI - 2.0)).contains(&x)
});

impl Rule {
    fn check(&self, key: &'static str, value: f64) -> Result<(), Invalid> {
        let Self(rule, holds) = self;
        if value.is_finite() && holds(value) {
            return Ok(());
        }
        Err((key, format!("must be {rule}, found {value}")))
    }
}

impl ModelSection {
    fn check(&self) -> Result<(), Invalid> {
        check_path("model.path", Some(&self.path))?;
        check_path("model.transformer", self.transformer.as_deref())?;
        check_path("model.vae", self.vae.as_deref())
    }
}

impl DatasetSection {
    fn check(&self) -> Result<(), Invalid> {
        check_path("dataset.path", Some(&self.path))?;
        check_side("dataset.resolution", self.resolution)?;
        check_side("dataset.bucket_step", self.bucket_step)?;
        if self.bucket_step > self.resolution {
            let problem = format!(
                "must be at most dataset.resolution = {}, found {}",
                self.resolution, self.bucket_step
            );
            return Err(("dataset.bucket_step", problem));
        }
        let extension = &self.caption_extension;
        let is_plain = extension.chars().all(|c| c.is_ascii_alphanumeric());
        if extension.is_empty() || !is_plain || is_image_extension(extension) {
            let found = one_line(extension);
            let problem = format!("must be a file extension such as \"txt\", found \"{found}\"");
            return Err(("dataset.caption_extension", problem));
        }
        PROBABILITY.check("dataset.caption_dropout", self.caption_dropout)?;
        check_count(
            "dataset.max_sequence_length",
            self.max_sequence_length,
            MAX_SEQUENCE_LENGTH,
        )
    }
}

impl LoraSection {
    fn check(&self) -> Result<(), Invalid> {
        check_count("lora.r", self.r, MAX_COUNT)?;
        ABOVE_0.check("lora.lora_alpha", self.lora_alpha)?;
        for (_, &r) in self.rank_pattern.iter() {
            check_count("lora.rank_pattern", r, MAX_COUNT)?;
        }
        for (_, &alpha) in self.alpha_pattern.iter() {
            ABOVE_0.check("lora.alpha_pattern", alpha)?;
        }
        let nothing = match &self.target_modules {
            Targets::Pattern(pattern) => pattern.is_empty(),
            Targets::List(endings) => endings.is_empty(),
        };
        if nothing {
            return Err(("lora.target_modules", "must name at least one layer".into()));
        }
        BELOW_1.check("lora.lora_dropout", self.lora_dropout)?;
        if self.peft_type != PeftType::Lora && self.init_from.is_some() {
            let problem = format!(
                "continues low-rank factors, which `peft_type` {} has none of: remove it",
                self.peft_type
            );
            return Err(("lora.init_from", problem));
        }
        if let Some(init) = self.init_lora_weights.filter(|init| init.splits_base())
            && self.init_from.is_some()
        {
            let problem = format!(
                "has factors of its own, which `lora.init_lora_weights` {init} would make anew: remove one of the two"
            );
            return Err(("lora.init_from", problem));
        }
        self.config()
            .validate()
            .map_err(|error| ("lora", format!("is not valid: {error}")))?;
        check_path("lora.init_from", self.init_from.as_deref())
    }
}

impl OptimizerSection {
    fn check(&self) -> Result<(), Invalid> {
        ABOVE_0.check("optimizer.learning_rate", self.learning_rate)?;
        for beta in self.betas {
            BELOW_1.check("optimizer.betas", beta)?;
        }
        ABOVE_0.check("optimizer.eps", self.eps)?;
        AT_LEAST_0.check("optimizer.weight_decay", self.weight_decay)?;
        if let Some(norm) = self.max_grad_norm {
            let rule = Rule("above 0, or \"none\" for no clipping", ABOVE_0.1);
            rule.check("optimizer.max_grad_norm", norm)?;
        }
        Ok(())
    }
}

impl ExportSection {
    fn check(&self, kind: PeftType) -> Result<(), Invalid> {
        if kind != PeftType::Lora && self.formats.contains(&ExportFormat::Kohya) {
            let problem = format!(
                "cannot be \"kohya\" with lora.peft_type = \"{kind}\": it has query, key and value in one layer; use \"comfyui\" or \"peft\""
            );
            return Err(("export.formats", problem));
        }
        Ok(())
    }
}

impl LrSchedulerSection {
    fn check(&self) -> Result<(), Invalid> {
        if self.name == LrSchedulerName::Constant && self.warmup_steps > 0 {
            let problem = format!(
                "has no effect with name = \"constant\", found {}: use \"constant_with_warmup\"",
                self.warmup_steps
            );
            return Err(("lr_scheduler.warmup_steps", problem));
        }
        ABOVE_0.check("lr_scheduler.num_cycles", self.num_cycles)
    }
}

impl TrainSection {
    fn check(&self) -> Result<(), Invalid> {
        check_at_least_1("train.steps", self.steps)?;
        check_count("train.batch_size", self.batch_size, MAX_COUNT)?;
        check_count(
            "train.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            MAX_COUNT,
        )?;
        check_seed("train.seed", self.seed)?;
        AT_LEAST_0.check("train.guidance", self.guidance)?;
        FINITE.check("train.logit_mean", self.logit_mean)?;
        ABOVE_0.check("train.logit_std", self.logit_std)?;
        MODE_SCALE.check("train.mode_scale", self.mode_scale)?;
        ABOVE_0.check("train.sigmoid_scale", self.sigmoid_scale)?;
        if let TimestepShift::Constant(shift) = self.shift {
            Rule("above 0, or \"flux\"", ABOVE_0.1).check("train.shift", shift)?;
        }
        if let Some(factor) = self.divergence_factor {
            let rule = Rule(
                "above 1, or \"none\" to go on whatever the loss",
                |factor| factor > 1.0 && factor.is_finite(),
            );
            rule.check("train.divergence_factor", factor)?;
        }
        Ok(())
    }
}

impl CheckpointSection {
    fn check(&self) -> Result<(), Invalid> {
        check_at_least_1("checkpoint.every", self.every)?;
        if self.keep < 2 {
            let problem = format!(
                "must be at least 2, so that one is left when the newest is damaged, found {}",
                self.keep
            );
            return Err(("checkpoint.keep", problem));
        }
        Ok(())
    }
}

impl SampleSection {
    fn check(&self) -> Result<(), Invalid> {
        if self.prompts.is_empty() {
            let problem = "required, but not given: list at least one prompt";
            return Err(("sample.prompts", problem.into()));
        }
        check_at_least_1("sample.every", self.every)?;
        check_count(
            "sample.num_inference_steps",
            self.num_inference_steps,
            MAX_COUNT,
        )?;
        AT_LEAST_0.check("sample.guidance_scale", self.guidance_scale)?;
        check_side("sample.height", self.height)?;
        check_side("sample.width", self.width)?;
        check_seed("sample.seed", self.seed)
    }
}

fn check_at_least_1(key: &'static str, value: u64) -> Result<(), Invalid> {
    if value >= 1 {
        return Ok(());
    }
    Err((key, format!("must be at least 1, found {value}")))
}

fn check_count(key: &'static str, value: usize, max: usize) -> Result<(), Invalid> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err((key, format!("must be between 1 and {max}, found {value}")))
}

fn check_seed(key: &'static str, seed: u64) -> Result<(), Invalid> {
    if i64::try_from(seed).is_ok() {
        return Ok(());
    }
    let max = i64::MAX;
    let problem = format!("must be at most {max}, the largest number TOML can hold, found {seed}");
    Err((key, problem))
}

fn check_side(key: &'static str, side_px: u32) -> Result<(), Invalid> {
    if side_px.is_multiple_of(SIDE_MULTIPLE_PX)
        && (SIDE_MULTIPLE_PX..=MAX_SIDE_PX).contains(&side_px)
    {
        return Ok(());
    }
    let problem = format!(
        "must be a multiple of {SIDE_MULTIPLE_PX} between {SIDE_MULTIPLE_PX} and {MAX_SIDE_PX}, found {side_px}"
    );
    Err((key, problem))
}

fn check_path(key: &'static str, path: Option<&Path>) -> Result<(), Invalid> {
    let problem = match path {
        Some(path) if path.as_os_str().is_empty() => "required, but not given",
        Some(path) if path.starts_with("~") => "`~` is not expanded here: write the path in full",
        _ => return Ok(()),
    };
    Err((key, problem.into()))
}

// Reading

/// Where each key was written, for errors.
struct Origins<'a> {
    file: &'a Path,
    /// Line of each section and of each `section.key` in the file.
    lines: BTreeMap<String, usize>,
    /// Each `section.key` that was given by `--set`.
    set: BTreeSet<String>,
}

impl<'a> Origins<'a> {
    fn new(text: &str, file: &'a Path) -> Self {
        let mut lines = BTreeMap::new();
        if let Ok(document) = DeTable::parse(text) {
            for (section, value) in document.get_ref() {
                lines.insert(
                    section.get_ref().to_string(),
                    line_of(text, section.span().start),
                );
                if let DeValue::Table(keys) = value.get_ref() {
                    for key in keys.keys() {
                        let name = format!("{}.{}", section.get_ref(), key.get_ref());
                        lines.insert(name, line_of(text, key.span().start));
                    }
                }
            }
        }
        Self {
            file,
            lines,
            set: BTreeSet::new(),
        }
    }

    /// Where `key` (`section` or `section.key`) was written, with its preposition; the file alone for what was not.
    fn place(&self, key: &str) -> String {
        if self.set.contains(key) {
            return " in --set".into();
        }
        match self.lines.get(key) {
            Some(line) => format!(" in {}:{line}", shown(self.file)),
            None => format!(" in {}", shown(self.file)),
        }
    }
}

fn parse(text: &str, file: &Path) -> Result<Table, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let before = text.get(..start).unwrap_or(text);
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        ConfigError::Syntax {
            path: file.to_path_buf(),
            line: line_of(text, start),
            column,
            problem: one_line(error.message()),
        }
    })
}

/// Line of the byte at `offset`, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    before.iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Splits `section.key=value`; the key may go deeper, with TOML's quoting.
fn parse_override(text: &str) -> Result<(Vec<String>, Value), ConfigError> {
    let malformed = || set_error(text, "write it as section.key=value");
    let (key, value) = text.split_once('=').ok_or_else(malformed)?;
    if key.contains('\n') {
        return Err(malformed());
    }
    let mut keys = Vec::new();
    let mut table: Table = toml::from_str(&format!("{key} = 0")).map_err(|_| malformed())?;
    loop {
        let (name, value) = table.into_iter().next().ok_or_else(malformed)?;
        keys.push(name);
        match value {
            Value::Table(inner) => table = inner,
            _ => break,
        }
    }
    if keys.len() < 2 {
        return Err(malformed());
    }
    let value = value.trim();
    let value = value
        .parse::<Value>()
        .unwrap_or_else(|_| Value::String(value.into()));
    Ok((keys, value))
}

/// Puts `value` at the path `keys`, making tables on the way.
fn insert(table: &mut Table, keys: &[String], value: Value) -> Result<(), String> {
    let (last, parents) = keys
        .split_last()
        .expect("an override has at least two keys");
    let mut table = table;
    for key in parents {
        let entry = table
            .entry(key.clone())
            .or_insert_with(|| Value::Table(Table::new()));
        table = entry
            .as_table_mut()
            .ok_or_else(|| format!("`{}` is not a section", one_line(key)))?;
    }
    table.insert(last.clone(), value);
    Ok(())
}

/// The sections and their keys.
fn sections() -> [(&'static str, &'static [&'static str]); 9] {
    [
        ("model", fields_of::<ModelSection>()),
        ("dataset", fields_of::<DatasetSection>()),
        ("lora", fields_of::<LoraSection>()),
        ("optimizer", fields_of::<OptimizerSection>()),
        ("lr_scheduler", fields_of::<LrSchedulerSection>()),
        ("train", fields_of::<TrainSection>()),
        ("checkpoint", fields_of::<CheckpointSection>()),
        ("export", fields_of::<ExportSection>()),
        ("sample", fields_of::<SampleSection>()),
    ]
}

/// Refuses sections and keys that do not exist, naming the nearest that does.
fn check_keys(table: &Table, origins: &Origins) -> Result<(), ConfigError> {
    let sections = sections();
    for (name, value) in table {
        let Some((section, known)) = sections.iter().find(|(section, _)| section == name) else {
            let in_set = origins
                .set
                .iter()
                .find(|key| key.split('.').next() == Some(name));
            let place = origins.place(in_set.unwrap_or(name));
            if value.is_table() {
                let names = sections.map(|(section, _)| section);
                return Err(ConfigError::UnknownSection {
                    section: one_line(name),
                    place,
                    nearest: nearest(name, &names).unwrap_or_default().to_owned(),
                });
            }
            return Err(ConfigError::UnknownKey {
                key: one_line(name),
                place,
                nearest: suggest("", name),
            });
        };
        let Value::Table(keys) = value else {
            let problem = format!("is a section, to be written as [{section}]");
            return Err(value_error(section, &origins.place(section), problem));
        };
        if let Some(key) = keys.keys().find(|key| !known.contains(&key.as_str())) {
            let full = format!("{section}.{key}");
            return Err(ConfigError::UnknownKey {
                place: origins.place(&full),
                key: one_line(&full),
                nearest: suggest(section, key),
            });
        }
    }
    Ok(())
}

/// The key meant by the unknown `key` in `section`: as other trainers call it, the same in another section, or spelled
/// most like it in this one (in any, for a key outside of all sections).
fn suggest(section: &str, key: &str) -> String {
    let sections = sections();
    let full_name = |key: &str| {
        let home = sections.iter().find(|(_, keys)| keys.contains(&key));
        home.map(|(section, _)| format!("{section}.{key}"))
    };
    let spelled_alike = || match sections.iter().find(|(name, _)| *name == section) {
        Some((_, keys)) => nearest(key, keys).unwrap_or_default().to_owned(),
        None => {
            let keys: Vec<&str> = sections
                .iter()
                .flat_map(|(_, keys)| keys.to_vec())
                .collect();
            nearest(key, &keys).and_then(full_name).unwrap_or_default()
        }
    };
    let other = OTHER_NAMES.iter().find(|(other, _)| *other == key);
    let known = other
        .map(|(_, full)| (*full).to_owned())
        .or_else(|| full_name(key))
        .unwrap_or_else(spelled_alike);
    match known.split_once('.') {
        Some((home, key)) if home == section => key.to_owned(),
        _ => known,
    }
}

/// Says in the user's words what serde found wrong.
fn deserialize_error(error: &toml::de::Error, origins: &Origins) -> ConfigError {
    // the path of the value is only in the rendered form, behind the message
    let rendered = error.to_string();
    let path = rendered
        .strip_prefix(error.message())
        .and_then(|rest| rest.trim().strip_prefix("in `")?.strip_suffix('`'))
        .unwrap_or_default();
    let key: Vec<&str> = path.splitn(3, '.').take(2).collect();
    let mut problem = one_line(error.message());
    for (serde, ours) in [
        ("unknown variant", "unknown value"),
        ("expected f64", "expected a number"),
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected u32", "expected a whole number"),
        ("expected path string", "expected a path"),
        ("floating point", "number"),
    ] {
        problem = problem.replace(serde, ours);
    }
    value_error(&one_line(path), &origins.place(&key.join(".")), problem)
}

fn value_error(key: &str, place: &str, problem: String) -> ConfigError {
    ConfigError::Value {
        key: key.into(),
        place: place.into(),
        problem,
    }
}

fn set_error(text: &str, problem: &str) -> ConfigError {
    ConfigError::Set {
        text: one_line(text),
        problem: problem.into(),
    }
}

/// `path` from `folder`, without `.` and without leading `..`.
///
/// `folder` is canonical, so that a file always gets the same absolute path, however the configuration was named.
fn absolute(folder: &Path, path: &Path) -> PathBuf {
    if path.is_absolute() {
        return path.to_path_buf();
    }
    let mut absolute = folder.to_path_buf();
    let mut leading = true;
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if leading => _ = absolute.pop(),
            component => {
                leading = false;
                absolute.push(component);
            }
        }
    }
    absolute
}

/// The field names that `T`'s derived `Deserialize` accepts.
fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    /// Notes the names it is asked for and gives nothing.
    struct Probe<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Probe<'_> {
        type Error = de::value::Error;

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _name: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("only the names were wanted"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut fields: &'static [&'static str] = &[];
    let _ = T::deserialize(Probe(&mut fields));
    fields
}

// Values that are a number or a word

/// A number or one word, `WORD`, which stands for `None`.
struct NumberOr<'a>(&'a str);

impl Visitor<'_> for NumberOr<'_> {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "a number or \"{}\"", self.0)
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Self::Value, E> {
        Ok(Some(number))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
        Ok(Some(number as f64))
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
        if word == self.0 {
            return Ok(None);
        }
        Err(E::invalid_value(de::Unexpected::Str(word), &self))
    }
}

/// `Option<f64>` as a number or "none", for TOML has no null.
mod number_or_none {
    use super::*;

    pub fn serialize<S: Serializer>(
        number: &Option<f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match number {
            Some(number) => serializer.serialize_f64(*number),
            None => serializer.serialize_str("none"),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<f64>, D::Error> {
        deserializer.deserialize_any(NumberOr("none"))
    }
}

impl Serialize for TimestepShift {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Constant(shift) => serializer.serialize_f64(*shift),
            Self::Flux => serializer.serialize_str("flux"),
        }
    }
}

impl<'de> Deserialize<'de> for TimestepShift {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let shift = deserializer.deserialize_any(NumberOr("flux"))?;
        Ok(shift.map_or(Self::Flux, Self::Constant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two keys every configuration needs, given as overrides so that the text may open any section.
    const REQUIRED: [&str; 2] = ["model.path=flux", "dataset.path=cats"];

    fn read_with(text: &str, overrides: &[&str]) -> Result<RunConfig, ConfigError> {
        let overrides = REQUIRED.iter().chain(overrides).map(ToString::to_string);
        let overrides: Vec<String> = overrides.collect();
        RunConfig::from_toml(text, Path::new("run.toml"), &overrides)
    }

    fn read(text: &str) -> Result<RunConfig, ConfigError> {
        read_with(text, &[])
    }

    #[track_caller]
    fn assert_refused(text: &str, message: &str) {
        let error = read(text).expect_err("the configuration is bad");
        assert_eq!(error.to_string(), message);
    }

    #[track_caller]
    fn assert_set_refused(set: &str, message: &str) {
        let error = read_with("", &[set]).expect_err("the override is bad");
        assert_eq!(error.to_string(), message);
    }

    #[test]
    fn two_paths_are_enough() {
        let config = read("").expect("a good configuration");
        let mut expected = RunConfig::default();
        expected.model.path = "flux".into();
        expected.dataset.path = "cats".into();
        assert_eq!(config, expected);
        assert_eq!(config.sample, None);
    }

    const EVERYTHING: &str = r#"
[model]
path = "flux"
transformer = "flux1-dev.safetensors"
vae = "ae.safetensors"

[dataset]
path = "cats"
resolution = 768
bucket_step = 32
random_flip = true
caption_extension = "caption"
caption_dropout = 0.1
max_sequence_length = 256

[lora]
r = 4
lora_alpha = 8
target_modules = "all-linear"
exclude_modules = ["proj_out"]
rank_pattern = { "attn.to_k" = 8, "single.*" = 2 }
alpha_pattern = { "attn.to_k" = 1.5 }
use_rslora = true
use_dora = true
lora_dropout = 0.05
init_lora_weights = true
init_from = "first.safetensors"

[optimizer]
name = "adamw"
learning_rate = 2e-5
betas = [0.8, 0.99]
eps = 1e-6
weight_decay = 0
max_grad_norm = "none"

[lr_scheduler]
name = "constant_with_warmup"
warmup_steps = 10
num_cycles = 1.5

[train]
steps = 7
batch_size = 2
gradient_accumulation_steps = 3
seed = 9223372036854775807
guidance = 3.5
timestep_sampling = "logit_normal"
logit_mean = -0.5
logit_std = 0.5
mode_scale = 0.8
sigmoid_scale = 2.0
shift = "flux"
loss_weighting = "sigma_sqrt"
recompute = false
divergence_factor = "none"

[checkpoint]
every = 5
keep = 3

[sample]
prompts = ["a cat", "two\ncats, \"ü\""]
every = 4
num_inference_steps = 8
guidance_scale = 0
height = 768
width = 512
seed = 1
"#;

    fn everything() -> RunConfig {
        RunConfig::from_toml(EVERYTHING, Path::new("run.toml"), &[]).expect("a good configuration")
    }

    #[test]
    fn every_key_is_read() {
        let config = everything();
        assert_eq!(
            config.model.vae.as_deref(),
            Some(Path::new("ae.safetensors"))
        );
        assert_eq!(
            config.lora.target_modules,
            Targets::Pattern("all-linear".into())
        );
        assert_eq!(
            config.lora.exclude_modules,
            Some(Targets::List(vec!["proj_out".into()]))
        );
        assert_eq!(config.lora.rank_pattern.get("single.*"), Some(2));
        assert_eq!(
            config.lora.init_lora_weights,
            Some(InitLoraWeights::Default)
        );
        assert_eq!(config.optimizer.max_grad_norm, None);
        assert_eq!(config.optimizer.weight_decay, 0.0);
        assert_eq!(
            config.lr_scheduler.name,
            LrSchedulerName::ConstantWithWarmup
        );
        assert_eq!(config.train.seed, i64::MAX as u64);
        assert_eq!(
            config.train.timestep_sampling,
            TimestepSampling::LogitNormal
        );
        assert_eq!(config.train.shift, TimestepShift::Flux);
        assert_eq!(config.train.loss_weighting, LossWeighting::SigmaSqrt);
        assert_eq!(
            config.sample.expect("a section").prompts[1],
            "two\ncats, \"ü\""
        );
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        for config in [read("").expect("a good configuration"), everything()] {
            let text = config.to_toml().expect("TOML holds it");
            let again = RunConfig::from_toml(&text, Path::new("config.toml"), &[]);
            let again = again.expect("what was written");
            assert_eq!(again, config);
            assert_eq!(again.to_toml().expect("TOML holds it"), text);
            assert_eq!(
                again.digest().expect("TOML holds it"),
                config.digest().expect("the same")
            );
        }
        assert_ne!(
            read("").expect("good").digest().expect("TOML holds it"),
            everything().digest().expect("TOML holds it")
        );
    }

    #[test]
    fn every_default_is_written_out() {
        let text = read("")
            .expect("a good configuration")
            .to_toml()
            .expect("TOML holds it");
        let table: Table = toml::from_str(&text).expect("what was written");
        for (section, keys) in sections() {
            if section == "sample" {
                continue; // absent: no previews
            }
            for key in keys {
                let optional = [
                    "transformer",
                    "vae",
                    "exclude_modules",
                    "rank_pattern",
                    "alpha_pattern",
                    "init_from",
                    // Written only where they differ: configurations of runs that began before them keep their digest.
                    "peft_type",
                    "layers_to_transform",
                    "layers_pattern",
                    "init_lora_weights",
                    "decompose_both",
                    "decompose_factor",
                ];
                let written = table[section].get(key).is_some();
                assert_eq!(written, !optional.contains(key), "{section}.{key}");
            }
        }
    }

    #[test]
    fn floats_survive_to_the_bit() {
        let mut config = read("").expect("a good configuration");
        for rate in [1e-4, 0.1 + 0.2, 1e-300, f64::MIN_POSITIVE, 5e-324, 1e300] {
            config.optimizer.learning_rate = rate;
            let text = config.to_toml().expect("TOML holds it");
            let again = RunConfig::from_toml(&text, Path::new("config.toml"), &[]);
            let again = again.expect("what was written").optimizer.learning_rate;
            assert_eq!(again.to_bits(), rate.to_bits(), "{rate}");
        }
    }

    // Mistakes in the file

    #[test]
    fn a_required_path_is_missing() {
        let error = RunConfig::from_toml("[model]\npath = \"flux\"\n", Path::new("run.toml"), &[])
            .expect_err("no dataset");
        assert_eq!(
            error.to_string(),
            "`dataset.path` in run.toml: required, but not given"
        );
        let error = RunConfig::from_toml("", Path::new("run.toml"), &[]).expect_err("no model");
        assert_eq!(
            error.to_string(),
            "`model.path` in run.toml: required, but not given"
        );
    }

    #[test]
    fn not_toml() {
        assert_refused(
            "[train\nsteps = 1",
            "run.toml:1:7: unclosed table, expected `]`",
        );
        assert_refused(
            "[train]\nsteps = 1\nsteps = 2",
            "run.toml:3:1: duplicate key",
        );
        assert_refused(
            "[train]\nsteps = ",
            "run.toml:2:9: string values must be quoted, expected literal string",
        );
    }

    #[test]
    fn deep_nesting_is_refused() {
        let text = format!("x = {}", "[".repeat(100_000));
        let error = read(&text).expect_err("too deep").to_string();
        assert!(error.starts_with("run.toml:1:"), "{error}");
    }

    #[test]
    fn unknown_key() {
        assert_refused(
            "[optimizer]\nlearnin_rate = 1e-3",
            "unknown key `optimizer.learnin_rate` in run.toml:2: did you mean `learning_rate`?",
        );
        assert_refused(
            "[lora]\nr = 4\n\n\"a\\nb\" = 1",
            "unknown key `lora.a\\nb` in run.toml:4: did you mean `lora_alpha`?",
        );
    }

    #[test]
    fn unknown_key_that_lives_elsewhere() {
        assert_refused(
            "[train]\nlearning_rate = 1e-3",
            "unknown key `train.learning_rate` in run.toml:2: did you mean `optimizer.learning_rate`?",
        );
        assert_refused(
            "batch_size = 1",
            "unknown key `batch_size` in run.toml:1: did you mean `train.batch_size`?",
        );
        assert_refused(
            "batchsize = 1",
            "unknown key `batchsize` in run.toml:1: did you mean `train.batch_size`?",
        );
    }

    #[test]
    fn unknown_key_that_other_trainers_use() {
        assert_refused(
            "[lora]\nrank = 8",
            "unknown key `lora.rank` in run.toml:2: did you mean `r`?",
        );
        assert_refused(
            "[train]\nlr = 8",
            "unknown key `train.lr` in run.toml:2: did you mean `optimizer.learning_rate`?",
        );
    }

    #[test]
    fn other_names_lead_to_keys_that_exist() {
        let sections = sections();
        let exists = |full: &str| {
            let (section, key) = full.split_once('.').expect("section.key");
            sections
                .iter()
                .any(|(name, keys)| *name == section && keys.contains(&key))
        };
        for (other, full) in OTHER_NAMES {
            assert!(exists(full), "{full}");
            assert!(
                !sections.iter().any(|(_, keys)| keys.contains(&other)),
                "{other}"
            );
        }
        assert!(
            MAY_CHANGE_ON_RESUME
                .iter()
                .filter(|key| !key.ends_with('.'))
                .all(|key| exists(key))
        );
    }

    #[test]
    fn the_list_of_sections_is_complete() {
        let names = sections().map(|(section, _)| section);
        assert_eq!(names, fields_of::<RunConfig>());
        assert_eq!(fields_of::<CheckpointSection>(), ["every", "keep"]);
        assert!(sections().iter().all(|(_, keys)| !keys.is_empty()));
    }

    #[test]
    fn unknown_section() {
        assert_refused(
            "[optimiser]\nname = \"adamw\"",
            "unknown section `optimiser` in run.toml:1: did you mean `optimizer`?",
        );
    }

    #[test]
    fn a_section_that_is_not_one() {
        assert_refused(
            "train = 5",
            "`train` in run.toml:1: is a section, to be written as [train]",
        );
        assert_refused(
            "[[train]]\nsteps = 5",
            "`train` in run.toml:1: is a section, to be written as [train]",
        );
    }

    #[test]
    fn wrong_type() {
        assert_refused(
            "[optimizer]\nlearning_rate = \"fast\"",
            "`optimizer.learning_rate` in run.toml:2: invalid type: string \"fast\", expected a number",
        );
        assert_refused(
            "[train]\nsteps = 1.5",
            "`train.steps` in run.toml:2: invalid type: number `1.5`, expected a whole number",
        );
        assert_refused(
            "[train]\nbatch_size = -1",
            "`train.batch_size` in run.toml:2: invalid value: integer `-1`, expected a whole number",
        );
        assert_refused(
            "[train]\nseed = 9223372036854775808",
            "run.toml:2:8: u64 value was too large",
        );
        assert_refused(
            "[train]\nrecompute = 1",
            "`train.recompute` in run.toml:2: invalid type: integer `1`, expected a boolean",
        );
        assert_refused(
            "[model]\nvae = 1",
            "`model.vae` in run.toml:2: invalid type: integer `1`, expected a path",
        );
        assert_refused(
            "[optimizer]\nbetas = [0.9]",
            "`optimizer.betas` in run.toml:2: invalid length 1, expected an array of length 2",
        );
        assert_refused(
            "[optimizer]\nbetas = [0.9, 0.99, 0.999]",
            "`optimizer.betas` in run.toml:2: invalid length 3, expected fewer elements in array",
        );
        assert_refused(
            "[lora]\ntarget_modules = 5",
            "`lora.target_modules` in run.toml:2: expected a string or a list of strings",
        );
        assert_refused(
            "[lora]\nrank_pattern = { \"a.b\" = \"x\" }",
            "`lora.rank_pattern.a.b` in run.toml:2: invalid type: string \"x\", expected a whole number",
        );
        assert_refused(
            "[sample]\nprompts = \"a cat\"",
            "`sample.prompts` in run.toml:2: invalid type: string \"a cat\", expected a sequence",
        );
    }

    #[test]
    fn wrong_choice() {
        assert_refused(
            "[optimizer]\nname = \"adam\"",
            "`optimizer.name` in run.toml:2: unknown value `adam`, expected `adamw`",
        );
        assert_refused(
            "[train]\ntimestep_sampling = \"logit-normal\"",
            "`train.timestep_sampling` in run.toml:2: unknown value `logit-normal`, expected one of `none`, `logit_normal`, `mode`, `sigmoid`",
        );
        assert_refused(
            "[optimizer]\nmax_grad_norm = \"off\"",
            "`optimizer.max_grad_norm` in run.toml:2: invalid value: string \"off\", expected a number or \"none\"",
        );
        assert_refused(
            "[train]\nshift = true",
            "`train.shift` in run.toml:2: invalid type: boolean `true`, expected a number or \"flux\"",
        );
        assert_refused(
            "[lora]\ninit_lora_weights = \"loftq\"",
            "`lora.init_lora_weights` in run.toml:2: invalid value: string \"loftq\", expected true, false, \"gaussian\", \"orthogonal\", \"olora\", \"pissa\" or \"pissa_niter_N\" with a number N",
        );
    }

    /// What is written, and what is said of it.
    const OUT_OF_RANGE: &str = r#"
dataset.resolution = 500 -> must be a multiple of 16 between 16 and 8192, found 500
dataset.resolution = 0 -> must be a multiple of 16 between 16 and 8192, found 0
dataset.bucket_step = 24 -> must be a multiple of 16 between 16 and 8192, found 24
dataset.caption_extension = ".txt" -> must be a file extension such as "txt", found ".txt"
dataset.caption_extension = "png" -> must be a file extension such as "txt", found "png"
dataset.caption_dropout = 1.5 -> must be between 0 and 1, found 1.5
dataset.max_sequence_length = 513 -> must be between 1 and 512, found 513
lora.r = 0 -> must be between 1 and 65536, found 0
lora.lora_alpha = -1 -> must be above 0, found -1
lora.rank_pattern = { a = 0 } -> must be between 1 and 65536, found 0
lora.alpha_pattern = { a = inf } -> must be above 0, found inf
lora.target_modules = [] -> must name at least one layer
lora.lora_dropout = 1.0 -> must be at least 0 and below 1, found 1
lora.init_from = "~/x.safetensors" -> `~` is not expanded here: write the path in full
optimizer.learning_rate = 0 -> must be above 0, found 0
optimizer.learning_rate = nan -> must be above 0, found NaN
optimizer.betas = [0.9, 1.0] -> must be at least 0 and below 1, found 1
optimizer.eps = 0.0 -> must be above 0, found 0
optimizer.weight_decay = -0.1 -> must be at least 0, found -0.1
optimizer.max_grad_norm = 0 -> must be above 0, or "none" for no clipping, found 0
lr_scheduler.warmup_steps = 5 -> has no effect with name = "constant", found 5: use "constant_with_warmup"
lr_scheduler.num_cycles = 0 -> must be above 0, found 0
train.steps = 0 -> must be at least 1, found 0
train.batch_size = 0 -> must be between 1 and 65536, found 0
train.gradient_accumulation_steps = 0 -> must be between 1 and 65536, found 0
train.guidance = -1 -> must be at least 0, found -1
train.logit_mean = inf -> must be a finite number, found inf
train.logit_std = 0 -> must be above 0, found 0
train.mode_scale = 2 -> must be between -1 and 1.75, found 2
train.sigmoid_scale = 0 -> must be above 0, found 0
train.shift = 0 -> must be above 0, or "flux", found 0
train.divergence_factor = 1 -> must be above 1, or "none" to go on whatever the loss, found 1
checkpoint.every = 0 -> must be at least 1, found 0
checkpoint.keep = 1 -> must be at least 2, so that one is left when the newest is damaged, found 1
sample.prompts = [] -> required, but not given: list at least one prompt
sample.every = 0 -> must be at least 1, found 0
sample.num_inference_steps = 0 -> must be between 1 and 65536, found 0
sample.guidance_scale = -1 -> must be at least 0, found -1
sample.height = 8 -> must be a multiple of 16 between 16 and 8192, found 8
sample.width = 100000 -> must be a multiple of 16 between 16 and 8192, found 100000
"#;

    #[test]
    fn out_of_range() {
        for case in OUT_OF_RANGE.trim().lines() {
            let (assignment, problem) = case.split_once(" -> ").expect("two halves");
            let (key, _) = assignment.split_once(" = ").expect("a value");
            let (section, line) = assignment.split_once('.').expect("a section");
            let prompts = if section == "sample" && key != "sample.prompts" {
                "\nprompts = [\"a cat\"]"
            } else {
                ""
            };
            assert_refused(
                &format!("[{section}]\n{line}{prompts}"),
                &format!("`{key}` in run.toml:2: {problem}"),
            );
        }
    }

    #[test]
    fn factors_of_a_file_are_not_made_anew() {
        assert_refused(
            "[lora]\ninit_from = \"x.safetensors\"\ninit_lora_weights = \"pissa_niter_4\"",
            "`lora.init_from` in run.toml:2: has factors of its own, which `lora.init_lora_weights` pissa_niter_4 would make anew: remove one of the two",
        );
    }

    #[test]
    fn a_default_can_be_out_of_range_too() {
        let error = read_with("", &["dataset.resolution=32"]).expect_err("the step is larger");
        assert_eq!(
            error.to_string(),
            "`dataset.bucket_step` in run.toml: must be at most dataset.resolution = 32, found 64"
        );
    }

    #[test]
    fn a_program_gets_the_same_rules() {
        let mut config = read("").expect("a good configuration");
        config.validate().expect("still good");
        config.train.seed = u64::MAX;
        assert_eq!(
            config.validate().expect_err("too large").to_string(),
            "`train.seed`: must be at most 9223372036854775807, the largest number TOML can hold, found 18446744073709551615"
        );
        config.diff(&config).expect_err("TOML cannot hold it");
    }

    // --set

    #[test]
    fn overrides_are_toml_values_or_bare_strings() {
        let config = read_with(
            "[train]\nsteps = 5\n[optimizer]\nmax_grad_norm = 2",
            &[
                "train.steps=7",
                "optimizer.learning_rate = 1e-5",
                "optimizer.betas=[0.5, 0.6]",
                "optimizer.max_grad_norm=none",
                "dataset.path=../my cats",
                "lora.target_modules=.*to_[kq]",
                "lora.rank_pattern.\"a.b\"=3",
                "sample.prompts=['a = b']",
                "train.steps=8",
            ],
        )
        .expect("good overrides");
        assert_eq!(config.train.steps, 8);
        assert_eq!(config.optimizer.learning_rate, 1e-5);
        assert_eq!(config.optimizer.betas, [0.5, 0.6]);
        assert_eq!(config.optimizer.max_grad_norm, None);
        assert_eq!(config.dataset.path, Path::new("../my cats"));
        assert_eq!(
            config.lora.target_modules,
            Targets::Pattern(".*to_[kq]".into())
        );
        assert_eq!(config.lora.rank_pattern.get("a.b"), Some(3));
        assert_eq!(config.sample.expect("a section").prompts, ["a = b"]);
    }

    #[test]
    fn overrides_can_give_the_required_paths() {
        let set = ["model.path=m".to_owned(), "dataset.path=d".to_owned()];
        let config = RunConfig::from_toml("", Path::new("run.toml"), &set).expect("complete");
        assert_eq!(config.model.path, Path::new("m"));
    }

    #[test]
    fn override_of_an_unknown_key() {
        assert_set_refused(
            "optimizer.learnin_rate=1",
            "unknown key `optimizer.learnin_rate` in --set: did you mean `learning_rate`?",
        );
        assert_set_refused(
            "optimiser.lr=1",
            "unknown section `optimiser` in --set: did you mean `optimizer`?",
        );
    }

    #[test]
    fn override_with_a_bad_value() {
        assert_set_refused(
            "train.steps=many",
            "`train.steps` in --set: invalid type: string \"many\", expected a whole number",
        );
        assert_set_refused(
            "train.steps=0",
            "`train.steps` in --set: must be at least 1, found 0",
        );
        assert_set_refused(
            "train.steps=1\nsection.x=2",
            "`train.steps` in --set: invalid type: string \"1\\nsection.x=2\", expected a whole number",
        );
    }

    #[test]
    fn malformed_override() {
        for set in [
            "steps=1",
            "train.steps",
            "=1",
            ".=1",
            "train.=1",
            "a.b\nc.d=1",
            "[train]\nsteps=1",
            "",
        ] {
            let shown = set.replace('\n', "\\n");
            assert_set_refused(
                set,
                &format!("`--set {shown}`: write it as section.key=value"),
            );
        }
        assert_set_refused(
            "model.path.x=1",
            "`--set model.path.x=1`: `path` is not a section",
        );
    }

    #[test]
    fn any_missing_character_is_survived_in_one_line() {
        for (at, c) in EVERYTHING.char_indices() {
            let text = format!("{}{}", &EVERYTHING[..at], &EVERYTHING[at + c.len_utf8()..]);
            match RunConfig::from_toml(&text, Path::new("run.toml"), &[]) {
                Ok(config) => {
                    let text = config.to_toml().expect("TOML holds it");
                    let again = RunConfig::from_toml(&text, Path::new("run.toml"), &[]);
                    assert_eq!(again.expect("what was written"), config);
                }
                Err(error) => {
                    let line = error.to_string();
                    assert!(line.contains("run.toml") && !line.contains('\n'), "{line}");
                }
            }
        }
    }

    // Files

    #[test]
    fn paths_start_at_the_files_folder() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let root = fs::canonicalize(folder.path()).expect("it exists");
        fs::create_dir(root.join("runs")).expect("make folder");
        let file = root.join("runs/run.toml");
        let text = "[model]\npath = \"../models/./flux\"\nvae = \"/vae\"\n[dataset]\npath = \"cats\"\n[lora]\ninit_from = \"a/../b\"";
        fs::write(&file, text).expect("write file");
        let config = RunConfig::load(&file, &[]).expect("a good configuration");
        assert_eq!(config.model.path, root.join("models/flux"));
        assert_eq!(config.model.vae.as_deref(), Some(Path::new("/vae")));
        assert_eq!(config.dataset.path, root.join("runs/cats"));
        assert_eq!(config.lora.init_from, Some(root.join("runs/a/../b")));

        // by another name, and from the copy kept with a run
        let roundabout = root.join("runs/../runs/./run.toml");
        assert_eq!(
            RunConfig::load(&roundabout, &[]).expect("the same file"),
            config
        );
        let copy = root.join("config.toml");
        fs::write(&copy, config.to_toml().expect("TOML holds it")).expect("write file");
        assert_eq!(
            RunConfig::load(&copy, &[]).expect("a good configuration"),
            config
        );
    }

    #[test]
    fn missing_file() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("run.toml");
        let error = RunConfig::load(&file, &[]).expect_err("no file");
        assert_eq!(
            error.to_string(),
            format!("cannot read `{}`", file.display())
        );
        assert!(std::error::Error::source(&error).is_some());
    }

    #[test]
    fn file_that_is_not_text() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("run.toml");
        for (bytes, problem) in [
            (vec![0xff; 10], "it is not UTF-8 text"),
            (vec![b'#'; (1 << 20) + 1], "it is larger than 1 MiB"),
        ] {
            fs::write(&file, bytes).expect("write file");
            let error = RunConfig::load(&file, &[]).expect_err("not a configuration");
            let expected = format!("`{}` is not a run configuration: {problem}", file.display());
            assert_eq!(error.to_string(), expected);
        }
    }

    // Changes

    #[test]
    fn the_order_of_patterns_is_kept_and_counts() {
        let config = |pattern| read(&format!("lora.rank_pattern = {pattern}")).expect("good");
        let (ba, ab) = (config("{ b = 1, a = 2 }"), config("{ a = 2, b = 1 }"));
        let first = ba
            .lora
            .rank_pattern
            .iter()
            .next()
            .map(|(pattern, _)| pattern);
        assert_eq!(first, Some("b"));
        assert_ne!(
            ba.digest().expect("TOML holds it"),
            ab.digest().expect("TOML holds it")
        );
        let changes = ba.diff(&ab).expect("TOML holds it");
        assert_eq!(
            (changes.len(), changes[0].old.as_str()),
            (1, "{ b = 1, a = 2 }")
        );
    }

    #[test]
    fn equal_configurations_have_no_changes() {
        assert_eq!(everything().diff(&everything()).expect("TOML holds it"), []);
    }

    #[test]
    fn changes_name_both_values_and_whether_they_are_allowed() {
        let old = read("[lora.rank_pattern]\nx = 4").expect("a good configuration");
        let new = read_with(
            "[sample]\nprompts = [\"a\"]",
            &[
                "train.steps=2000",
                "train.batch_size=2",
                "optimizer.learning_rate=5e-5",
                "optimizer.eps=1e-6",
                "lr_scheduler.name=cosine",
                "checkpoint.every=10",
                "lora.lora_alpha=32",
            ],
        )
        .expect("a good configuration");
        let changes = old.diff(&new).expect("TOML holds it");
        let lines: Vec<String> = changes
            .iter()
            .filter(|change| !change.key.starts_with("sample."))
            .map(|change| {
                format!(
                    "{} {} -> {} {}",
                    change.key, change.old, change.new, change.allowed
                )
            })
            .collect();
        assert_eq!(
            lines,
            [
                "checkpoint.every 100 -> 10 true",
                "lora.lora_alpha 16.0 -> 32.0 false",
                "lora.rank_pattern { x = 4 } -> unset false",
                "lr_scheduler.name \"constant\" -> \"cosine\" true",
                "optimizer.eps 0.00000001 -> 0.000001 false",
                "optimizer.learning_rate 0.0001 -> 0.00005 true",
                "train.batch_size 1 -> 2 false",
                "train.steps 1000 -> 2000 true",
            ]
        );
        let sample: Vec<&Change> = changes
            .iter()
            .filter(|change| change.key.starts_with("sample."))
            .collect();
        assert_eq!(sample.len(), fields_of::<SampleSection>().len());
        assert!(
            sample
                .iter()
                .all(|change| change.allowed && change.old == "unset")
        );
    }
}
