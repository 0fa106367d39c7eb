//! Optimizer state by parameter path, around Burn's per-tensor optimizers.
//!
//! Burn's `ModuleOptimizer` keys its state by `ParamId`, random in every process, and skips what it cannot match without a
//! word. Here every trainable parameter must find its state, and every stored state its parameter, or loading fails.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{DynOptimizer, DynState, Optimizer, StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};
use burn_pack::Scalar;
use serde::{Deserialize, Serialize};

use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::files::safetensors::TensorFile;
use crate::training::gradients::Gradients;

/// A per-tensor optimizer of Burn (`AdamWConfig::build()`) and its state for every parameter.
#[derive(Clone)]
pub struct PathOptimizer<O: Optimizer> {
    optimizer: O,
    state: BTreeMap<String, DynState>,
}

impl<O: Optimizer> std::fmt::Debug for PathOptimizer<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PathOptimizer")
            .field("parameters", &self.state.len())
            .finish_non_exhaustive()
    }
}

/// Optimizer state outside the program: tensors by name, and the scalars (such as the step count) beside them.
#[derive(Debug, Clone, Default)]
pub struct OptimizerState {
    /// `<parameter path>.<state name>` to values, f32.
    pub tensors: BTreeMap<String, HostTensor>,
    /// The rest.
    pub scalars: OptimizerScalars,
}

/// The part of [`OptimizerState`] that is not tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerScalars {
    /// Parameter path to number of dimensions.
    ranks: BTreeMap<String, usize>,
    /// `<parameter path>.<state name>` to value.
    values: BTreeMap<String, serde_json::Value>,
}

impl OptimizerState {
    /// The state from a safetensors file's bytes and the scalars kept beside it.
    ///
    /// # Errors
    /// A malformed file.
    pub fn from_bytes(
        name: &std::path::Path,
        bytes: Vec<u8>,
        scalars: OptimizerScalars,
    ) -> Result<Self, LoraError> {
        let file = TensorFile::from_bytes(name, bytes)?;
        let tensors = file
            .names()
            .map(|key| Ok((key.to_string(), file.read(key)?)))
            .collect::<Result<_, LoraError>>()?;
        Ok(Self { tensors, scalars })
    }

    /// The tensors as a safetensors file.
    pub fn to_bytes(&self) -> Vec<u8> {
        crate::files::safetensors::serialize(
            &self.tensors,
            &BTreeMap::from([("format".into(), "pt".into())]),
        )
    }
}

impl<O: Optimizer> PathOptimizer<O> {
    /// An optimizer that has made no step.
    pub fn new(optimizer: O) -> Self {
        Self {
            optimizer,
            state: BTreeMap::new(),
        }
    }

    /// One step of every trainable parameter of `model`.
    ///
    /// # Errors
    /// A trainable parameter without gradient, or a gradient without parameter.
    pub fn step<M: Module>(
        &mut self,
        learning_rate: f64,
        model: M,
        gradients: Gradients,
    ) -> Result<M, LoraError> {
        let mut walk = Walk {
            owner: self,
            gradients,
            learning_rate,
            path: Vec::new(),
            missing: None,
        };
        let model = model.map(&mut walk);
        match (walk.missing, walk.gradients.leftover()) {
            (None, None) => Ok(model),
            (Some(path), _) => Err(LoraError::Gradients(format!("`{path}` has no gradient"))),
            (None, Some(path)) => Err(LoraError::Gradients(format!(
                "the gradient of `{path}` has no parameter"
            ))),
        }
    }

    /// A copy of the state on the host.
    pub fn state(&self) -> OptimizerState {
        let mut sink = StateSink::default();
        let mut scalars = OptimizerScalars::default();
        for (path, state) in &self.state {
            scalars.ranks.insert(path.clone(), state.rank());
            self.optimizer.state_flatten(path, state, &mut sink);
        }
        for (name, value) in sink.scalars {
            let value = match value {
                Scalar::Int(v) => v.into(),
                Scalar::UInt(v) => v.into(),
                Scalar::Float(v) => v.into(),
                Scalar::Bool(v) => v.into(),
            };
            scalars.values.insert(name, value);
        }
        let tensors = sink
            .tensors
            .into_iter()
            .map(|(name, data)| {
                let shape = data.shape().to_vec();
                let values = data
                    .convert::<f32>()
                    .try_into_vec::<f32>()
                    .expect("converted to f32");
                (name, HostTensor::from_f32(shape, &values))
            })
            .collect();
        OptimizerState { tensors, scalars }
    }

    /// An optimizer that continues from `state` for the parameters `trainable` (path to shape).
    ///
    /// # Errors
    /// A parameter without state, a state without parameter, a moment that is missing, left over, not finite or of
    /// another shape than its parameter.
    pub fn restore(
        optimizer: O,
        state: OptimizerState,
        trainable: &BTreeMap<String, Vec<usize>>,
        device: &Device,
    ) -> Result<Self, LoraError> {
        let fail = |text: String| Err(LoraError::Optimizer(text));
        let OptimizerState { tensors, scalars } = state;
        if let Some(path) = trainable
            .keys()
            .find(|path| !scalars.ranks.contains_key(*path))
        {
            return fail(format!("`{path}` has no stored state"));
        }
        if let Some(path) = scalars
            .ranks
            .keys()
            .find(|path| !trainable.contains_key(*path))
        {
            return fail(format!("the state of `{path}` has no parameter"));
        }
        if let Some((path, _)) = trainable
            .iter()
            .find(|(path, shape)| scalars.ranks[*path] != shape.len())
        {
            return fail(format!(
                "the state of `{path}` has another number of dimensions"
            ));
        }
        let mut values = BTreeMap::new();
        for (name, value) in scalars.values {
            let scalar = match &value {
                serde_json::Value::Bool(v) => Scalar::Bool(*v),
                serde_json::Value::Number(v) => match (v.as_u64(), v.as_i64(), v.as_f64()) {
                    (Some(v), _, _) => Scalar::UInt(v),
                    (_, Some(v), _) => Scalar::Int(v),
                    (_, _, Some(v)) => Scalar::Float(v),
                    _ => return fail(format!("`{name}` is not a number")),
                },
                _ => return fail(format!("`{name}` is not a number")),
            };
            values.insert(name, scalar);
        }
        let mut source = StateSource::new(values);
        let mut unclaimed: BTreeSet<String> = tensors.keys().cloned().collect();
        for (name, tensor) in &tensors {
            let owner = trainable.iter().find(|(path, _)| {
                name.strip_prefix(path.as_str())
                    .is_some_and(|rest| rest.starts_with('.'))
            });
            let Some((path, shape)) = owner else {
                return fail(format!("`{name}` belongs to no parameter"));
            };
            if tensor.shape != *shape {
                return fail(format!(
                    "`{name}` has shape {:?}, `{path}` has {shape:?}",
                    tensor.shape
                ));
            }
            if let Some(index) = tensor.first_non_finite() {
                return Err(LoraError::NotFinite {
                    key: name.clone(),
                    index,
                });
            }
        }
        for (name, tensor) in tensors {
            source.insert_tensor(name, TensorData::new(tensor.to_f32(), tensor.shape));
        }
        let mut restored = Self::new(optimizer);
        for (path, shape) in trainable {
            let state = restored
                .optimizer
                .state_unflatten(shape.len(), path, &mut source, device);
            let Some(state) = state else {
                return fail(format!("the stored state of `{path}` is incomplete"));
            };
            // What was used is what flattening gives back; the rest of the file must be empty.
            let mut used = StateSink::default();
            restored.optimizer.state_flatten(path, &state, &mut used);
            for (name, _) in used.tensors {
                unclaimed.remove(&name);
            }
            restored.state.insert(path.clone(), state);
        }
        match unclaimed.first() {
            Some(name) => fail(format!("`{name}` is not part of this optimizer's state")),
            None => Ok(restored),
        }
    }
}

struct Walk<'a, O: Optimizer> {
    owner: &'a mut PathOptimizer<O>,
    gradients: Gradients,
    learning_rate: f64,
    path: Vec<String>,
    missing: Option<String>,
}

impl<O: Optimizer> ModuleMapper for Walk<'_, O> {
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
        let Some(gradient) = self.gradients.remove(&path) else {
            self.missing.get_or_insert(path);
            return param;
        };
        let gradient = gradient.reshape(param.shape());
        let state = self
            .owner
            .state
            .remove(&path)
            .map(|state| state.downcast::<O::State<D>>());
        let mut next = None;
        let param = param.map(|tensor| {
            let (tensor, state) =
                self.owner
                    .optimizer
                    .step(self.learning_rate, tensor.inner(), gradient, state);
            next = state;
            Tensor::from_inner(tensor).require_grad()
        });
        if let Some(state) = next {
            self.owner.state.insert(path, DynState::create(state, D));
        }
        param
    }
}
