//! Adapters into the base weights: what is computed stays what the adapters computed.
//!
//! Active adapters are added in the order they were attached. PEFT's merged DoRA takes its norms from the weight as merged so
//! far, while its forward pass takes them from the base; with an adapter before a DoRA adapter the two differ. Here both
//! are PEFT's forward pass.
//!
//! There is no `unmerge`: the adapted model is still there ([`merge`] works on a clone, which shares its tensors), while
//! subtracting, as PEFT does, would give the base back only nearly.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;

use crate::adapter::Lora;
use crate::edit::edit;
use crate::error::LoraError;
use crate::state::each_parameter;

/// Adds the active adapters to the weights they sit on, a `lora_bias` to the layer's bias, puts parameters that are trained in
/// full in their places, and removes all adapters.
///
/// # Errors
/// A `lora_bias` on a layer without bias.
pub fn merge<M: Module>(model: M) -> Result<M, LoraError> {
    let biases = Rc::new(RefCell::new(BTreeMap::<String, Tensor<1>>::new()));
    let sink = biases.clone();
    let _ = edit(model.clone(), move |path, lora: Lora| {
        let layer = path.strip_suffix(".weight").unwrap_or(path);
        for adapter in lora.active() {
            if let Some(bias) = adapter.bias() {
                let bias = bias.detach().mul_scalar(adapter.scale());
                let mut biases = sink.borrow_mut();
                let sum = match biases.remove(&format!("{layer}.bias")) {
                    None => bias,
                    Some(sum) => sum + bias,
                };
                biases.insert(format!("{layer}.bias"), sum);
            }
        }
        lora
    });
    let mut add = AddBias {
        path: Vec::new(),
        biases: biases.take(),
    };
    let merged = model.materialize();
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
    let adapted = Rc::new(RefCell::new(BTreeSet::<String>::new()));
    let sink = adapted.clone();
    let _ = edit(model.clone(), move |path, lora: Lora| {
        let layer = path.strip_suffix(".weight").unwrap_or(path);
        sink.borrow_mut()
            .extend([path.to_string(), format!("{layer}.bias")]);
        lora
    });
    let merged = merge(model.clone())?;
    let (adapted, mut error) = (adapted.take(), None);
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
