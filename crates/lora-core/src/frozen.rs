//! Frozen weights that stay in few bits, inside any model.
//!
//! Burn has no parameter of such a kind, so a [`Quantised`] weight sits on the parameter it stands for, with the adapters, and
//! the parameter is left with a *placeholder*: of the weight's shape, without memory of its own, and not a number, so that
//! nothing can be computed with it unnoticed. [`linear`](crate::linear) takes the weight as it is, `Param::val()` decodes it
//! as a whole; adapters, counts, states and walks see what they would see on a dense weight.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param, Reparameterizer};
use burn::tensor::{Device, Tensor};

pub use crate::adapters::held;
use crate::adapters::{Adapters, edit};
use crate::error::LoraError;
use crate::files::quantised::Quantised;
use crate::ops::linear::Weight;
use crate::walk::walk;

/// In place of a parameter of `shape`.
pub fn placeholder<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::<D>::full([1; D], f32::NAN, device).expand(shape)
}

/// Puts weights in few bits, `[out, in]`, in the places of the weights `[in, out]` of linear layers, by the paths of these.
///
/// # Errors
/// A path that is no matrix of the model, or of another size, or that carries another library's reparameterization.
pub fn hold<M: Module>(
    model: M,
    mut weights: BTreeMap<String, Arc<Quantised>>,
) -> Result<M, LoraError> {
    if weights.is_empty() {
        return Ok(model);
    }
    let mut sizes = BTreeMap::new();
    walk(&model, |found| {
        let mut size = found.param().lazy_shape();
        size.reverse();
        sizes.insert(found.path(), size);
    });
    let misfit = |(path, weight): (&String, &Arc<Quantised>)| {
        let size = sizes.get(path).filter(|size| size.len() == 2);
        (size.map(Vec::as_slice) != Some(weight.shape())).then(|| path.clone())
    };
    if let Some(path) = weights.iter().find_map(misfit) {
        return Err(refusal(&path));
    }
    let mut held = BTreeMap::new();
    let model = edit(model, |path, mut adapters| {
        if let Some(weight) = weights.remove(path) {
            adapters.frozen = Some(weight.clone());
            held.insert(path.to_string(), weight);
        }
        adapters
    });
    let mut hold = Hold { weights, held };
    let model = model.apply_reparameterization(&mut hold);
    if let Some(path) = hold.weights.into_keys().next() {
        return Err(refusal(&path));
    }
    let mut emptied = Replace {
        path: Vec::new(),
        with: |path: &str, shape: [usize; 2], device: &Device| {
            hold.held
                .contains_key(path)
                .then(|| placeholder(shape, device))
        },
    };
    Ok(model.map(&mut emptied))
}

fn refusal(path: &str) -> LoraError {
    LoraError::Config(format!(
        "`{path}` cannot be held in few bits: the model has no matrix of this size there, or one that carries another library's reparameterization"
    ))
}

/// Decodes the weights whose path `wanted` picks: they are dense f32 from then on, and can be changed.
pub fn release<M: Module>(model: M, wanted: impl Fn(&str) -> bool) -> M {
    let mut released = BTreeMap::new();
    let model = edit(model, |path, mut adapters| {
        if wanted(path)
            && let Some(weight) = adapters.frozen.take()
        {
            released.insert(path.to_string(), weight);
        }
        adapters
    });
    model.map(&mut Replace {
        path: Vec::new(),
        with: |path: &str, _: [usize; 2], device: &Device| {
            let weight = released.get(path)?;
            Some(Weight::from(weight.clone()).dense(device))
        },
    })
}

/// Attaches to parameters that carry nothing yet.
struct Hold {
    weights: BTreeMap<String, Arc<Quantised>>,
    held: BTreeMap<String, Arc<Quantised>>,
}

impl Reparameterizer for &mut Hold {
    type Reparam = Adapters;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Adapters>) {
        let Some(weight) = self.weights.remove(path) else {
            return (param, None);
        };
        self.held.insert(path.into(), weight.clone());
        let adapters = Adapters {
            frozen: Some(weight),
            adapters: Vec::new(),
        };
        (param, Some(adapters))
    }
}

/// Puts other matrices in the places of some; they need no gradients.
struct Replace<F> {
    path: Vec<String>,
    with: F,
}

impl<F: FnMut(&str, [usize; 2], &Device) -> Option<Tensor<2>>> ModuleMapper for Replace<F> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let &[rows, columns] = param.lazy_shape().as_slice() else {
            return param;
        };
        let device = param.lazy_device();
        match (self.with)(&self.path.join("."), [rows, columns], &device) {
            // D is 2; a reshape would copy a placeholder into the memory that it saves.
            Some(value) => Param::initialized(param.id, Tensor::from_bridge(value.into_bridge())),
            None => param,
        }
    }
}
