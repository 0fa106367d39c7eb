//! LoRA files of any format onto the networks.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use burn::module::Module;
use flux_model::family::Adapt;
use flux_model::lora::{Change, Component, LoraSet, ModelShape, read};
use flux_model::weights::{change_parameters, tensors_of};
use lora_core::files::host::HostTensor;
use lora_core::kinds::AdapterSpec;
use lora_core::kinds::parts::{Kind, LORA_B, LORA_BIAS};
use lora_core::{AdapterFile, LoraConfig, set_adapters};
use tracing::{info, warn};

use crate::config::Loras;
use crate::run::adapter::RunAdapter;

/// A LoRA file to be used at some strength.
#[derive(Debug)]
pub struct LoadedLora {
    /// Name under which it is attached.
    pub name: String,
    /// What the file says.
    pub set: LoraSet,
    /// Factor on all of it.
    pub strength: f64,
}

/// Reads a file or folder and says what was used, what was ignored and why.
///
/// # Errors
/// A malformed file, or one for another model.
pub fn load(path: &Path, shape: &ModelShape) -> anyhow::Result<LoraSet> {
    let set = read(path, shape)?;
    let report = &set.report;
    let formats: Vec<&str> = report.formats.keys().map(String::as_str).collect();
    info!(path = %path.display(), formats = formats.join(", "), modules = set.len(), keys_used = report.used, "LoRA");
    for line in report.ignored_lines() {
        warn!("{line}");
    }
    for warning in &report.warnings {
        warn!("{warning}");
    }
    Ok(set)
}

/// Attaching LoRAs to every network that they are for, see [`attach`].
pub struct AttachLoras<'a>(pub &'a [LoadedLora]);

impl Adapt for AttachLoras<'_> {
    type Error = anyhow::Error;

    fn changes_weights(&self, component: Component) -> bool {
        changes_weights(component, self.0)
    }

    fn adapt<M: Module>(&self, component: Component, module: M) -> anyhow::Result<M> {
        attach(module, component, self.0)
    }
}

/// A LoRA as what a run with `loras` starts from: its part of every network that is trained, where it has one.
///
/// A file whose scale is 1 says nothing about alpha: its scale may have been folded into the factors, as every diffusers
/// file written here has it. Its `lora_B` is divided by the configured scale, which changes no bit where that is a power
/// of two, so that the run starts from the same change. A file with a scale of its own has to agree with `loras`.
///
/// # Errors
/// A LoRA that does not fit the networks, or that changes one by more than low-rank factors.
pub fn to_train_on(path: &Path, shape: &ModelShape, loras: &Loras) -> anyhow::Result<RunAdapter> {
    let set = load(path, shape)?;
    let mut files = BTreeMap::new();
    for component in Component::ALL {
        let count = set.modules(component).len();
        let Some(config) = loras.get(&component) else {
            if count > 0 {
                warn!(
                    "{count} modules of `{component}` in {} are left out: it is not trained, and what the run writes does not have them; `[lora.{component}]` trains it",
                    path.display()
                );
            }
            continue;
        };
        let (file, residuals) = set.to_adapter(component)?;
        if let Some(residual) = residuals.first() {
            bail!(
                "{} changes `{}` of `{component}` by more than low-rank factors, so it cannot be trained on",
                path.display(),
                residual.parameter
            );
        }
        match file.modules().is_empty() {
            true if component == Component::Transformer => {
                bail!("{} changes nothing of the transformer", path.display());
            }
            true => info!(
                "{} changes nothing of `{component}`, whose adapter starts anew",
                path.display()
            ),
            false => {
                files.insert(component, unfolded(file, config)?);
            }
        }
    }
    Ok(RunAdapter(files))
}

/// The adapter with the configured scale taken out of its factors, where it says no other.
fn unfolded(file: AdapterFile, config: &LoraConfig) -> anyhow::Result<AdapterFile> {
    let mut modules = file.into_modules();
    for (layer, module) in &mut modules {
        let (rank, alpha) = config.resolve(layer)?;
        let wanted = AdapterSpec {
            rank,
            alpha,
            use_rslora: config.use_rslora,
            ..module.spec
        };
        let foldable =
            module.spec.scale() == 1.0 && rank == module.spec.rank && wanted.scale() != 0.0;
        if !foldable || module.factors.kind() != Kind::Lora {
            continue;
        }
        for (part, tensor) in module.factors.iter_mut() {
            if wanted.scale() != 1.0 && [LORA_B, LORA_BIAS].contains(&part) {
                let values = tensor.to_f32();
                let unfold = |x: &f32| (f64::from(*x) / wanted.scale()) as f32;
                let values: Vec<f32> = values.iter().map(unfold).collect();
                *tensor = HostTensor::from_f32(tensor.shape.clone(), &values);
            }
        }
        module.spec = wanted;
    }
    Ok(AdapterFile::new(modules).with_dropout(config.lora_dropout))
}

/// Whether a LoRA changes weights of `component` by more than low-rank factors, which then have to be in memory.
pub fn changes_weights(component: Component, loras: &[LoadedLora]) -> bool {
    let mut adapters = loras.iter().map(|lora| lora.set.to_adapter(component));
    adapters.any(|adapter| adapter.is_ok_and(|(_, residuals)| !residuals.is_empty()))
}

/// Puts one component of every LoRA on its network: low-rank parts as named adapters, the rest into the base weights.
///
/// # Errors
/// A LoRA that does not fit the network.
pub fn attach<M: Module>(
    mut model: M,
    component: Component,
    loras: &[LoadedLora],
) -> anyhow::Result<M> {
    let mut weights = Vec::new();
    for lora in loras {
        if component == Component::Transformer
            && let Some(channels) = lora.set.in_channels
        {
            bail!(
                "LoRA `{}` is for a model with {channels} input channels (Canny or Depth)",
                lora.name
            );
        }
        let (file, residuals) = lora.set.to_adapter(component)?;
        let mut changes = BTreeMap::new();
        {
            let mut base = |module: &str| {
                let key = format!("{module}.weight");
                tensors_of(&model, |name| name == key)
                    .remove(&key)
                    .map(|tensor| tensor.to_f32())
            };
            for residual in residuals {
                let values = residual.load(&mut base)?;
                changes.insert(
                    residual.parameter.clone(),
                    (residual.change == Change::Replace, values),
                );
            }
        }
        model = change(model, changes, lora.strength)?;
        if !file.modules().is_empty() {
            model = lora_core::attach(model, file.stored().named(&lora.name).fast())?;
            weights.push((lora.name.as_str(), lora.strength));
        }
    }
    if weights.is_empty() {
        Ok(model)
    } else {
        Ok(set_adapters(model, &weights)?)
    }
}

fn change<M: Module>(
    model: M,
    changes: BTreeMap<String, (bool, HostTensor)>,
    strength: f64,
) -> anyhow::Result<M> {
    if changes.is_empty() {
        return Ok(model);
    }
    let (model, unused) = change_parameters(model, changes, strength);
    match unused.first() {
        None => Ok(model),
        Some(parameter) => {
            bail!("the LoRA changes `{parameter}`, which the network does not have in that shape")
        }
    }
}
