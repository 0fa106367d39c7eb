//! Adapters into the base weights: what is computed stays what the adapters computed.
//!
//! Active adapters are added in the order they were attached. PEFT's merged DoRA takes its norms from the weight as merged so
//! far, while its forward pass takes them from the base; with an adapter before a DoRA adapter the two differ. Here both
//! are PEFT's forward pass.
//!
//! There is no `unmerge`: the adapted model is still there ([`merge`] works on a clone, which shares its tensors), while
//! subtracting, as PEFT does, would give the base back only nearly.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;

use crate::adapters::{Adapters, adapters_of};
use crate::edit::without_adapters;
use crate::error::LoraError;
use crate::state::each_parameter;

/// Adds the active adapters to the weights they sit on, a `lora_bias` to the layer's bias, puts parameters that are trained in
/// full in their places, and removes all adapters.
///
/// # Errors
/// A `lora_bias` on a layer without bias, an adapter on a weight in few bits: the sum would have to be rounded to them, and
/// most of what was learned is smaller than that.
pub fn merge<M: Module>(model: M) -> Result<M, LoraError> {
    let changed = |(path, adapters): (String, Adapters)| {
        let is_changed = adapters.frozen.is_some() && adapters.active().next().is_some();
        is_changed.then_some(path)
    };
    if let Some(path) = adapters_of(&model).into_iter().find_map(changed) {
        return Err(LoraError::Config(format!(
            "`{path}` is held in few bits, and a change cannot be merged into it; load the model as bf16 or f32, or decode the weight first (`frozen::release`)"
        )));
    }
    let mut biases = BTreeMap::<String, Tensor<1>>::new();
    for (path, adapters) in adapters_of(&model) {
        let path = format!("{}.bias", path.strip_suffix(".weight").unwrap_or(&path));
        for adapter in adapters.active() {
            if let Some(bias) = adapter.bias() {
                let bias = bias.detach().mul_scalar(adapter.scale());
                let sum = match biases.remove(&path) {
                    None => bias,
                    Some(sum) => sum + bias,
                };
                biases.insert(path.clone(), sum);
            }
        }
    }
    let mut add = AddBias {
        path: Vec::new(),
        biases,
    };
    let merged = without_adapters(model);
    if add.biases.is_empty() {
        return Ok(merged);
    }
    let merged = merged.map(&mut add);
    match add.biases.keys().next() {
        None => Ok(merged),
        Some(path) => Err(LoraError::Config(format!(
            "an adapter with `lora_bias` cannot be merged: the layer has no `{path}`"
        ))),
    }
}

/// As [`merge`], but refuses a result that is not finite; `model` stays as it is.
///
/// # Errors
/// NaN or infinity in a merged weight, by name; a `lora_bias` on a layer without bias.
pub fn safe_merge<M: Module>(model: &M) -> Result<M, LoraError> {
    let adapted = adapters_of(model).into_iter().flat_map(|(path, _)| {
        let layer = path.strip_suffix(".weight").unwrap_or(&path);
        let bias = format!("{layer}.bias");
        [path, bias]
    });
    let adapted: BTreeSet<String> = adapted.collect();
    let (merged, mut error) = (merge(model.clone())?, None);
    each_parameter(
        &merged,
        |path| adapted.contains(path),
        |key, values| {
            if let (None, Some(index)) = (&error, values.first_non_finite()) {
                error = Some(LoraError::NotFinite { key, index });
            }
        },
    );
    match error {
        None => Ok(merged),
        Some(error) => Err(error),
    }
}

struct AddBias {
    path: Vec<String>,
    biases: BTreeMap<String, Tensor<1>>,
}

impl ModuleMapper for AddBias {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.biases.remove(&self.path.join(".")) {
            None => param,
            Some(bias) => param.map(|own| {
                let shape = own.shape();
                own + bias.reshape(shape)
            }),
        }
    }
}
