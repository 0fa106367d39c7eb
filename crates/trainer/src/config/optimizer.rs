//! `[optimizer]`: a name, the learning rate, and the options of that name.
//!
//! The options and their defaults are those of [`OptimizerConfig`]; one that the optimizer has not is refused.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use flux_model::lora::Component;
use flux_model::prompted::component_of;
use lora_core::peft::Patterns;
use lora_core::training::optimizers::{
    AdafactorOptions, AdamOptions, AdamW8bitOptions, AdamWOptions, LionOptions, OptimizerConfig,
    ProdigyOptions, ScheduleFreeOptions, SgdOptions,
};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use toml::{Table, Value};

use super::error::in_our_words;
use super::fields::names_of;
use super::number_or::number_or_none;
use super::rules::{ABOVE_0, AT_LEAST_0, BELOW_1, Invalid, Rule};
use super::schemas::word_or;

/// How gradients become updates.
#[derive(Debug, Clone, PartialEq, JsonSchema)]
pub struct OptimizerSection {
    /// The update rule, from the table below. Default "adamw".
    #[schemars(rename = "name", with = "Option<String>")]
    pub rule: OptimizerConfig,
    /// Size of an update, before the schedule. Default: by name.
    #[schemars(with = "Option<f64>")]
    pub learning_rate: f64,
    /// Gradients are scaled down when their norm over all factors together exceeds this; "none" leaves them. Default 1.
    #[schemars(schema_with = "word_or::<f64>", default)]
    pub max_grad_norm: Option<f64>,
    /// Learning rate of what is trained of text encoders, before the schedule. Default: `learning_rate`.
    pub text_encoder_lr: Option<f64>,
    /// Factor on the learning rate of the second factor of every update (`lora_B`), as LoRA+ has it (arXiv:2402.12354).
    /// Default: 1.
    pub loraplus_lr_ratio: Option<f64>,
    /// Factors on the learning rate of the layers whose path matches the key, as in `lora.rank_pattern`: `{
    /// "single_transformer_blocks.*" = 0.5 }`. Default: none.
    #[schemars(with = "Option<BTreeMap<String, f64>>")]
    pub lr_pattern: Patterns<f64>,
}

/// The keys that every optimizer has.
#[derive(Deserialize)]
#[serde(default)]
struct Common {
    learning_rate: Option<f64>,
    #[serde(with = "number_or_none")]
    max_grad_norm: Option<f64>,
    text_encoder_lr: Option<f64>,
    loraplus_lr_ratio: Option<f64>,
    lr_pattern: Patterns<f64>,
}

/// Their names.
const COMMON: [&str; 5] = [
    "learning_rate",
    "max_grad_norm",
    "text_encoder_lr",
    "loraplus_lr_ratio",
    "lr_pattern",
];

impl Default for Common {
    fn default() -> Self {
        Self {
            learning_rate: None,
            max_grad_norm: Some(1.0),
            text_encoder_lr: None,
            loraplus_lr_ratio: None,
            lr_pattern: Patterns::default(),
        }
    }
}

impl OptimizerSection {
    /// The section with the defaults of `rule`.
    pub fn of(rule: OptimizerConfig) -> Self {
        Self {
            learning_rate: match rule {
                OptimizerConfig::Prodigy(_) => 1.0,
                OptimizerConfig::ScheduleFreeAdamw(_) => 2.5e-3,
                OptimizerConfig::Adafactor(_) => 1e-2,
                OptimizerConfig::Sgd(_) => 1e-3,
                _ => 1e-4,
            },
            max_grad_norm: Some(1.0),
            text_encoder_lr: None,
            loraplus_lr_ratio: None,
            lr_pattern: Patterns::default(),
            rule,
        }
    }

    /// Reads what is written; the error is a key and what is wrong with its value.
    pub(super) fn read(mut table: Table) -> Result<Self, (String, String)> {
        let common: Common = part(&table)?;
        table.retain(|key, _| COMMON.iter().all(|common| key != *common));
        table.entry("name").or_insert_with(|| "adamw".into());
        let section = Self::of(part(&table)?);
        Ok(Self {
            learning_rate: common.learning_rate.unwrap_or(section.learning_rate),
            max_grad_norm: common.max_grad_norm,
            text_encoder_lr: common.text_encoder_lr,
            loraplus_lr_ratio: common.loraplus_lr_ratio,
            lr_pattern: common.lr_pattern,
            ..section
        })
    }

    /// Every key that some optimizer has.
    pub(super) fn keys() -> Vec<&'static str> {
        let mut keys = vec!["name"];
        keys.extend(COMMON);
        for options in [
            names_of::<AdamWOptions>(),
            names_of::<AdamW8bitOptions>(),
            names_of::<AdamOptions>(),
            names_of::<SgdOptions>(),
            names_of::<LionOptions>(),
            names_of::<AdafactorOptions>(),
            names_of::<ProdigyOptions>(),
            names_of::<ScheduleFreeOptions>(),
        ] {
            let new = options.iter().filter(|key| !keys.contains(key));
            let new: Vec<_> = new.copied().collect();
            keys.extend(new);
        }
        keys
    }

    /// The factor on the learning rate of each of these parameters that has another than 1.
    ///
    /// # Errors
    /// A pattern that is no regular expression, or matches no layer.
    pub fn rate_factors<'a>(
        &self,
        parameters: impl IntoIterator<Item = &'a String>,
    ) -> anyhow::Result<BTreeMap<String, f64>> {
        let mut unused: BTreeSet<&str> = self.lr_pattern.iter().map(|(key, _)| key).collect();
        let mut factors = BTreeMap::new();
        for path in parameters {
            let parameter = path.split_once(".adapter.").map_or(&**path, |(p, _)| p);
            let layer = parameter.rsplit_once('.').map_or(parameter, |(l, _)| l);
            let mut factor = 1.0;
            if let Some((pattern, of_layer)) = self.lr_pattern.matching(layer)? {
                unused.remove(pattern);
                factor = of_layer;
            }
            if let Some(lr) = self.text_encoder_lr
                && component_of(path) != Component::Transformer
            {
                factor *= lr / self.learning_rate;
            }
            if let Some(ratio) = self.loraplus_lr_ratio
                && path.ends_with(".lora_B")
            {
                factor *= ratio;
            }
            if factor != 1.0 {
                factors.insert(path.clone(), factor);
            }
        }
        if let Some(pattern) = unused.first() {
            bail!("`optimizer.lr_pattern`: `{pattern}` matches no layer that is trained");
        }
        Ok(factors)
    }

    /// The name and the options of [`rule`](Self::rule), as they are written.
    fn options(&self) -> Result<Table, toml::ser::Error> {
        Table::try_from(&self.rule)
    }

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
                if self.text_encoder_lr.is_some() {
                    return Err(("optimizer.text_encoder_lr", problem.into()));
                }
                if self.loraplus_lr_ratio.is_some() {
                    return Err(("optimizer.loraplus_lr_ratio", problem.into()));
                }
                if !self.lr_pattern.is_empty() {
                    return Err(("optimizer.lr_pattern", problem.into()));
                }
            }
            _ => {}
        }
        if let Some(lr) = self.text_encoder_lr {
            AT_LEAST_0.check("optimizer.text_encoder_lr", lr)?;
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

impl Default for OptimizerSection {
    fn default() -> Self {
        Self::of(OptimizerConfig::default())
    }
}

/// `table` as a `T`; what is wrong is found by reading each key alone.
fn part<T: DeserializeOwned>(table: &Table) -> Result<T, (String, String)> {
    let error: toml::de::Error = match table.clone().try_into() {
        Ok(read) => return Ok(read),
        Err(error) => error,
    };
    let with_name = |wanted: &str| {
        let mut table = table.clone();
        table.retain(|key, _| key == "name" || key == wanted);
        table.try_into::<T>().err()
    };
    let keys = ["name"].into_iter().chain(table.keys().map(String::as_str));
    let wrong = keys.map(|key| (key, with_name(key)));
    let (key, error) = wrong
        .into_iter()
        .find_map(|(key, error)| Some((key, error?)))
        .unwrap_or(("name", error));
    let problem = match error.message().split_once("expected ") {
        Some((unknown, options)) if unknown.starts_with("unknown field") => {
            let name = table["name"].as_str().unwrap_or_default();
            let options = options.trim_start_matches("one of ");
            format!("has no effect with name = \"{name}\", whose options are {options}")
        }
        _ => in_our_words(error.message()),
    };
    Err((key.into(), problem))
}

impl Serialize for OptimizerSection {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut table = Table::new();
        let mut options = self.options().map_err(ser::Error::custom)?;
        table.extend(options.remove("name").map(|name| ("name".into(), name)));
        table.insert("learning_rate".into(), self.learning_rate.into());
        table.extend(options);
        let norm = self.max_grad_norm.map_or("none".into(), Value::from);
        table.insert("max_grad_norm".into(), norm);
        let lr = self.text_encoder_lr;
        table.extend(lr.map(|lr| ("text_encoder_lr".into(), lr.into())));
        let ratio = self.loraplus_lr_ratio;
        table.extend(ratio.map(|ratio| ("loraplus_lr_ratio".into(), ratio.into())));
        if !self.lr_pattern.is_empty() {
            let pattern = Value::try_from(&self.lr_pattern).map_err(ser::Error::custom)?;
            table.insert("lr_pattern".into(), pattern);
        }
        table.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for OptimizerSection {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(Table::deserialize(deserializer)?)
            .map_err(|(key, problem)| de::Error::custom(format!("`{key}`: {problem}")))
    }
}
