//! The keys and tensors of the formats with PEFT's parameters: diffusers files and PEFT folders.

use lora_core::LoraConfig;
use lora_core::kinds::AdapterSpec;
use lora_core::peft::{Targets, TrainBias};

use super::emit::{Emitted, Output, alpha};
use super::lycoris::to_low_rank;
use super::{Axis, Bias, Component, LoraSet, ModuleUpdate};

/// Modules as PEFT describes them.
#[derive(Default)]
pub(super) struct Described {
    /// Rank and alpha, by path.
    pub layers: Vec<(String, AdapterSpec)>,
    use_dora: bool,
    lora_bias: bool,
    /// Modules whose weight is there as a whole.
    saved: Vec<String>,
    /// Modules of which only the bias is, and whether each has low-rank factors.
    biases: Vec<bool>,
}

impl Described {
    /// Modules whose alpha is their rank.
    pub(super) fn unscaled(ranks: Vec<(String, usize)>) -> Self {
        let spec = |rank| AdapterSpec {
            rank,
            alpha: rank as f64,
            use_rslora: false,
            dropout: 0.0,
        };
        let layers = ranks.into_iter();
        Self {
            layers: layers.map(|(path, rank)| (path, spec(rank))).collect(),
            ..Self::default()
        }
    }

    /// The configuration that describes them.
    pub(super) fn config(&self) -> LoraConfig {
        let layers = self.layers.iter();
        let config = LoraConfig::of_layers(layers.map(|(path, spec)| (path.as_str(), *spec)));
        LoraConfig {
            target_modules: self.targets(),
            use_dora: self.use_dora,
            lora_bias: self.lora_bias,
            modules_to_save: self.saved.clone(),
            bias: match self.biases.iter().all(|is_adapted| *is_adapted) {
                _ if self.biases.is_empty() => TrainBias::None,
                true => TrainBias::LoraOnly,
                false => TrainBias::All,
            },
            ..config
        }
    }

    /// The modules as a list, or as one expression where an entry of a list would match other modules by its end.
    fn targets(&self) -> Targets {
        let paths = || self.layers.iter().map(|(path, _)| path);
        if paths().any(|path| path == "proj_out") {
            let escaped: Vec<_> = paths().map(|path| path.replace('.', r"\.")).collect();
            return Targets::Pattern(escaped.join("|"));
        }
        Targets::List(paths().cloned().collect())
    }
}

/// How a format with PEFT's parameters differs from the others.
pub(super) struct PeftStyle {
    /// In front of every module path.
    pub prefix: String,
    /// The scale is in `lora_B`, not in the configuration.
    pub fold: bool,
    /// Gains of the q and k norms can be replaced.
    pub norms: bool,
}

/// One component with PEFT's parameters.
pub(super) fn peft(
    set: &LoraSet,
    component: Component,
    style: &PeftStyle,
    emitted: &mut Emitted,
) -> Described {
    let PeftStyle {
        prefix,
        fold,
        norms,
    } = style;
    let fold = *fold;
    let mut described = Described::default();
    let updates = set.modules(component);
    let any_dora = updates.values().any(|update| update.magnitude.is_some());
    for (path, update) in updates {
        let key = |suffix: &str| format!("{prefix}{path}{suffix}");
        if let Some(value) = update.replacement()
            && *norms
            && path
                .rsplit('.')
                .next()
                .is_some_and(|leaf| leaf.starts_with("norm_"))
        {
            emitted
                .outputs
                .push(Output::new(key(".weight"), value.clone()));
            emitted.modules += 1;
            continue;
        }
        let replaced = match &update.bias {
            Some(Bias::Replaced(bias)) => Some(bias.clone()),
            _ => None,
        };
        let whole = update.replacement();
        if whole.is_some() || (replaced.is_some() && update.factors.is_none()) {
            let values = [(".weight", whole.cloned()), (".bias", replaced)].into_iter();
            let values = values.filter_map(|(suffix, value)| Some((suffix, value?)));
            let outputs = values.map(|(suffix, value)| Output::new(key(suffix), value));
            emitted.outputs.extend(outputs);
            emitted.modules += 1;
            match whole {
                Some(_) => described.saved.push(path.clone()),
                None => described.biases.push(false),
            }
            continue;
        }
        let update = &ModuleUpdate {
            bias: update.bias.clone().filter(|_| replaced.is_none()),
            ..update.clone()
        };
        let low_rank = match peft_form(update, any_dora) {
            Ok(low_rank) => low_rank,
            Err(reason) => {
                emitted.lose(component, path, reason);
                continue;
            }
        };
        let Some((down, up)) = low_rank.pair() else {
            continue;
        };
        let rank = down.size().0;
        let (scale, alpha) = if fold {
            (low_rank.scale, rank as f64)
        } else {
            (1.0, alpha(&low_rank, rank))
        };
        emitted
            .outputs
            .push(Output::new(key(".lora_A.weight"), down.clone()));
        emitted
            .outputs
            .push(Output::scaled(key(".lora_B.weight"), up, scale));
        if let Some(bias) = &low_rank.bias {
            let scale = match (bias, fold) {
                (Bias::Scaled(_), true) => low_rank.scale,
                (Bias::Scaled(_), false) | (_, true) => 1.0,
                (_, false) => 1.0 / low_rank.scale,
            };
            emitted
                .outputs
                .push(Output::scaled(key(".lora_B.bias"), bias.tensor(), scale));
        }
        if let Some(magnitude) = &low_rank.magnitude {
            emitted.outputs.push(Output::new(
                key(".lora_magnitude_vector"),
                magnitude.values.clone(),
            ));
        }
        if let Some(bias) = replaced {
            let bias = Output::new(key(".base_layer.bias"), bias);
            emitted.outputs.push(bias);
            described.biases.push(true);
        }
        emitted.modules += 1;
        described.use_dora |= low_rank.magnitude.is_some();
        described.lora_bias |= low_rank.bias.is_some();
        let spec = AdapterSpec {
            rank,
            alpha,
            use_rslora: false,
            dropout: 0.0,
        };
        described.layers.push((path.clone(), spec));
    }
    described
}

/// The update in the form PEFT can hold, or why there is none.
fn peft_form(update: &ModuleUpdate, any_dora: bool) -> Result<ModuleUpdate, &'static str> {
    match (&update.factors, &update.magnitude, &update.bias) {
        (None, ..) => return Err("it changes a bias without a low-rank change"),
        (_, Some(magnitude), _) if magnitude.axis != Axis::Output => {
            return Err("its DoRA magnitude counts inputs; PEFT's counts outputs");
        }
        (_, Some(_), Some(_)) => return Err("PEFT combines no bias with DoRA"),
        (_, None, _) if any_dora => {
            return Err("it has no DoRA magnitude while others do; PEFT wants all or none");
        }
        (_, _, Some(Bias::Added(_))) if update.scale == 0.0 => {
            return Err("its scale is 0 but its bias is not");
        }
        _ => {}
    }
    to_low_rank(update).ok_or("its change has no low-rank form")
}
