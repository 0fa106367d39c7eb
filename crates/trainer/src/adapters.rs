//! LoRA files of any format onto the networks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use burn::module::Module;
use flux_model::family::Adapt;
use flux_model::lora::{Change, Component, LoraSet, ModelShape, read};
use flux_model::weights::{change_parameters, tensors_of};
use lora_core::files::host::HostTensor;
use lora_core::{AdapterSource, ForwardPath, Plan, set_adapters};
use tracing::{info, warn};

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
    let set = read(path, shape).with_context(|| format!("load LoRA {}", path.display()))?;
    let report = &set.report;
    let formats: Vec<&str> = report.formats.keys().map(String::as_str).collect();
    info!(path = %path.display(), formats = formats.join(", "), modules = set.len(), keys_used = report.used, "LoRA");
    for (key, reason) in &report.ignored {
        warn!("ignored `{key}`: {reason}");
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

    fn adapt<M: Module>(&self, component: Component, module: M) -> anyhow::Result<M> {
        attach(module, component, self.0)
    }
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
            let model = RefCell::new(&model);
            let mut base = |module: &str| {
                let key = format!("{module}.weight");
                tensors_of(*model.borrow(), |name| name == key)
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
            let plan = Plan::new(
                &model,
                &lora.name,
                None,
                AdapterSource::File(file),
                ForwardPath::Fast,
            )?;
            model = plan.apply(model);
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
