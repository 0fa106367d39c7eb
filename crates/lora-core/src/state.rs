//! The state of adapters alone: collect it from a model, count it.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleVisitor, Param, Reparameterization};
use burn::tensor::Tensor;

use crate::adapter::Lora;
use crate::files::host::HostTensor;
use crate::kinds::parts::WHOLE;

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
    let mut walk = Walk::new(|_: &str, shape: &[usize], trainable: bool| {
        let n = shape.iter().product::<usize>();
        (n, if trainable { n } else { 0 })
    });
    model.visit(&mut walk);
    let (total, trainable) = walk
        .out
        .iter()
        .fold((0, 0), |sum, n| (sum.0 + n.0, sum.1 + n.1));
    ParameterCount {
        total,
        trainable,
        adapted_layers: walk.adapted.len(),
    }
}

/// Path and shape of every trainable parameter.
pub fn trainable_parameters<M: Module>(model: &M) -> BTreeMap<String, Vec<usize>> {
    let mut walk = Walk::new(|path: &str, shape: &[usize], trainable: bool| {
        trainable.then(|| (path.to_string(), shape.to_vec()))
    });
    model.visit(&mut walk);
    walk.out.into_iter().flatten().collect()
}

struct Walk<F, T> {
    path: Vec<String>,
    adapted: BTreeSet<String>,
    f: F,
    out: Vec<T>,
}

impl<F, T> Walk<F, T> {
    fn new(f: F) -> Self {
        Self {
            path: Vec::new(),
            adapted: BTreeSet::new(),
            f,
            out: Vec::new(),
        }
    }
}

impl<T, F: FnMut(&str, &[usize], bool) -> T> ModuleVisitor for Walk<F, T> {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == "Struct:Adapter"
            && name != WHOLE.name
            && let [parameter @ .., _, _] = self.path.as_slice()
        {
            self.adapted.insert(parameter.join("."));
        }
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let shape = param.lazy_shape();
        self.out.push((self.f)(
            &self.path.join("."),
            shape.as_slice(),
            param.is_initialized() && param.is_require_grad(),
        ));
    }
}

/// Every parameter of every adapter by path (`to_q.weight.lora.default.lora_A`), as f32 on the host.
pub fn adapter_state<M: Module>(model: &M) -> BTreeMap<String, HostTensor> {
    let mut state = BTreeMap::new();
    let is_adapter = |path: &str| path.split('.').any(|part| part == Lora::NAME);
    each_parameter(model, is_adapter, |path, values| {
        state.insert(path, values);
    });
    state
}

/// Calls `f` with the path and the values of every wanted parameter, without what its adapters do to it; one is on the host at
/// a time.
pub(crate) fn each_parameter<M: Module>(
    model: &M,
    wanted: impl Fn(&str) -> bool,
    f: impl FnMut(String, HostTensor),
) {
    struct Each<W, F> {
        path: Vec<String>,
        wanted: W,
        f: F,
    }
    impl<W: Fn(&str) -> bool, F: FnMut(String, HostTensor)> ModuleVisitor for Each<W, F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.path.join(".");
            if (self.wanted)(&path) {
                (self.f)(path, host(param.base()));
            }
        }
    }
    model.visit(&mut Each {
        path: Vec::new(),
        wanted,
        f,
    });
}

/// A tensor's values as f32 on the host.
pub fn host<const D: usize>(tensor: Tensor<D>) -> HostTensor {
    let shape = tensor.dims();
    let values = tensor
        .into_data()
        .convert::<f32>()
        .try_into_vec::<f32>()
        .expect("converted to f32");
    HostTensor::from_f32(shape.to_vec(), &values)
}
