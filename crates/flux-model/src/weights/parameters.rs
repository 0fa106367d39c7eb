//! The parameters of a network as its checkpoint has them: their names and shapes, their values, changes of them.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::frozen::{held, release};

use super::Layout;
use super::storage::Held;
use super::walk::Walk;

/// Name and shape of every tensor a checkpoint of `module` must hold; allocates no weight.
pub fn checkpoint_tensors<M: Module>(module: &M, layout: Layout) -> BTreeMap<String, Vec<usize>> {
    struct Expect {
        layout: Layout,
        walk: Walk,
        tensors: BTreeMap<String, Vec<usize>>,
    }
    impl ModuleVisitor for Expect {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let mut shape = self.walk.stored_shape(param.lazy_shape().as_slice());
            let Some(location) = self.layout.locate(&self.walk.key()) else {
                return;
            };
            if location.pointwise {
                shape.extend([1, 1]);
            }
            let fused = self.tensors.entry(location.key).or_insert_with(|| {
                let mut empty = shape.clone();
                empty[0] = 0;
                empty
            });
            fused[0] += shape[0];
        }
    }
    let mut expect = Expect {
        layout,
        walk: Walk::default(),
        tensors: BTreeMap::new(),
    };
    module.visit(&mut expect);
    expect.tensors
}

/// Values of the parameters whose diffusers key `wanted` picks, in the checkpoint's shape.
pub fn tensors_of<M: Module>(
    module: &M,
    wanted: impl Fn(&str) -> bool,
) -> BTreeMap<String, HostTensor> {
    struct Collect<F> {
        wanted: F,
        walk: Walk,
        held: Held,
        tensors: BTreeMap<String, HostTensor>,
    }
    impl<F: Fn(&str) -> bool> ModuleVisitor for Collect<F> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let key = self.walk.key();
            if !(self.wanted)(&key) {
                return;
            }
            if let Some(held) = self.held.get(&self.walk.path.join(".")) {
                let tensor = HostTensor::from_f32(held.shape(), &held.to_f32());
                self.tensors.insert(key, tensor);
            } else {
                let tensor = lora_core::state::host_tensor(param.val());
                let tensor = if self.walk.is_transposed(D) {
                    tensor.transposed()
                } else {
                    tensor
                };
                self.tensors.insert(key, tensor);
            }
        }
    }
    let mut collect = Collect {
        wanted,
        walk: Walk::default(),
        held: held(module),
        tensors: BTreeMap::new(),
    };
    module.visit(&mut collect);
    collect.tensors
}

/// Adds `strength * values` to parameters by their diffusers key, or replaces them where the flag says so; values are in the
/// checkpoint's shape. Also returns the keys that name no parameter of that shape. A weight in few bits becomes f32 by it.
pub fn change_parameters<M: Module>(
    module: M,
    changes: BTreeMap<String, (bool, HostTensor)>,
    strength: f64,
) -> (M, Vec<String>) {
    struct Edit {
        walk: Walk,
        changes: BTreeMap<String, (bool, HostTensor)>,
        strength: f64,
    }
    impl ModuleMapper for Edit {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.exit();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let key = self.walk.key();
            let shape = param.lazy_shape().to_vec();
            let stored = self.walk.stored_shape(&shape);
            if self
                .changes
                .get(&key)
                .is_none_or(|(_, values)| values.shape != stored)
            {
                return param;
            }
            let Some((replace, values)) = self.changes.remove(&key) else {
                return param;
            };
            let values = if self.walk.is_transposed(D) {
                values.transposed()
            } else {
                values
            };
            let base = param.base().cast(DType::F32); // a change is not rounded to what the weight was kept as
            let values =
                Tensor::<D>::from_data(TensorData::new(values.to_f32(), shape), &base.device());
            let changed = if replace {
                values
            } else {
                base + values.mul_scalar(self.strength)
            };
            Param::initialized(param.id, changed.detach().set_require_grad(false))
        }
    }
    let module = release(module, |path| changes.contains_key(path));
    let mut edit = Edit {
        walk: Walk::default(),
        changes,
        strength,
    };
    let module = module.map(&mut edit);
    (module, edit.changes.into_keys().collect())
}
