//! One walk over the parameters of a model, by path.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Gradients as BurnGradients, Tensor};

use crate::adapters::{ADAPTER, Adapters, held};
use crate::files::quantised::Quantised;
use crate::ops::linear::Weight;
use burn::module::Reparameterization;

/// What Burn calls the container of everything that sits on a parameter.
const REPARAMETERIZATION: &str = "Reparameterization";

/// A parameter, and where the walk found it.
pub(crate) struct Found<'a> {
    names: &'a [String],
    containers: &'a [String],
    param: &'a dyn AnyParam,
    frozen: &'a BTreeMap<String, Arc<Quantised>>,
}

/// A float parameter of whatever rank.
pub(crate) trait AnyParam {
    /// Its shape, as far as it is known without making a lazy parameter.
    fn lazy_shape(&self) -> Vec<usize>;
    fn is_trainable(&self) -> bool;
    fn device(&self) -> Device;
    /// Where it has one yet; else it will be the device's default.
    fn dtype(&self) -> Option<DType>;
    /// The stored values, row by row, with their shape; makes a lazy parameter.
    fn values(&self) -> (Tensor<1>, Vec<usize>);
    /// Moves its gradient out, row by row.
    fn take_gradient(&self, from: &mut BurnGradients) -> Option<Tensor<1>>;
}

impl<const D: usize> AnyParam for Param<Tensor<D>> {
    fn lazy_shape(&self) -> Vec<usize> {
        Param::lazy_shape(self).to_vec()
    }

    fn is_trainable(&self) -> bool {
        self.is_initialized() && self.is_require_grad()
    }

    fn device(&self) -> Device {
        self.lazy_device()
    }

    fn dtype(&self) -> Option<DType> {
        self.is_initialized().then(|| self.base().dtype())
    }

    fn values(&self) -> (Tensor<1>, Vec<usize>) {
        let base = self.base();
        let shape = base.dims();
        (
            base.reshape([shape.iter().product::<usize>()]),
            shape.to_vec(),
        )
    }

    fn take_gradient(&self, from: &mut BurnGradients) -> Option<Tensor<1>> {
        let gradient = self.grad_remove(from)?;
        let n = gradient.shape().num_elements();
        Some(gradient.reshape([n]))
    }
}

impl Found<'_> {
    /// Its path: `to_q.weight`, of a factor `to_q.weight.adapter.default.lora_A`.
    pub(crate) fn path(&self) -> String {
        self.names.join(".")
    }

    /// The names on the way to it.
    pub(crate) fn names(&self) -> &[String] {
        self.names
    }

    /// The type of the module that it is a field of, as Burn spells it: `Struct:Linear`.
    pub(crate) fn owner(&self) -> &str {
        self.containers.last().map_or("", String::as_str)
    }

    pub(crate) fn param(&self) -> &dyn AnyParam {
        self.param
    }

    /// The stored values, row by row, with their shape; makes a lazy parameter, decodes one that is in few bits.
    pub(crate) fn values(&self) -> (Tensor<1>, Vec<usize>) {
        match self.frozen.get(&self.path()) {
            None => self.param.values(),
            Some(frozen) => {
                let values = Weight::from(frozen.clone()).dense(&self.param.device());
                let shape = values.dims();
                (values.reshape([shape[0] * shape[1]]), shape.to_vec())
            }
        }
    }

    /// Of what sits on a parameter: that parameter's path, and what Burn calls the thing.
    pub(crate) fn sits_on(&self) -> Option<(String, &str)> {
        let at = (self.containers.iter()).position(|container| container == REPARAMETERIZATION)?;
        Some((self.names[..at].join("."), &self.names[at]))
    }

    /// Of a factor of ours: the path of the parameter it sits on, the adapter's name, the part's name.
    ///
    /// No module of anybody else can be taken for one: its container would have to be called [`ADAPTER`], which is no name of
    /// a type.
    pub(crate) fn factor(&self) -> Option<(String, &str, &str)> {
        let (parameter, name) = self.sits_on()?;
        let at = self
            .containers
            .iter()
            .position(|container| container == ADAPTER)?;
        let (adapter, part) = (self.names.get(at)?, self.names.get(at + 1)?);
        (name == Adapters::NAME).then_some((parameter, adapter, part))
    }
}

/// Calls `f` for every float parameter of `model` and of what sits on its parameters; nothing lazy is made.
pub(crate) fn walk<M: Module>(model: &M, f: impl FnMut(&Found<'_>)) {
    struct Walk<F> {
        names: Vec<String>,
        containers: Vec<String>,
        frozen: BTreeMap<String, Arc<Quantised>>,
        f: F,
    }
    impl<F: FnMut(&Found<'_>)> ModuleVisitor for Walk<F> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.names.push(name.into());
            self.containers.push(container.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.names.pop();
            self.containers.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            (self.f)(&Found {
                names: &self.names,
                containers: &self.containers,
                param,
                frozen: &self.frozen,
            });
        }
    }
    model.visit(&mut Walk {
        names: Vec::new(),
        containers: Vec::new(),
        frozen: held(model),
        f,
    });
}
