//! Changing what is attached: activate, weight, remove, detach.
//!
//! Burn gives no mutable access to a reparameterization inside somebody else's model, and silently discards a second one.
//! `edit` exchanges what is attached in one walk, for all that is done here.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;

use crate::adapter::Adapter;
use crate::adapters::{Adapters, adapters_of, edit, held};
use crate::error::LoraError;
use crate::frozen::hold;

/// Names of the attached adapters, sorted.
pub fn adapter_names<M: Module>(model: &M) -> Vec<String> {
    let found = adapters_of(model);
    let names = found.iter().flat_map(|(_, adapters)| adapters.adapters());
    let names: BTreeSet<String> = names.map(|adapter| adapter.name().into()).collect();
    names.into_iter().collect()
}

/// Parameters that an active adapter has replaced by its own, and the adapter's name.
pub(crate) fn active_replacements<M: Module>(model: &M) -> BTreeMap<String, String> {
    let replaced = replacements(model, |adapter| adapter.is_active()).into_iter();
    replaced
        .filter_map(|(path, names)| Some((path, names.into_iter().next()?)))
        .collect()
}

/// Parameters that adapters have in full, with the names of those that `counts`.
fn replacements<M: Module>(
    model: &M,
    counts: impl Fn(&Adapter) -> bool,
) -> BTreeMap<String, Vec<String>> {
    let names = |adapters: Adapters| {
        let whole = adapters.adapters.into_iter();
        let whole = whole.filter(|adapter| adapter.is_whole() && counts(adapter));
        whole.map(|adapter| adapter.name).collect()
    };
    let found = adapters_of(model).into_iter();
    found
        .map(|(path, adapters)| (path, names(adapters)))
        .collect()
}

/// Activates exactly the named adapters with the given weights; the others are kept, switched off and not trained.
///
/// A weight scales what an adapter adds; parameters that it trains in full it replaces, whatever the weight.
///
/// # Errors
/// A name that is not attached; a weight that is not finite; two adapters that train the same parameter in full.
pub fn set_adapters<M: Module>(model: M, weights: &[(&str, f64)]) -> Result<M, LoraError> {
    if let Some((name, weight)) = weights.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(LoraError::Config(format!(
            "the weight of adapter `{name}` is {weight}; it must be finite"
        )));
    }
    let attached = adapter_names(&model);
    if let Some((name, _)) = weights
        .iter()
        .find(|(name, _)| !attached.iter().any(|a| a == name))
    {
        return Err(LoraError::UnknownAdapter {
            name: name.to_string(),
            attached,
        });
    }
    let weights: BTreeMap<&str, f64> = weights.iter().copied().collect();
    let replaced = replacements(&model, |adapter| weights.contains_key(adapter.name()));
    if let Some((path, names)) = replaced.iter().find(|(_, names)| names.len() > 1) {
        return Err(LoraError::Config(format!(
            "adapters {} all train `{path}` in full; activate one of them",
            names.join(", ")
        )));
    }
    Ok(edit(model, |_, adapters| {
        adapters.each(|mut adapter| {
            let weight = weights.get(adapter.name());
            adapter.active = weight.is_some();
            adapter.weight = weight.copied().unwrap_or(1.0);
            adapter.set_trainable(weight.is_some())
        })
    }))
}

/// Removes one adapter; the base weights are untouched.
///
/// # Errors
/// A name that is not attached.
pub fn delete_adapter<M: Module>(model: M, name: &str) -> Result<M, LoraError> {
    let attached = adapter_names(&model);
    if !attached.iter().any(|a| a == name) {
        return Err(LoraError::UnknownAdapter {
            name: name.into(),
            attached,
        });
    }
    Ok(edit(model, |_, mut adapters| {
        adapters.adapters.retain(|adapter| adapter.name != name);
        adapters
    }))
}

/// Removes every adapter without merging: the base model again, bit for bit.
pub fn detach<M: Module>(model: M) -> M {
    without_adapters(edit(model, |_, mut adapters| {
        adapters.adapters.clear();
        adapters
    }))
}

/// What adapters make of the weights, in their places; weights in few bits, which no adapter may change, stay so.
pub(crate) fn without_adapters<M: Module>(model: M) -> M {
    let held = held(&model);
    let model = edit(model, |_, mut adapters| {
        adapters.frozen = None;
        adapters
    });
    let model = model.materialize();
    hold(model, held).expect("they were held")
}
