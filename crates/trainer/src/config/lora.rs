//! `[lora]`: which layers are adapted, and how.

use std::collections::BTreeMap;
use std::path::PathBuf;

use flux_model::family::Family;
use flux_model::lora::Component;
use lora_core::LoraConfig;
use lora_core::peft::{InitLoraWeights, OneOrMany, Patterns, PeftType, Targets, TrainBias};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{ABOVE_0, BELOW_1, Invalid, MAX_COUNT, check_count, check_path};
use super::schemas::{one_or_many, word_or};
use super::targets::{Indices, block_indices, named};
use super::text_encoders::TextEncoderSection;

/// The adapter's configuration for every network that is trained.
pub type Loras = BTreeMap<Component, LoraConfig>;

/// Which layers are adapted, and how. Names and meanings are those of PEFT's `LoraConfig`, `LoHaConfig` and `LoKrConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSection {
    /// Kind of the update: "LORA", "LOHA" (element-wise product of two low-rank products) or "LOKR" (Kronecker product). The last
    /// two scale by `lora_alpha / r` and take no `use_rslora`, `use_dora`, `lora_dropout`, `init_from`. Default "LORA".
    #[serde(skip_serializing_if = "is_lora")]
    #[schemars(with = "String")]
    pub peft_type: PeftType,
    /// Rank of the update: columns of A, rows of B. Default 16.
    pub r: usize,
    /// Numerator of the scale `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`). Default 16.
    pub lora_alpha: f64,
    /// Layers to adapt: a list of path endings, one regular expression for the whole path, or a name: "all-linear", "attention",
    /// "kohya-default" (all layers of all blocks, modulation included), "diffusers-default". Default: "diffusers-default": those
    /// that diffusers' training script for the model adapts: FLUX.1's attention and feed-forward layers; FLUX.2's attention
    /// of the image and whole single-stream blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "one_or_many::<String>")]
    pub target_modules: Option<Targets>,
    /// Only these double-stream blocks, in kohya's form: "0-3,7", "none" or "all". Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_double_block_indices: Option<String>,
    /// Only these single-stream blocks, in the same form. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_single_block_indices: Option<String>,
    /// Layers to leave alone though `target_modules` names them, in the same forms. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "one_or_many::<String>")]
    pub exclude_modules: Option<Targets>,
    /// Only layers with these indices in their path, where `target_modules` is a list: a number or a list. PEFT finds no index in
    /// a container at the root, so name FLUX's blocks in `target_modules` instead. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "one_or_many::<usize>")]
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Names of the containers whose indices `layers_to_transform` means. Default: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "one_or_many::<String>")]
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Modules of the transformer to train in full beside the adapter, each by the end of its path, as in PEFT ("proj_out" is the
    /// last layer and one of every single-stream block). What the checkpoint has in few bits is f32 from then on; with
    /// `model.base_dtype` "q8" or "nf4" it is refused. What holds them, and who loads them, is in [formats.md](formats.md).
    /// Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Biases of the transformer to train: "none", "all", or "lora_only", those of the adapted layers. FLUX.2 has none. Default
    /// "none".
    #[serde(skip_serializing_if = "is_none")]
    #[schemars(with = "String")]
    pub bias: TrainBias,
    /// Other ranks for the layers whose path matches the key. Default: none.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    #[schemars(with = "BTreeMap<String, usize>")]
    pub rank_pattern: Patterns<usize>,
    /// Other alphas for the layers whose path matches the key. Default: none.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    #[schemars(with = "BTreeMap<String, f64>")]
    pub alpha_pattern: Patterns<f64>,
    /// Scale by `lora_alpha / sqrt(r)`. Default false.
    pub use_rslora: bool,
    /// Learn the magnitude of each weight row apart from its direction (DoRA). Default false.
    pub use_dora: bool,
    /// Probability in [0, 1) of dropping an input of the adapter. Masks are drawn on the host: some 0.1 s of a core for a layer
    /// of FLUX.1 at 1024 pixels. Default 0.
    pub lora_dropout: f64,
    /// How A and B start: "gaussian", true (uniform A, zero B), false (both random), "orthogonal" (both random, no change at
    /// first), "pissa", "pissa_niter_N" or "olora" (see below). LOHA and LOKR: true (no change at first) or false. Default:
    /// "gaussian"; LOHA, LOKR: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "word_or::<bool>")]
    pub init_lora_weights: Option<InitLoraWeights>,
    /// LOKR: factor the outer matrix as well, where the rank is below half its longer side. Default false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub decompose_both: bool,
    /// LOKR: size of the outer matrix where it divides the layer's, else the largest divisor up to it; -1 for the divisor nearest
    /// to the square root. Default -1.
    #[serde(skip_serializing_if = "is_minus_one")]
    pub decompose_factor: i64,
    /// LoRA file to continue from instead of fresh weights; of the text encoders as well, where they are trained and it has them.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// A section, `[lora.text_encoder]`, which may be empty: adapts the CLIP text encoder as well. Default: not adapted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder: Option<TextEncoderSection>,
    /// `[lora.text_encoder_2]`: the same for T5. Default: not adapted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder_2: Option<TextEncoderSection>,
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
            modules_to_save: Vec::new(),
            bias: TrainBias::None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            use_rslora: false,
            use_dora: false,
            lora_dropout: 0.0,
            init_lora_weights: None,
            decompose_both: false,
            decompose_factor: -1,
            init_from: None,
            text_encoder: None,
            text_encoder_2: None,
        }
    }
}

impl LoraSection {
    /// Names the layers to adapt as paths: what `target_modules` means for this family, in the blocks that are asked for.
    pub fn name_targets<F: Family>(&mut self) {
        let double = self.train_double_block_indices.take();
        let single = self.train_single_block_indices.take();
        let targets = self.target_modules.take();
        self.target_modules = Some(named::<F>(targets, double.as_deref(), single.as_deref()));
    }

    /// Whether it starts from the values of the base weights.
    pub fn reads_base_weights(&self) -> bool {
        let splits = self
            .init_lora_weights
            .is_some_and(|init| init.splits_base());
        self.use_dora || splits || self.trains_in_full()
    }

    /// Whether more is trained than factors.
    pub fn trains_in_full(&self) -> bool {
        !self.modules_to_save.is_empty() || self.bias != TrainBias::None
    }

    /// The same as PEFT's configuration; no target if none is named.
    pub fn config(&self) -> LoraConfig {
        LoraConfig {
            peft_type: self.peft_type,
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            modules_to_save: self.modules_to_save.clone(),
            bias: self.bias,
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
        }
    }

    /// The text encoders that are adapted, each with its section and its key.
    fn text_sections(
        &self,
    ) -> impl Iterator<Item = (Component, &TextEncoderSection, &'static str)> {
        let sections = [
            (Component::ClipL, &self.text_encoder, "lora.text_encoder"),
            (Component::T5, &self.text_encoder_2, "lora.text_encoder_2"),
        ];
        let sections = sections.into_iter();
        sections.filter_map(|(encoder, section, key)| Some((encoder, section.as_ref()?, key)))
    }

    /// The text encoders that are adapted.
    pub fn text_encoders(&self) -> Vec<Component> {
        self.text_sections().map(|(encoder, ..)| encoder).collect()
    }

    /// The configuration of every network's adapter.
    pub fn configs(&self) -> Loras {
        let text = self.text_sections();
        let text =
            text.map(|(encoder, section, _)| (encoder, section.config(encoder, self.config())));
        text.chain([(Component::Transformer, self.config())])
            .collect()
    }

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
        if self.trains_in_full() && self.init_from.is_some() {
            let problem = "continues low-rank factors alone, and `lora.modules_to_save` and `lora.bias` train more: remove one of the two";
            return Err(("lora.init_from", problem.into()));
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
        for (encoder, section, key) in self.text_sections() {
            if self.peft_type != PeftType::Lora {
                let problem = format!(
                    "cannot be together with lora.peft_type = \"{}\": no program loads such an adapter of a text encoder",
                    self.peft_type
                );
                return Err((key, problem));
            }
            let config = section.config(encoder, self.config());
            check_count(key, config.r, MAX_COUNT)?;
            ABOVE_0.check(key, config.lora_alpha)?;
            let valid = config.validate();
            valid.map_err(|error| (key, format!("is not valid: {error}")))?;
        }
        check_path("lora.init_from", self.init_from.as_deref())
    }
}

fn is_none(bias: &TrainBias) -> bool {
    *bias == TrainBias::None
}

fn is_lora(kind: &PeftType) -> bool {
    *kind == PeftType::Lora
}

fn is_minus_one(value: &i64) -> bool {
    *value == -1
}
