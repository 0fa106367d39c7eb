//! What values of the configuration must be, beyond what their types say.

use std::path::Path;

use lora_core::peft::{PeftType, Targets};
use lora_core::training::optimizers::{OptimizerConfig, SgdOptions};
use toml::Value;

use super::targets::{Indices, block_indices};
use super::{
    BasePlace, CheckpointSection, DatasetSection, EmaSection, ExportFormat, ExportSection,
    LoraSection, LossType, LossWeighting, LrSchedulerName, LrSchedulerSection, MAX_COUNT,
    MAX_SEQUENCE_LENGTH, MAX_SIDE_PX, MemorySection, ModelSection, OptimizerSection, Recompute,
    SIDE_MULTIPLE_PX, SampleSection, TimestepSampling, TimestepShift, TrainSection,
    ValidationSection,
};
use crate::data::image::is_image_extension;
use crate::nearest::one_line;

/// A key and what is wrong with its value.
pub(super) type Invalid = (&'static str, String);

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
    pub(super) fn check(&self) -> Result<(), Invalid> {
        check_path("model.path", Some(&self.path))?;
        check_path("model.transformer", self.transformer.as_deref())?;
        check_path("model.vae", self.vae.as_deref())
    }
}

impl DatasetSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        if self.folders.is_empty() {
            check_path("dataset.path", Some(&self.path))?;
        } else if !self.path.as_os_str().is_empty() {
            let problem = "cannot be given with `dataset.path`: name that folder among them";
            return Err(("dataset.folders", problem.into()));
        }
        for folder in &self.folders {
            check_path("dataset.folders", Some(&folder.path))?;
            check_count("dataset.folders", folder.repeats, MAX_COUNT)?;
            ABOVE_0.check("dataset.folders", folder.loss_weight)?;
            check_word("dataset.folders", folder.trigger_word.as_deref())?;
        }
        check_word("dataset.trigger_word", self.trigger_word.as_deref())?;
        for (key, folder) in [
            ("dataset.reference", &self.reference),
            ("dataset.mask", &self.mask),
        ] {
            check_path(key, folder.as_deref())?;
            if folder.is_some() && !self.folders.is_empty() {
                let problem = "cannot be together with `dataset.folders` yet: give one folder as `dataset.path`";
                return Err((key, problem.into()));
            }
            if folder.as_ref() == Some(&self.path) {
                let problem = "is `dataset.path`: put these pictures into a folder of their own";
                return Err((key, problem.into()));
            }
        }
        if self.reference.is_some() && self.mask.is_some() {
            let problem = "cannot be together with `dataset.mask`: no model reads both";
            return Err(("dataset.reference", problem.into()));
        }
        check_side("dataset.bucket_step", self.bucket_step)?;
        let resolutions = self.resolution.as_slice();
        if resolutions.is_empty() {
            return Err(("dataset.resolution", "must name at least one".into()));
        }
        for (index, &resolution) in resolutions.iter().enumerate() {
            check_side("dataset.resolution", resolution)?;
            if resolutions[..index].contains(&resolution) {
                let problem = format!("must name each only once, found {resolution} twice");
                return Err(("dataset.resolution", problem));
            }
            if self.bucket_step > resolution {
                let problem = format!(
                    "must be at most dataset.resolution = {resolution}, found {}",
                    self.bucket_step
                );
                return Err(("dataset.bucket_step", problem));
            }
        }
        check_count("dataset.random_crops", self.random_crops, 64)?;
        check_count("dataset.caption_variants", self.caption_variants, 1024)?;
        BELOW_1.check(
            "dataset.caption_tag_dropout_rate",
            self.caption_tag_dropout_rate,
        )?;
        if self.caption_separator.trim().is_empty() {
            let problem = "must be what stands between tags, such as \",\"";
            return Err(("dataset.caption_separator", problem.into()));
        }
        if self.keep_tokens > 0 && !self.varies_captions() {
            let problem = "has no effect without `shuffle_caption` or `caption_tag_dropout_rate`";
            return Err(("dataset.keep_tokens", problem.into()));
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
    pub(super) fn check(&self) -> Result<(), Invalid> {
        check_count("lora.r", self.r, MAX_COUNT)?;
        ABOVE_0.check("lora.lora_alpha", self.lora_alpha)?;
        for (_, &r) in self.rank_pattern.iter() {
            check_count("lora.rank_pattern", r, MAX_COUNT)?;
        }
        for (_, &alpha) in self.alpha_pattern.iter() {
            ABOVE_0.check("lora.alpha_pattern", alpha)?;
        }
        let nothing = match &self.target_modules {
            None => false,
            Some(Targets::Pattern(pattern)) => pattern.is_empty(),
            Some(Targets::List(endings)) => endings.is_empty(),
        };
        if nothing {
            return Err(("lora.target_modules", "must name at least one layer".into()));
        }
        let mut empty = Vec::new();
        for (key, text) in [
            (
                "lora.train_double_block_indices",
                &self.train_double_block_indices,
            ),
            (
                "lora.train_single_block_indices",
                &self.train_single_block_indices,
            ),
        ] {
            let Some(text) = text else { continue };
            if block_indices(text).map_err(|problem| (key, problem))? == Indices::These(Vec::new())
            {
                empty.push(key);
            }
        }
        if let [_, key] = empty[..] {
            return Err((
                key,
                "leaves no block to adapt, with none of the double ones either".into(),
            ));
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
    pub(super) fn check(&self) -> Result<(), Invalid> {
        ABOVE_0.check("optimizer.learning_rate", self.learning_rate)?;
        let options = self.options().map_err(|error| {
            let problem = format!("cannot be written as TOML: {error}");
            ("optimizer", problem)
        })?;
        for (key, rule) in OPTIMIZER_OPTIONS {
            let numbers = match options.get(key.trim_start_matches("optimizer.")) {
                Some(Value::Array(numbers)) => numbers.clone(),
                number => number.cloned().into_iter().collect(),
            };
            for number in numbers.iter().filter_map(Value::as_float) {
                rule.check(key, number)?;
            }
        }
        match &self.rule {
            OptimizerConfig::ScheduleFreeAdamw(options) => {
                ABOVE_0.check("optimizer.betas", options.betas[0])?;
            }
            OptimizerConfig::Sgd(options) => check_momentum(options)?,
            OptimizerConfig::Prodigy(_) => {
                let problem =
                    "cannot be used with name = \"prodigy\", which has one rate for all parameters";
                if self.loraplus_lr_ratio.is_some() {
                    return Err(("optimizer.loraplus_lr_ratio", problem.into()));
                }
                if !self.lr_pattern.is_empty() {
                    return Err(("optimizer.lr_pattern", problem.into()));
                }
            }
            _ => {}
        }
        if let Some(ratio) = self.loraplus_lr_ratio {
            ABOVE_0.check("optimizer.loraplus_lr_ratio", ratio)?;
        }
        for (_, &factor) in self.lr_pattern.iter() {
            AT_LEAST_0.check("optimizer.lr_pattern", factor)?;
        }
        if let Some(norm) = self.max_grad_norm {
            let rule = Rule("above 0, or \"none\" for no clipping", ABOVE_0.1);
            rule.check("optimizer.max_grad_norm", norm)?;
        }
        Ok(())
    }
}

/// The options of optimizers, and what they must be.
const OPTIMIZER_OPTIONS: [(&str, Rule); 13] = [
    ("optimizer.betas", BELOW_1),
    ("optimizer.eps", ABOVE_0),
    ("optimizer.weight_decay", AT_LEAST_0),
    ("optimizer.momentum", BELOW_1),
    ("optimizer.dampening", BELOW_1),
    ("optimizer.beta2_decay", Rule("below 0", |x| x < 0.0)),
    ("optimizer.d", Rule("at least 1", |x| x >= 1.0)),
    ("optimizer.beta3", BELOW_1),
    ("optimizer.d0", ABOVE_0),
    ("optimizer.d_coef", ABOVE_0),
    ("optimizer.growth_rate", Rule("above 1", |x| x > 1.0)),
    ("optimizer.r", AT_LEAST_0),
    ("optimizer.weight_lr_power", AT_LEAST_0),
];

fn check_momentum(options: &SgdOptions) -> Result<(), Invalid> {
    if options.momentum == 0.0 && options.dampening != 0.0 {
        let problem = "has no effect without momentum: set `momentum`";
        return Err(("optimizer.dampening", problem.into()));
    }
    if options.nesterov && (options.momentum == 0.0 || options.dampening != 0.0) {
        let problem = "needs a `momentum` above 0, and no `dampening`";
        return Err(("optimizer.nesterov", problem.into()));
    }
    Ok(())
}

impl ExportSection {
    pub(super) fn check(&self, kind: PeftType) -> Result<(), Invalid> {
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
    pub(super) fn check(&self, learning_rate: f64) -> Result<(), Invalid> {
        if self.name == LrSchedulerName::Constant && self.warmup_steps > 0 {
            let problem = format!(
                "has no effect with name = \"constant\", found {}: use \"constant_with_warmup\"",
                self.warmup_steps
            );
            return Err(("lr_scheduler.warmup_steps", problem));
        }
        if let Some(cycles) = self.num_cycles {
            let rule = match self.name {
                LrSchedulerName::CosineWithRestarts => Rule(
                    "a whole number of at least 1 with name = \"cosine_with_restarts\"",
                    |x| x >= 1.0 && x.fract() == 0.0,
                ),
                _ => ABOVE_0,
            };
            rule.check("lr_scheduler.num_cycles", cycles)?;
        }
        for (key, value) in [
            ("lr_scheduler.power", self.power),
            ("lr_scheduler.lr_end", self.lr_end),
        ] {
            let Some(value) = value else { continue };
            if self.name != LrSchedulerName::Polynomial {
                return Err((key, "has no effect but with name = \"polynomial\"".into()));
            }
            ABOVE_0.check(key, value)?;
        }
        match self.lr_end {
            Some(end) if end >= learning_rate => {
                let problem =
                    format!("must be below optimizer.learning_rate = {learning_rate}, found {end}");
                Err(("lr_scheduler.lr_end", problem))
            }
            _ => Ok(()),
        }
    }
}

impl TrainSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
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
        let unshifted = self.shift == TimestepShift::Constant(1.0);
        match self.timestep_sampling {
            TimestepSampling::Shift if unshifted => {
                let problem = "must be another number than 1 with timestep_sampling = \"shift\": kohya's discrete_flow_shift, 3 there unless given";
                return Err(("train.shift", problem.into()));
            }
            TimestepSampling::FluxShift if !unshifted => {
                let problem = "has no effect with timestep_sampling = \"flux_shift\", which has the shift of the image's size";
                return Err(("train.shift", problem.into()));
            }
            _ => {}
        }
        for (key, value, used, with) in [
            (
                "train.huber_c",
                self.huber_c,
                self.loss_type == LossType::Huber,
                "loss_type = \"huber\"",
            ),
            (
                "train.min_snr_gamma",
                self.min_snr_gamma,
                self.loss_weighting == LossWeighting::MinSnr,
                "loss_weighting = \"min_snr\"",
            ),
        ] {
            let Some(value) = value else { continue };
            if !used {
                return Err((key, format!("has no effect but with {with}")));
            }
            ABOVE_0.check(key, value)?;
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

impl MemorySection {
    pub(super) fn check(&self, lora: &LoraSection) -> Result<(), Invalid> {
        if self.base != BasePlace::Stream {
            return Ok(());
        }
        if let Recompute::First(_) = self.recompute {
            let problem = "must be \"all\" or \"auto\" with base = \"stream\": what is kept of a block keeps its weights";
            return Err(("memory.recompute", problem.into()));
        }
        if lora.reads_base_weights() {
            let problem = "cannot be \"stream\": this adapter starts from the base weights, which have to be in memory for that; use \"resident\"";
            return Err(("memory.base", problem.into()));
        }
        Ok(())
    }
}

impl CheckpointSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
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
    pub(super) fn check(&self) -> Result<(), Invalid> {
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
        check_seed("sample.seed", self.seed)?;
        check_path("sample.preview_vae", self.preview_vae.as_deref())
    }
}

impl ValidationSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        match (&self.path, self.share) {
            (None, None) => {
                let problem = "or `validation.share` is required: name a folder of held-out pictures, or the share of the dataset to hold out";
                return Err(("validation.path", problem.into()));
            }
            (Some(_), Some(_)) => {
                let problem =
                    "cannot be given with `validation.path`: hold out a share, or name a folder";
                return Err(("validation.share", problem.into()));
            }
            (path, share) => {
                check_path("validation.path", path.as_deref())?;
                let rule = Rule("above 0 and below 1", |x| x > 0.0 && x < 1.0);
                share.map_or(Ok(()), |share| rule.check("validation.share", share))?;
            }
        }
        check_at_least_1("validation.every", self.every)?;
        check_count("validation.bands", self.bands, 64)?;
        (self.patience).map_or(Ok(()), |n| check_at_least_1("validation.patience", n))?;
        check_seed("validation.seed", self.seed)
    }
}

impl EmaSection {
    pub(super) fn check(&self, rule: &OptimizerConfig) -> Result<(), Invalid> {
        if matches!(rule, OptimizerConfig::ScheduleFreeAdamw(_)) {
            let problem = "cannot be used with optimizer.name = \"schedule_free_adamw\", which has an average of its own";
            return Err(("ema", problem.into()));
        }
        let between = Rule("above 0 and below 1", |x| x > 0.0 && x < 1.0);
        between.check("ema.decay", self.decay)
    }
}

fn check_word(key: &'static str, word: Option<&str>) -> Result<(), Invalid> {
    match word {
        Some(word) if word.trim().is_empty() || word.contains(char::is_control) => {
            let problem = format!("must be a word, found \"{}\"", one_line(word));
            Err((key, problem))
        }
        _ => Ok(()),
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
    let below =
        (side_px / SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX).clamp(SIDE_MULTIPLE_PX, MAX_SIDE_PX);
    let nearest = match below + SIDE_MULTIPLE_PX {
        above if side_px > below && above <= MAX_SIDE_PX => format!("{below} or {above}"),
        _ => below.to_string(),
    };
    let problem = format!(
        "must be a multiple of {SIDE_MULTIPLE_PX} between {SIDE_MULTIPLE_PX} and {MAX_SIDE_PX}, found {side_px}: take {nearest}"
    );
    Err((key, problem))
}

fn check_path(key: &'static str, path: Option<&Path>) -> Result<(), Invalid> {
    let Some(path) = path else { return Ok(()) };
    let text = path.to_string_lossy();
    let problem = if text.is_empty() {
        "required, but not given"
    } else if text.starts_with('~') {
        "`~` is not expanded to your home folder here: write the path in full"
    } else if text.starts_with('$') || text.starts_with('%') {
        "variables are not expanded here: write the path in full"
    } else if text.contains(char::is_control) {
        "has a control character in it: in double quotes \\t is a tab and \\n a line break, so write a Windows path in single quotes or with /"
    } else {
        return Ok(());
    };
    Err((key, problem.into()))
}
