//! The run configuration: one TOML file, read strictly, kept with the run.
//!
//! Every section is a plain struct, and its `Default` is the only place where defaults live. [`RunConfig::load`] reads the
//! file, on a preset if one is named, applies `--set section.key=value`, checks the rules that types cannot hold and makes paths absolute. Each mistake
//! is one line that names the key and where it was written. The known keys are read from the structs themselves
//! (`read::fields_of`), so there is no second list to keep in step.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use flux_model::weights::BaseDtype;
use lora_core::LoraConfig;
use lora_core::files::digest::sha256_hex;
use lora_core::files::strict_json::read_file;
use lora_core::peft::{InitLoraWeights, OneOrMany, Patterns, PeftType, Targets};
use serde::{Deserialize, Serialize};
use toml::Table;

pub use self::memory::{BasePlace, Bytes, MemorySection, Recompute};
pub use self::optimizer::OptimizerSection;
use self::read::{
    Origins, absolute, check_keys, check_optimizer, deserialize_error, insert, lay_over,
    move_recompute, parse, parse_override, set_error, value_error,
};
use self::rules::Invalid;
use crate::hub::HubId;
use crate::nearest::{one_line, shown};

mod memory;
mod number_or;
mod optimizer;
pub mod preset;
mod read;
mod rules;
mod targets;
#[cfg(test)]
mod tests;

/// A run configuration is a page of text; a larger file is something else.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Sides of images are multiples of this: 8 for the VAE, 2 for packing latents into tokens.
const SIDE_MULTIPLE_PX: u32 = 16;
/// Sides beyond this are typing errors.
const MAX_SIDE_PX: u32 = 8192;
/// Counts beyond this are typing errors, and their products would overflow.
const MAX_COUNT: usize = 1 << 16;
/// Longest text that the text encoders are run on, in tokens.
const MAX_SEQUENCE_LENGTH: usize = 512;

/// What may change between stopping and resuming: keys, or whole sections where the entry ends in a dot.
///
/// Steps already taken keep their meaning. Any other change would silently make the resumed run differ from one that was
/// never stopped.
const MAY_CHANGE_ON_RESUME: [&str; 22] = [
    // Where things are; what they hold is compared by digest.
    "model.path",
    "model.transformer",
    "model.vae",
    "dataset.path",
    "dataset.reference",
    "dataset.mask",
    // Another way to the same bits.
    "memory.",
    // Stops a run, and changes none.
    "train.divergence_factor",
    "train.steps",
    "optimizer.learning_rate",
    "lr_scheduler.",
    "checkpoint.",
    "export.",
    "logging.",
    "sample.",
    // Looks on, but for the share that is held out.
    "validation.path",
    "validation.every",
    "validation.bands",
    "validation.patience",
    "validation.seed",
    "ema.sample",
    "ema.export",
];

/// What diffusers' script and kohya's call some keys, where the spelling gives no hint.
const OTHER_NAMES: [(&str, &str); 24] = [
    ("caption_dropout_rate", "dataset.caption_dropout"),
    ("clip_threshold", "optimizer.d"),
    ("decay_rate", "optimizer.beta2_decay"),
    ("ema_decay", "ema.decay"),
    ("flip_aug", "dataset.random_flip"),
    ("optimizer_type", "optimizer.name"),
    ("random_crop", "dataset.random_crops"),
    ("adapter", "lora.init_from"),
    ("checkpointing_steps", "checkpoint.every"),
    ("checkpoints_total_limit", "checkpoint.keep"),
    ("dim", "lora.r"),
    ("discrete_flow_shift", "train.shift"),
    ("gradient_checkpointing", "memory.recompute"),
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

/// The frozen base model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// Folder of a diffusers pipeline (`transformer`, `vae`, `text_encoder`, `tokenizer`; FLUX.1 has `text_encoder_2` and
    /// `tokenizer_2` too), a single transformer file in such a folder, or a repository of the Hugging Face Hub,
    /// "owner/name" or "owner/name@revision", which is downloaded once. Required.
    pub path: PathBuf,
    /// A single `.safetensors` file, in Black Forest Labs' layout, to use for the transformer instead of the folder's.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transformer: Option<PathBuf>,
    /// An autoencoder to use instead of the folder's: a single `.safetensors` file, in Black Forest Labs' layout, or a component folder or
    /// single file of AutoencoderTiny.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
    /// What the transformer's frozen matrices are kept as in memory: "as-stored" (bf16, f16 and few bits as the file has them,
    /// where the device has the type; what else a file has becomes f32), "f32", "bf16" (rounded where the file has more
    /// bits), "q8" or "nf4" (what the file has in as few bits stays as it is). Default "as-stored".
    pub base_dtype: BaseDtype,
}

/// Images and captions, and how they are brought into shape.
///
/// An image is cropped to the nearest of a few aspects, resized to about `resolution * resolution` pixels, and encoded once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetSection {
    /// Folder of images with captions, as [`crate::data::scan::scan`] reads it. Required, unless there are `folders`.
    #[serde(skip_serializing_if = "is_default")]
    pub path: PathBuf,
    /// Several folders in place of `path`, each with settings of its own. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub folders: Vec<FolderSection>,
    /// Folder of reference pictures, for models that edit (FLUX.2 klein, FLUX.1 Kontext): under the name of their image, or several
    /// with _1, _2 and so on behind it. The caption says what to do with them. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
    /// Folder of masks under the names of their images, for FLUX.1 Fill: what is white is painted anew. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<PathBuf>,
    /// Images to leave out, by their path in the dataset; `--skip-bad` adds those that cannot be read. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<String>,
    /// Side in pixels of the square whose area no training image exceeds; a multiple of 16. With a list every image is trained on
    /// at each. Default 512.
    pub resolution: OneOrMany<u32>,
    /// Sides of training images are multiples of this many pixels; itself a multiple of 16. Smaller steps crop less and
    /// make more different sizes. Default 64.
    pub bucket_step: u32,
    /// Mirror images left to right, each time with probability 1/2. Default false.
    pub random_flip: bool,
    /// Places that an image is cropped at, one of them each time: 1 is the centre, more are drawn anew for each image and encoded
    /// once. Default 1.
    #[serde(skip_serializing_if = "is_one")]
    pub random_crops: usize,
    /// A word put in front of captions that have it not, and in place of every `[trigger]` in them. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trigger_word: Option<String>,
    /// Train with the tags of a caption in other orders. Default false.
    #[serde(skip_serializing_if = "is_default")]
    pub shuffle_caption: bool,
    /// Tags at the beginning of a caption that are neither moved nor dropped. Default 0.
    #[serde(skip_serializing_if = "is_default")]
    pub keep_tokens: usize,
    /// Probability in [0, 1) of leaving out a tag of a caption. Default 0.
    #[serde(skip_serializing_if = "is_default")]
    pub caption_tag_dropout_rate: f64,
    /// What stands between the tags of a caption. Default ",".
    #[serde(skip_serializing_if = "is_comma")]
    pub caption_separator: String,
    /// Texts that are made of a caption by `shuffle_caption` and `caption_tag_dropout_rate`, and encoded once; each step picks one
    /// of them. Default 8.
    #[serde(skip_serializing_if = "is_eight")]
    pub caption_variants: usize,
    /// A caption beside its image is the file with the image's name and this extension, without the dot. Default "txt".
    pub caption_extension: String,
    /// Probability in [0, 1] of training on the empty caption instead of the image's own. Default 0.
    pub caption_dropout: f64,
    /// Length in tokens that captions are padded or cut to for the text encoder (T5, Qwen3), 1 to 512. Default 512.
    pub max_sequence_length: usize,
}

impl Default for DatasetSection {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            folders: Vec::new(),
            reference: None,
            mask: None,
            skip: Vec::new(),
            resolution: OneOrMany::One(512),
            bucket_step: 64,
            random_flip: false,
            random_crops: 1,
            trigger_word: None,
            shuffle_caption: false,
            keep_tokens: 0,
            caption_tag_dropout_rate: 0.0,
            caption_separator: ",".into(),
            caption_variants: 8,
            caption_extension: "txt".into(),
            caption_dropout: 0.0,
            max_sequence_length: 512,
        }
    }
}

impl DatasetSection {
    /// Whether a sample is trained with other texts than its caption.
    pub(crate) fn varies_captions(&self) -> bool {
        self.shuffle_caption || self.caption_tag_dropout_rate > 0.0
    }

    /// The largest resolution, which takes most memory.
    pub(crate) fn largest_resolution(&self) -> u32 {
        let resolutions = self.resolution.as_slice().iter().copied();
        resolutions.max().unwrap_or_default()
    }

    /// What the tags of a varied caption are joined by.
    pub(crate) fn joined_by(&self) -> String {
        format!("{} ", self.caption_separator.trim())
    }

    /// The folders: `path` is one that is seen once and weighs 1.
    pub fn all_folders(&self) -> Vec<FolderSection> {
        match self.folders.is_empty() {
            true => vec![FolderSection {
                path: self.path.clone(),
                ..FolderSection::default()
            }],
            false => self.folders.clone(),
        }
    }
}

/// One of several folders of images with captions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FolderSection {
    /// The folder. Required.
    pub path: PathBuf,
    /// Times that its images are seen in an epoch. Default 1.
    pub repeats: usize,
    /// Factor on the loss of its images, above 0. Default 1.
    pub loss_weight: f64,
    /// In place of `dataset.trigger_word`, for this folder. Default: that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trigger_word: Option<String>,
}

impl Default for FolderSection {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            repeats: 1,
            loss_weight: 1.0,
            trigger_word: None,
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
    /// Layers to adapt: a list of path endings, one regular expression for the whole path, or a name: "all-linear", "attention",
    /// "kohya-default" (all layers of all blocks), "diffusers-default".
    /// Default: those that diffusers' training script for the model adapts (FLUX.1: attention and feed-forward layers,
    /// FLUX.2 klein: attention of the image and whole single-stream blocks).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<Targets>,
    /// Only these double-stream blocks, in kohya's form: "0-3,7", "none" or "all". Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_double_block_indices: Option<String>,
    /// Only these single-stream blocks, in the same form. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_single_block_indices: Option<String>,
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
        Self {
            peft_type: PeftType::Lora,
            r: 16,
            lora_alpha: 16.0,
            target_modules: None,
            train_double_block_indices: None,
            train_single_block_indices: None,
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

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_one(value: &usize) -> bool {
    *value == 1
}

fn is_eight(value: &usize) -> bool {
    *value == 8
}

fn is_comma(value: &str) -> bool {
    value == ","
}

fn is_minus_one(value: &i64) -> bool {
    *value == -1
}

impl LoraSection {
    /// Whether it starts from the values of the base weights.
    pub fn reads_base_weights(&self) -> bool {
        let splits = self
            .init_lora_weights
            .is_some_and(|init| init.splits_base());
        self.use_dora || splits
    }

    /// The same as PEFT's configuration; no target if none is named.
    pub fn config(&self) -> LoraConfig {
        LoraConfig {
            peft_type: self.peft_type,
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            decompose_both: self.decompose_both,
            decompose_factor: self.decompose_factor,
            r: self.r,
            lora_alpha: self.lora_alpha,
            target_modules: self
                .target_modules
                .clone()
                .unwrap_or(Targets::List(Vec::new())),
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

/// How the learning rate changes over the run; the rules of diffusers' `get_scheduler`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LrSchedulerSection {
    /// The shape of the curve. Default "constant".
    pub name: LrSchedulerName,
    /// Optimizer steps over which the rate rises from 0; not for "constant". Default 0.
    pub warmup_steps: u64,
    /// Periods of "cosine" over the run: 0.5 falls to 0 at the last step. Default 0.5. For "cosine_with_restarts" how often the
    /// rate falls to 0, a whole number. Default 1.
    #[serde(default)]
    pub num_cycles: Option<f64>,
    /// Exponent of "polynomial". Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power: Option<f64>,
    /// Learning rate that "polynomial" ends at. Default 1e-7.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_end: Option<f64>,
}

impl LrSchedulerSection {
    /// With the defaults that depend on the name.
    fn resolved(self) -> Self {
        let polynomial = self.name == LrSchedulerName::Polynomial;
        Self {
            num_cycles: self.num_cycles.or(Some(self.name.num_cycles())),
            power: self.power.or(polynomial.then_some(1.0)),
            lr_end: self.lr_end.or(polynomial.then_some(1e-7)),
            ..self
        }
    }
}

impl Default for LrSchedulerSection {
    fn default() -> Self {
        Self {
            name: LrSchedulerName::default(),
            warmup_steps: 0,
            num_cycles: Some(0.5),
            power: None,
            lr_end: None,
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
    /// A rise, then several falls of a cosine to 0.
    CosineWithRestarts,
    /// A rise, then a fall by a power of what is left of the run.
    Polynomial,
    /// A rise, then a fall that is slow at first and fast at the end, arXiv:2107.04197.
    Rex,
}

impl LrSchedulerName {
    /// The default of [`LrSchedulerSection::num_cycles`].
    pub(crate) fn num_cycles(self) -> f64 {
        match self {
            Self::CosineWithRestarts => 1.0,
            _ => 0.5,
        }
    }
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
    /// How an error counts: "mse" (its square), "mae" (its size), "huber" (a square near 0, a size far from it). Default "mse".
    #[serde(skip_serializing_if = "is_default")]
    pub loss_type: LossType,
    /// Where "huber" turns from a square into a size, above 0. Default 0.1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huber_c: Option<f64>,
    /// Weight of a sample in the loss as a function of sigma. Default "none".
    pub loss_weighting: LossWeighting,
    /// Bound of "min_snr", above 0. Default 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_snr_gamma: Option<f64>,
    /// The run is stopped as diverged when a loss exceeds this many times the loss of predicting 0 for the same samples, or
    /// every gradient is 0; "none" stops only where a number is not finite. An update about to be saved is tried on its last
    /// micro-batch first, which costs one forward pass a save. Default 10.
    #[serde(with = "number_or::number_or_none")]
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
            loss_type: LossType::default(),
            huber_c: None,
            loss_weighting: LossWeighting::default(),
            min_snr_gamma: None,
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
    /// Uniform in [0, 1], not rounded to one of 1000 levels; kohya's name.
    Uniform,
    /// "sigmoid", moved by `shift`; kohya's name.
    Shift,
    /// "sigmoid", moved as sampling is at the image's size; kohya's name.
    FluxShift,
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
    /// `min((1 - sigma)^2, min_snr_gamma * sigma^2)`: arXiv:2303.09556's `min(SNR, gamma)` for the error of the picture that a
    /// velocity means, which is sigma times the velocity's.
    MinSnr,
}

/// Errors in the loss, named as in kohya's and diffusers' scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// `e^2`.
    #[default]
    #[serde(alias = "l2")]
    Mse,
    /// `|e|`.
    #[serde(alias = "l1")]
    Mae,
    /// `2 c (sqrt(e^2 + c^2) - c)` with `c` = `huber_c`.
    Huber,
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
    /// Make previews before the first step too, to compare with. Default true.
    pub at_start: bool,
    /// Denoising steps for an image. Default 20.
    pub num_inference_steps: usize,
    /// Guidance strength: told to a model that has it as an input (FLUX.1 dev), else how far to go from the empty prompt (FLUX.2 klein
    /// base). Default 3.5.
    pub guidance_scale: f64,
    /// Height in pixels, a multiple of 16. Default 512.
    pub height: u32,
    /// Width in pixels, a multiple of 16. Default 512.
    pub width: u32,
    /// Seed of the previews' own noise. Default 42.
    pub seed: u64,
    /// Another autoencoder to decode previews with, a component folder or a single `.safetensors` file: TAEF1 is a hundredth of FLUX.1's
    /// own. Default none.
    pub preview_vae: Option<PathBuf>,
}

impl Default for SampleSection {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            every: 100,
            at_start: true,
            num_inference_steps: 20,
            guidance_scale: 3.5,
            height: 512,
            width: 512,
            seed: 42,
            preview_vae: None,
        }
    }
}

/// What is written beside `metrics.jsonl`, for programs that show curves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoggingSection {
    /// Write TensorBoard's event files, in `tensorboard` in the run folder. Default true.
    pub tensorboard: bool,
    /// Write `metrics.csv` in the run folder. Default true.
    pub csv: bool,
}

impl Default for LoggingSection {
    fn default() -> Self {
        Self {
            tensorboard: true,
            csv: true,
        }
    }
}

/// The loss on pictures that are not trained on, at noise and noise levels that never change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationSection {
    /// Folder of held-out images with captions, in the forms of `dataset.path`. This or `share` is required in this section.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Share of the dataset to hold out, above 0 and below 1; the same samples whenever the run goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Validate each time this many optimizer steps are done. Default 100.
    pub every: u64,
    /// Bands of equal width that [0, 1] is cut into; each sample is tried once in each, at its own level. Default 4.
    pub bands: usize,
    /// Stop when the loss has not fallen for this many validations; absent to go on. Default: absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// Seed of the noise, the levels and the share. Default 42.
    pub seed: u64,
}

impl Default for ValidationSection {
    fn default() -> Self {
        Self {
            path: None,
            share: None,
            every: 100,
            bands: 4,
            patience: None,
            seed: 42,
        }
    }
}

/// A moving average of the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmaSection {
    /// Share of the average that is kept in a step, above 0 and below 1; less in the first steps, as in diffusers. Default 0.999.
    pub decay: f64,
    /// Make previews with the average. Default true.
    pub sample: bool,
    /// Write the average as the finished LoRA. Default true.
    pub export: bool,
}

impl Default for EmaSection {
    fn default() -> Self {
        Self {
            decay: 0.999,
            sample: true,
            export: true,
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
    /// A preset that does not exist.
    #[error("there is no preset `{name}`; there are: {known}")]
    Preset {
        /// As given.
        name: String,
        /// Those that do.
        known: String,
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

    fn from_toml_on(
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

    /// What changes from this configuration, the recorded one, to `new`, in the order of the keys.
    ///
    /// What steps already taken do not depend on is `allowed`: how many there will be, the learning rate and its schedule,
    /// `checkpoint`, `memory`, `sample` and where files are. Any other change would make the resumed run differ
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
            (
                "validation.path",
                (self.validation.as_mut()).and_then(|validation| validation.path.as_mut()),
            ),
        ]
        .into_iter()
        .filter_map(|(key, path)| path.map(|path| (key, path)))
        .chain(
            self.dataset
                .folders
                .iter_mut()
                .map(|folder| ("dataset.folders", &mut folder.path)),
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
        self.optimizer.check()?;
        self.lr_scheduler.check(self.optimizer.learning_rate)?;
        self.train.check()?;
        self.memory.check(&self.lora)?;
        self.checkpoint.check()?;
        self.export.check(self.lora.peft_type)?;
        if let Some(validation) = &self.validation {
            validation.check()?;
            let beside = self.dataset.reference.is_some() || self.dataset.mask.is_some();
            if validation.path.is_some() && beside {
                let problem = "cannot be given with `dataset.reference` or `dataset.mask`, which have pictures for those of the dataset alone: hold out a share, with `validation.share`";
                return Err(("validation.path", problem.into()));
            }
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

/// Whether a run may take another value for `key` (`section.key`) on resume and still be exact.
pub(crate) fn may_change_on_resume(key: &str) -> bool {
    MAY_CHANGE_ON_RESUME
        .iter()
        .any(|entry| key == *entry || (entry.ends_with('.') && key.starts_with(entry)))
}
