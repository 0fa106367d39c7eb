//! To and from what [`lora_core`] attaches to a model.
//!
//! An adapter holds low-rank factors, DoRA magnitudes of the output axis and biases of the up projection. Everything else
//! a LoRA file can say changes the base weights themselves, as [`Residual`]s.

use std::collections::BTreeMap;

use lora_core::AdapterFile;
use lora_core::files::host::HostTensor;
use lora_core::kinds::parts::{DIFF, Kind, LORA_BIAS, MAGNITUDE};
use lora_core::kinds::{AdapterSpec, ModuleAdapter};

use super::delta::{BaseWeight, group, group_delta};
use super::error::LoraFormatError;
use super::lycoris::to_low_rank;
use super::shape::ModelShape;
use super::tensor::TensorRef;
use super::{Axis, Bias, Component, LoraSet, Magnitude, ModuleUpdate};

/// A change of a base parameter, to be made before the adapter is attached.
#[derive(Debug, Clone)]
pub struct Residual {
    /// Path of the parameter: `<module>.weight` or `<module>.bias`.
    pub parameter: String,
    /// How the values change it.
    pub change: Change,
    source: Source,
}

/// How a [`Residual`] changes its parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// `parameter + strength * values`.
    Add,
    /// The values, whatever the strength of the LoRA.
    Replace,
}

#[derive(Debug, Clone)]
enum Source {
    /// The weight of the first module; the others share its norm.
    Weight(String, Vec<(String, Option<ModuleUpdate>)>),
    Bias(Box<ModuleUpdate>),
    Value(TensorRef),
}

impl Residual {
    /// The values, as `f32`; weights are `[out, in]`.
    ///
    /// `base` is asked for base weights, `[out, in]`, by module path, where the change depends on them (DoRA).
    ///
    /// # Errors
    /// A tensor that cannot be read, or a base weight that is needed and not there.
    pub fn load(&self, base: &mut BaseWeight<'_>) -> Result<HostTensor, LoraFormatError> {
        match &self.source {
            Source::Value(tensor) => Ok(HostTensor::from_f32(tensor.shape(), &tensor.load_f32()?)),
            Source::Bias(update) => Ok(update
                .bias_values()?
                .unwrap_or_else(|| HostTensor::from_f32([0], &[]))),
            Source::Weight(path, updates) => {
                let group: Vec<_> = updates
                    .iter()
                    .map(|(path, update)| (path.clone(), update.as_ref()))
                    .collect();
                let values = group_delta(path, &group, base)?;
                let own = group
                    .iter()
                    .find_map(|(module, update)| update.filter(|_| module == path));
                let shape = own.and_then(|update| match update.factors.as_ref()?.get(DIFF) {
                    Some(change) => Some(change.shape()), // of a norm it is a vector
                    None => update.size().map(|(out, input)| vec![out, input]),
                });
                Ok(HostTensor::from_f32(shape.unwrap_or_default(), &values))
            }
        }
    }
}

impl LoraSet {
    /// One component as an adapter, and as changes of base parameters where it is more than an adapter.
    ///
    /// LoKr and LoHa become low-rank where that is exact and smaller than the dense change. Residuals are computed when
    /// loaded, so that a LoRA of dense changes never has to be in memory as a whole. The adapter may have no modules.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn to_adapter(
        &self,
        component: Component,
    ) -> Result<(AdapterFile, Vec<Residual>), LoraFormatError> {
        let all = self.modules(component);
        let mut modules = BTreeMap::new();
        let mut residuals = Vec::new();
        for (path, update) in all {
            let adapter = adapter(update)?;
            let bias_is_adapted = adapter
                .as_ref()
                .is_some_and(|adapter| adapter.factors.get(LORA_BIAS).is_some());
            match adapter {
                Some(adapter) => {
                    modules.insert(path.clone(), adapter);
                }
                None if update.factors.is_none() => {}
                None => residuals.push(weight_residual(path, update, all)),
            }
            if let Some(bias) = update.bias.as_ref().filter(|_| !bias_is_adapted) {
                residuals.push(Residual {
                    parameter: format!("{path}.bias"),
                    change: match bias {
                        Bias::Replaced(_) => Change::Replace,
                        Bias::Scaled(_) | Bias::Added(_) => Change::Add,
                    },
                    source: Source::Bias(Box::new(update.clone())),
                });
            }
        }
        Ok((AdapterFile::new(modules), residuals))
    }

    /// A set that holds an adapter of one component.
    pub fn from_adapter(adapter: &AdapterFile, component: Component, shape: ModelShape) -> Self {
        let set = Self {
            shape,
            ..Self::default()
        };
        set.with_adapter(adapter, component)
    }

    /// The same with an adapter in place of what it says of one component.
    #[must_use]
    pub fn with_adapter(mut self, adapter: &AdapterFile, component: Component) -> Self {
        let adapter = adapter.to_plain();
        let modules = adapter.modules().iter().map(|(path, module)| {
            let factors = module.factors.as_ref().map(|part, tensor| {
                let name = format!("{path}{}", part.key.unwrap_or(".weight"));
                TensorRef::host(&name, tensor.clone())
            });
            let scale = match module.factors.kind() {
                Kind::Whole => 1.0,
                _ => module.spec.scale(),
            };
            let kind = factors.kind();
            let is_lora = kind == Kind::Lora && !module.spec.use_rslora;
            let update = ModuleUpdate {
                alpha: Some(module.spec.alpha).filter(|_| is_lora),
                bias: factors.get(LORA_BIAS).cloned().map(Bias::Scaled),
                magnitude: factors.get(MAGNITUDE).map(|values| Magnitude {
                    values: values.clone(),
                    axis: Axis::Output,
                }),
                ..ModuleUpdate::of(Some(factors.without(MAGNITUDE).without(LORA_BIAS)), scale)
            };
            (path.clone(), update)
        });
        let mut modules: BTreeMap<String, ModuleUpdate> = modules.collect();
        for (key, value) in adapter.whole() {
            // Every parameter is a `weight` or a `bias`, as in PyTorch.
            let (path, name) = key.rsplit_once('.').unwrap_or(("", key));
            let update = modules.entry(path.into());
            let update = update.or_insert_with(|| ModuleUpdate::of(None, 1.0));
            let value = TensorRef::host(key, value.clone());
            match name {
                "bias" => update.bias = Some(Bias::Replaced(value)),
                _ => update.factors = Some(lora_core::kinds::Factors::whole(value)),
            }
        }
        *self.modules_mut(component) = modules;
        self
    }
}

/// The update as an adapter of its module, if it can be one.
fn adapter(update: &ModuleUpdate) -> Result<Option<ModuleAdapter>, LoraFormatError> {
    if update
        .magnitude
        .as_ref()
        .is_some_and(|magnitude| magnitude.axis != Axis::Output)
    {
        return Ok(None);
    }
    let Some(low_rank) = to_low_rank(update) else {
        return Ok(None);
    };
    let Some((down, up)) = low_rank.pair() else {
        return Ok(None);
    };
    let rank = down.size().0;
    let stated = update
        .alpha
        .filter(|alpha| alpha / rank as f64 == update.scale);
    let magnitude = update
        .magnitude
        .as_ref()
        .map(|magnitude| magnitude.values.load())
        .transpose()?;
    let bias = match &update.bias {
        // PEFT does not combine the two, and DoRA leaves biases alone.
        Some(Bias::Scaled(bias)) if magnitude.is_none() => Some(bias.load()?),
        _ => None,
    };
    let spec = AdapterSpec {
        rank,
        alpha: stated.unwrap_or(update.scale * rank as f64),
        use_rslora: false,
        dropout: 0.0,
    };
    let mut factors = lora_core::kinds::Factors::lora(down.load()?, up.load()?);
    for (part, value) in [(MAGNITUDE, magnitude), (LORA_BIAS, bias)] {
        if let Some(value) = value {
            factors = factors.with(part, value);
        }
    }
    Ok(Some(ModuleAdapter::new(spec, factors)))
}

fn weight_residual(
    path: &str,
    update: &ModuleUpdate,
    all: &BTreeMap<String, ModuleUpdate>,
) -> Residual {
    let (change, source) = match update.replacement() {
        Some(value) => (Change::Replace, Source::Value(value.clone())),
        None => {
            let group = group(path, update);
            let group = group
                .into_iter()
                .map(|path| (path.clone(), all.get(&path).cloned()));
            (Change::Add, Source::Weight(path.into(), group.collect()))
        }
    };
    Residual {
        parameter: format!("{path}.weight"),
        change,
        source,
    }
}
