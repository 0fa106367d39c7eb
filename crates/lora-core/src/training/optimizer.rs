//! Optimizer state by parameter path, around Burn's per-tensor optimizers and ours.
//!
//! Burn's `ModuleOptimizer` keys its state by `ParamId`, random in every process, and skips what it cannot match without a
//! word. Here every trainable parameter must find its state, and every stored state its parameter, or loading fails.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{DynState, StateSink, StateSource};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_pack::Scalar;
use serde::{Deserialize, Serialize};

use crate::error::LoraError;
use crate::files::host::{Dtype, HostTensor};
use crate::files::safetensors::{TensorFile, serialize, write_tensors};
use crate::state::{gathered, trainable_parameters, with_values};
use crate::training::gradients::Gradients;
use crate::training::optimizers::{Kind, UpdateRule};
use crate::walk::walk;

/// A per-tensor optimizer of Burn (`AdamWConfig::build()`), or one of [`OptimizerConfig`](crate::training::optimizers::OptimizerConfig), and its
/// state for every parameter.
#[derive(Clone)]
pub struct PathOptimizer {
    rule: UpdateRule,
    state: BTreeMap<String, DynState>,
    /// Factors on the learning rate, of parameters that have another than 1.
    rate_factors: BTreeMap<String, f64>,
}

impl std::fmt::Debug for PathOptimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PathOptimizer")
            .field("parameters", &self.state.len())
            .finish_non_exhaustive()
    }
}

/// Optimizer state outside the program: tensors by name, and the scalars (such as the step count) beside them.
#[derive(Debug, Clone, Default)]
pub struct OptimizerState {
    /// `<parameter path>.<state name>` to values: f32, or codes of 8 bits.
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
    /// `<parameter path>.<state name>` to value; without a path what all parameters share.
    values: BTreeMap<String, serde_json::Value>,
}

fn format_pt() -> BTreeMap<String, String> {
    BTreeMap::from([("format".into(), "pt".into())])
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
        Self::from_file(&TensorFile::from_bytes(name, bytes)?, scalars)
    }

    /// The same of an opened file.
    ///
    /// # Errors
    /// Tensors that can no longer be read.
    pub fn from_file(file: &TensorFile, scalars: OptimizerScalars) -> Result<Self, LoraError> {
        let tensors = file
            .names()
            .map(|key| Ok((key.to_string(), file.read(key)?)))
            .collect::<Result<_, LoraError>>()?;
        Ok(Self { tensors, scalars })
    }

    /// The tensors as a safetensors file.
    pub fn to_bytes(&self) -> Vec<u8> {
        serialize(&self.tensors, &format_pt())
    }

    /// Writes what [`to_bytes`](Self::to_bytes) gives, without a copy of the tensors.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        write_tensors(out, &self.tensors, &format_pt())
    }
}

impl PathOptimizer {
    /// An optimizer that has made no step.
    pub fn new(rule: impl Into<UpdateRule>) -> Self {
        Self {
            rule: rule.into(),
            state: BTreeMap::new(),
            rate_factors: BTreeMap::new(),
        }
    }

    /// Multiplies the learning rate of these parameters, by path, from now on; they are no part of the state.
    ///
    /// Prodigy has one rate for all parameters, and takes no notice.
    pub fn set_rate_factors(&mut self, factors: BTreeMap<String, f64>) {
        self.rate_factors = factors;
    }

    /// One step of every trainable parameter of `model`.
    ///
    /// # Errors
    /// A trainable parameter without gradient, a gradient without parameter or of another size; then nothing has changed.
    pub fn step<M: Module>(
        &mut self,
        learning_rate: f64,
        model: &mut M,
        gradients: Gradients,
    ) -> Result<(), LoraError> {
        let trainable = trainable_parameters(model);
        let fail = |problem: String| Err(LoraError::Gradients(problem));
        if let Some((path, _)) = gradients
            .iter()
            .find(|(path, _)| !trainable.contains_key(*path))
        {
            return fail(format!("the gradient of `{path}` has no parameter"));
        }
        for (path, shape) in &trainable {
            let Some(gradient) = gradients.get(path) else {
                return fail(format!("`{path}` has no gradient"));
            };
            let (found, expected) = (gradient.dims()[0], shape.iter().product::<usize>());
            if found != expected {
                return fail(format!(
                    "the gradient of `{path}` has {found} elements, not {expected}"
                ));
            }
        }
        if let Kind::Prodigy(prodigy) = &mut self.rule.0 {
            let mut terms = [Vec::new(), Vec::new()];
            walk(model, |found| {
                if found.param().is_trainable()
                    && let Some(gradient) = gradients.get(&found.path())
                {
                    let tensor = found.values().0.inner();
                    let state = self.state.get(&found.path());
                    let state = state.map(DynState::downcast_ref);
                    let found = prodigy.terms(learning_rate, tensor, gradient.clone(), state);
                    for (terms, term) in terms.iter_mut().zip(found) {
                        terms.push(term);
                    }
                }
            });
            prodigy.adapt(learning_rate, terms.map(sum_on_host));
        }
        let mut walk = Walk {
            owner: self,
            gradients,
            learning_rate,
            path: Vec::new(),
        };
        *model = model.clone().map(&mut walk);
        Ok(())
    }

    /// The step size that Prodigy has found; the learning rate is a factor on it.
    pub fn found_step_size(&self) -> Option<f64> {
        match &self.rule.0 {
            Kind::Prodigy(prodigy) => Some(prodigy.step_size_found()),
            _ => None,
        }
    }

    /// The model with the weights to use, where they are not those that are trained: the average of a schedule-free optimizer.
    pub fn averaged<M: Module>(&self, model: &M) -> Option<M> {
        let Kind::ScheduleFree(rule) = &self.rule.0 else {
            return None;
        };
        Some(with_values(model, |path, y| {
            let state = self.state.get(path)?; // none before the first step
            Some(rule.average(y, state.downcast_ref()))
        }))
    }

    /// A copy of the state on the host.
    pub fn state(&self) -> OptimizerState {
        let mut sink = StateSink::default();
        let mut scalars = OptimizerScalars::default();
        for (path, state) in &self.state {
            scalars.ranks.insert(path.clone(), state.rank());
            self.rule
                .0
                .of_tensors()
                .state_flatten(path, state, &mut sink);
        }
        if let Kind::Prodigy(prodigy) = &self.rule.0 {
            let shared = prodigy.shared().into_iter();
            sink.scalars
                .extend(shared.map(|(name, value)| (name.into(), value)));
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
            .map(|(name, data)| (name, to_host(data)))
            .collect();
        OptimizerState { tensors, scalars }
    }

    /// An optimizer that continues from `state` for the parameters `trainable` (path to shape).
    ///
    /// What the state of a parameter consists of is asked of the optimizer, with a step of zeros: state of any shape will do.
    ///
    /// # Errors
    /// A parameter without state, a state without parameter, a tensor or number of it that is missing, left over, not finite
    /// or of another shape than the optimizer's.
    pub fn restore(
        rule: impl Into<UpdateRule>,
        state: OptimizerState,
        trainable: &BTreeMap<String, Vec<usize>>,
        device: &Device,
    ) -> Result<Self, LoraError> {
        let fail = |text: String| Err(LoraError::Optimizer(text));
        let OptimizerState { tensors, scalars } = state;
        let mut restored = Self::new(rule);
        let mut expected = StateSink::default();
        for (path, shape) in trainable {
            let has_state = restored.describe(path, shape, device, &mut expected)?;
            match (has_state, scalars.ranks.get(path)) {
                (true, None) => return fail(format!("`{path}` has no stored state")),
                (true, Some(rank)) if *rank != shape.len() => {
                    return fail(format!(
                        "the state of `{path}` has another number of dimensions"
                    ));
                }
                (false, Some(_)) => {
                    return fail(format!(
                        "`{path}` has stored state, but this optimizer keeps none"
                    ));
                }
                _ => {}
            }
        }
        let mut stored = scalars.ranks.keys();
        if let Some(path) = stored.find(|path| !trainable.contains_key(*path)) {
            return fail(format!("the state of `{path}` has no parameter"));
        }
        if let Kind::Prodigy(prodigy) = &restored.rule.0 {
            let shared = prodigy.shared().into_iter();
            (expected.scalars).extend(shared.map(|(name, value)| (name.into(), value)));
        }
        let expected_tensors: BTreeMap<String, HostTensor> = (expected.tensors.into_iter())
            .map(|(name, data)| (name, to_host(data)))
            .collect();
        for (name, tensor) in &tensors {
            let Some(HostTensor { shape, dtype, .. }) = expected_tensors.get(name) else {
                let mut paths = trainable.keys();
                let is_owned = paths.any(|path| {
                    let rest = name.strip_prefix(path.as_str());
                    rest.is_some_and(|rest| rest.starts_with('.'))
                });
                return fail(match is_owned {
                    true => format!("`{name}` is not part of this optimizer's state"),
                    false => format!("`{name}` belongs to no parameter"),
                });
            };
            if tensor.shape != *shape {
                return fail(format!(
                    "`{name}` has shape {:?}, not {shape:?}",
                    tensor.shape
                ));
            }
            if tensor.dtype != *dtype {
                return fail(format!("`{name}` is {}, not {dtype}", tensor.dtype));
            }
            if let Some(index) = tensor.first_non_finite() {
                return Err(LoraError::NotFinite {
                    key: name.clone(),
                    index,
                });
            }
        }
        let mut expected_names = expected_tensors.keys();
        if let Some(name) = expected_names.find(|name| !tensors.contains_key(*name)) {
            return fail(format!(
                "the stored state is incomplete: `{name}` is missing"
            ));
        }
        let expected_numbers: BTreeSet<String> =
            expected.scalars.into_iter().map(|(name, _)| name).collect();
        let stored_numbers: BTreeSet<String> = scalars.values.keys().cloned().collect();
        if let Some(name) = expected_numbers.difference(&stored_numbers).next() {
            return fail(format!(
                "the stored state is incomplete: `{name}` is missing"
            ));
        }
        if let Some(name) = stored_numbers.difference(&expected_numbers).next() {
            return fail(format!("`{name}` is not part of this optimizer's state"));
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
        if let Kind::Prodigy(prodigy) = &mut restored.rule.0
            && !prodigy.restore_shared(|name| values.get(name).copied())
        {
            return fail("the step size that all parameters share is no number".into());
        }
        let mut source = StateSource::new(values);
        for (name, tensor) in tensors {
            let data = match tensor.dtype {
                Dtype::U8 => TensorData::new(tensor.bytes, tensor.shape),
                _ => TensorData::new(tensor.to_f32(), tensor.shape),
            };
            source.insert_tensor(name, data);
        }
        for (path, _) in scalars.ranks {
            let rank = trainable[&path].len();
            let rule = restored.rule.0.of_tensors();
            let state = rule.state_unflatten(rank, &path, &mut source, device);
            let Some(state) = state else {
                return fail(format!("the stored state of `{path}` is incomplete"));
            };
            restored.state.insert(path, state);
        }
        Ok(restored)
    }

    /// Adds what the state of a parameter of this shape consists of to `into`; whether it has any.
    fn describe(
        &self,
        path: &str,
        shape: &[usize],
        device: &Device,
        into: &mut StateSink,
    ) -> Result<bool, LoraError> {
        let state = match shape.len() {
            1 => self.first_state::<1>(shape, device),
            2 => self.first_state::<2>(shape, device),
            3 => self.first_state::<3>(shape, device),
            4 => self.first_state::<4>(shape, device),
            5 => self.first_state::<5>(shape, device),
            rank => {
                let problem = format!("`{path}` has {rank} dimensions; 1 to 5 can be restored");
                return Err(LoraError::Optimizer(problem));
            }
        };
        if let Some(state) = &state {
            self.rule.0.of_tensors().state_flatten(path, state, into);
        }
        Ok(state.is_some())
    }

    fn first_state<const D: usize>(&self, shape: &[usize], device: &Device) -> Option<DynState> {
        let zeros = || Tensor::<D>::zeros(shape.to_vec(), device).into_bridge();
        let rule = self.rule.0.of_tensors();
        let (_, state) = rule.step_dyn(D, 0.0, zeros(), zeros(), None);
        state
    }
}

/// A tensor of a state: codes of 8 bits, everything else f32.
fn to_host(data: TensorData) -> HostTensor {
    let shape = data.shape().to_vec();
    if data.dtype() == DType::U8 {
        let bytes = data.try_into_vec().expect("checked above");
        let dtype = Dtype::U8;
        return HostTensor {
            dtype,
            shape,
            bytes,
        };
    }
    let data = data.convert::<f32>();
    let values: Vec<f32> = data.try_into_vec().expect("converted to f32");
    HostTensor::from_f32(shape, &values)
}

/// The sum over all values of all tensors, in f64 and in their order.
fn sum_on_host(tensors: Vec<Tensor<1>>) -> f64 {
    let values = gathered(tensors.into_iter().enumerate()).into_values();
    values.flatten().map(f64::from).sum()
}

struct Walk<'a> {
    owner: &'a mut PathOptimizer,
    gradients: Gradients,
    learning_rate: f64,
    path: Vec<String>,
}

impl ModuleMapper for Walk<'_> {
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
            return param; // the paths were compared before
        };
        let gradient = gradient.reshape::<D, _>(param.shape()).into_bridge();
        let PathOptimizer {
            rule,
            state,
            rate_factors,
        } = &mut *self.owner;
        let factor = match rule.0 {
            Kind::Prodigy(_) => None,
            _ => rate_factors.get(&path),
        };
        let rate = self.learning_rate * factor.copied().unwrap_or(1.0);
        let before = state.remove(&path);
        let mut next = None;
        let param = param.map(|tensor| {
            let tensor = tensor.inner().into_bridge();
            let (tensor, state) = (rule.0.of_tensors()).step_dyn(D, rate, tensor, gradient, before);
            next = state;
            Tensor::from_inner(Tensor::from_bridge(tensor)).require_grad()
        });
        if let Some(next) = next {
            state.insert(path, next);
        }
        param
    }
}
