//! Changing what is attached: activate, weight, remove, detach.
//!
//! Burn gives no mutable access to a reparameterization inside somebody else's model, and silently discards a second one.
//! The way in is `Module::map`: it reaches every [`Lora`], whose hand-written `map` runs the function that
//! [`edit`] has put in place for the duration of one walk.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::adapter::{Adapter, Lora};
use crate::error::LoraError;

type EditFn = Box<dyn FnMut(&str, Lora) -> Lora>;

struct Pending {
    edit: EditFn,
    path: Vec<String>,
}

thread_local! {
    static PENDING: RefCell<Option<Pending>> = const { RefCell::new(None) };
}

/// Removes the pending edit even if the walk panics.
struct Installed;
impl Drop for Installed {
    fn drop(&mut self) {
        PENDING.with(|pending| *pending.borrow_mut() = None);
    }
}

/// Called by `Lora::map` on every walk; does nothing unless [`edit`] started the walk.
pub(crate) fn apply_pending(lora: Lora) -> Lora {
    // Taken out while it runs, so that a walk inside the edit does not see it.
    let Some(mut pending) = PENDING.with(|pending| pending.borrow_mut().take()) else {
        return lora;
    };
    let owner = pending.path[..pending.path.len().saturating_sub(1)].join("."); // the last part is "lora"
    let lora = (pending.edit)(&owner, lora);
    PENDING.with(|slot| *slot.borrow_mut() = Some(pending));
    lora
}

/// Replaces the adapters of every adapted weight by what `f` makes of them; `f` gets the weight's path.
pub(crate) fn edit<M: Module>(model: M, f: impl FnMut(&str, Lora) -> Lora + 'static) -> M {
    struct Walk;
    impl ModuleMapper for Walk {
        fn enter_module(&mut self, name: &str, _: &str) {
            PENDING.with(|pending| {
                if let Some(pending) = pending.borrow_mut().as_mut() {
                    pending.path.push(name.into());
                }
            });
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            PENDING.with(|pending| {
                if let Some(pending) = pending.borrow_mut().as_mut() {
                    pending.path.pop();
                }
            });
        }
    }
    PENDING.with(|pending| {
        *pending.borrow_mut() = Some(Pending {
            edit: Box::new(f),
            path: Vec::new(),
        })
    });
    let _installed = Installed;
    model.map(&mut Walk)
}

/// Names of the attached adapters, sorted.
pub fn adapter_names<M: Module>(model: &M) -> Vec<String> {
    #[derive(Default)]
    struct Names {
        path: Vec<String>,
        names: BTreeSet<String>,
    }
    impl ModuleVisitor for Names {
        fn enter_module(&mut self, name: &str, container: &str) {
            if container == "Struct:Lora" {
                self.names.insert(name.into());
            }
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {}
    }
    let mut names = Names::default();
    model.visit(&mut names);
    names.names.into_iter().collect()
}

/// Parameters that an active adapter has replaced by its own, and the adapter's name.
pub(crate) fn active_replacements<M: Module>(model: &M) -> BTreeMap<String, String> {
    replacements(model, |adapter| adapter.active)
        .into_iter()
        .filter_map(|(path, names)| Some((path, names.into_iter().next()?)))
        .collect()
}

/// Parameters that adapters have in full, with the names of those that `counts`.
fn replacements<M: Module>(
    model: &M,
    counts: impl Fn(&Adapter) -> bool + 'static,
) -> BTreeMap<String, Vec<String>> {
    let found = std::rc::Rc::new(RefCell::new(BTreeMap::new()));
    let sink = found.clone();
    let _ = edit(model.clone(), move |path, lora| {
        let whole = lora.adapters.iter().filter(|a| a.is_whole() && counts(a));
        let names: Vec<String> = whole.map(|adapter| adapter.name.clone()).collect();
        sink.borrow_mut().insert(path.to_string(), names);
        lora
    });
    found.take()
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
    let weights: BTreeMap<String, f64> = weights
        .iter()
        .map(|(name, weight)| (name.to_string(), *weight))
        .collect();
    let wanted = weights.clone();
    let replaced = replacements(&model, move |adapter| wanted.contains_key(&adapter.name));
    if let Some((path, names)) = replaced.iter().find(|(_, names)| names.len() > 1) {
        return Err(LoraError::Config(format!(
            "adapters {} all train `{path}` in full; activate one of them",
            names.join(", ")
        )));
    }
    Ok(edit(model, move |_, lora| {
        lora.each(|mut adapter| {
            let weight = weights.get(&adapter.name);
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
    let name = name.to_string();
    Ok(edit(model, move |_, mut lora| {
        lora.adapters.retain(|adapter| adapter.name != name);
        lora
    }))
}

/// Removes every adapter without merging: the base model again, bit for bit.
pub fn detach<M: Module>(model: M) -> M {
    edit(model, |_, mut lora| {
        lora.adapters.clear();
        lora
    })
    .materialize()
}
