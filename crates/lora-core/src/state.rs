//! The state of adapters alone: collect it from a model, count it.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};

use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::parts::WHOLE;
use crate::walk::walk;

/// Parameters of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParameterCount {
    /// All, adapters included.
    pub total: usize,
    /// Those that require gradients.
    pub trainable: usize,
    /// Layers that carry an adapter.
    pub adapted_layers: usize,
}

/// Counts parameters without initialising lazy ones.
pub fn count_parameters<M: Module>(model: &M) -> ParameterCount {
    let (mut count, mut adapted) = (ParameterCount::default(), BTreeSet::new());
    walk(model, |found| {
        let n: usize = found.param().lazy_shape().iter().product();
        count.total += n;
        if found.param().is_trainable() {
            count.trainable += n;
        }
        if let Some((parameter, _, part)) = found.factor()
            && part != WHOLE.name
        {
            adapted.insert(parameter);
        }
    });
    count.adapted_layers = adapted.len();
    count
}

/// Path and shape of every trainable parameter.
pub fn trainable_parameters<M: Module>(model: &M) -> BTreeMap<String, Vec<usize>> {
    let mut trainable = BTreeMap::new();
    walk(model, |found| {
        if found.param().is_trainable() {
            trainable.insert(found.path(), found.param().lazy_shape());
        }
    });
    trainable
}

/// Every parameter of every adapter by path (`to_q.weight.adapter.default.lora_A`), as f32 on the host.
pub fn adapter_state<M: Module>(model: &M) -> BTreeMap<String, HostTensor> {
    let mut state = BTreeMap::new();
    walk(model, |found| {
        if found.factor().is_some() {
            let (values, shape) = found.values();
            state.insert(
                found.path(),
                HostTensor {
                    shape,
                    ..host_tensor(values)
                },
            );
        }
    });
    state
}

/// Checks every trainable parameter for NaN and infinity, in one transfer from its device.
///
/// # Errors
/// The first such parameter, by path.
pub fn check_finite<M: Module>(model: &M) -> Result<(), LoraError> {
    let mut tensors = BTreeMap::new();
    walk(model, |found| {
        if found.param().is_trainable() {
            tensors.insert(found.path(), found.values().0.inner());
        }
    });
    for (key, values) in gathered(tensors) {
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            return Err(LoraError::NotFinite { key, index });
        }
    }
    Ok(())
}

/// `model` with the values that `f` gives for the path and the values of a trainable parameter, row by row and without autodiff.
pub(crate) fn with_values<M: Module>(
    model: &M,
    f: impl FnMut(&str, Tensor<1>) -> Option<Tensor<1>>,
) -> M {
    struct Values<F> {
        path: Vec<String>,
        f: F,
    }
    impl<F: FnMut(&str, Tensor<1>) -> Option<Tensor<1>>> ModuleMapper for Values<F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !param.is_initialized() || !param.is_require_grad() {
                return param;
            }
            let path = self.path.join(".");
            param.map(|tensor| {
                let shape = tensor.shape();
                let flat = tensor.clone().inner().reshape([shape.num_elements()]);
                match (self.f)(&path, flat) {
                    None => tensor,
                    Some(values) => Tensor::from_inner(values.reshape(shape)).require_grad(),
                }
            })
        }
    }
    model.clone().map(&mut Values {
        path: Vec::new(),
        f,
    })
}

/// `copy` with what is trained of `model`, a model of the same parameters, on its own device and as leaves of its own.
pub fn with_trained_of<M: Module>(copy: &M, model: &M) -> M {
    let mut trained = BTreeMap::new();
    walk(model, |found| {
        if found.param().is_trainable() {
            trained.insert(found.path(), found.param().values().0.inner());
        }
    });
    with_values(copy, |path, own| {
        Some(trained.remove(path)?.to_device(&own.device()))
    })
}

/// The values of many tensors, in their order, with one transfer from each device.
pub(crate) fn gathered<K: Ord>(
    tensors: impl IntoIterator<Item = (K, Tensor<1>)>,
) -> BTreeMap<K, Vec<f32>> {
    let mut by_device: Vec<Vec<(K, Tensor<1>)>> = Vec::new();
    for (key, tensor) in tensors {
        let device = tensor.device();
        let mut others = by_device.iter_mut();
        match others.find(|others| others[0].1.device() == device) {
            Some(others) => others.push((key, tensor)),
            None => by_device.push(vec![(key, tensor)]),
        }
    }
    let mut values = BTreeMap::new();
    for tensors in by_device {
        let f32s = tensors.iter().map(|(_, t)| t.clone().cast(DType::F32));
        let all = host_tensor(Tensor::cat(f32s.collect(), 0)).to_f32();
        let mut rest = all.as_slice();
        for (key, tensor) in tensors {
            let (own, others) = rest.split_at(tensor.dims()[0]);
            values.insert(key, own.to_vec());
            rest = others;
        }
    }
    values
}

/// Calls `f` with the path and the values of every wanted parameter, without what its adapters do to it; one is on the host at
/// a time.
pub(crate) fn each_parameter<M: Module>(
    model: &M,
    wanted: impl Fn(&str) -> bool,
    mut f: impl FnMut(String, HostTensor),
) {
    walk(model, |found| {
        let path = found.path();
        if wanted(&path) {
            let (values, shape) = found.values();
            f(
                path,
                HostTensor {
                    shape,
                    ..host_tensor(values)
                },
            );
        }
    });
}

/// A tensor's values as f32 on the host.
pub fn host_tensor<const D: usize>(tensor: Tensor<D>) -> HostTensor {
    let shape = tensor.dims();
    let values = tensor
        .into_data()
        .convert::<f32>()
        .try_into_vec::<f32>()
        .expect("converted to f32");
    HostTensor::from_f32(shape.to_vec(), &values)
}
