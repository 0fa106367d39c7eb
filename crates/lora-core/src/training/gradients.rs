//! Gradients by parameter path.
//!
//! Burn keys gradients by `ParamId`, which is random in every process. A path is the same in every run and on every
//! machine, and sorting by it fixes the order in which norms are summed.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Gradients as BurnGradients, Tensor};

use crate::error::LoraError;
use crate::state::gathered;
use crate::walk::walk;

/// Gradient of every trainable parameter, flattened to one dimension.
#[derive(Debug, Clone, Default)]
pub struct Gradients(BTreeMap<String, Tensor<1>>);

impl Gradients {
    /// Moves the gradients of `module`'s trainable parameters out of `from`; paths get `prefix` in front.
    ///
    /// A path that is there already is added to.
    pub fn take<M: Module>(&mut self, prefix: &str, module: &M, from: &mut BurnGradients) {
        let prefix = prefix.split('.').filter(|part| !part.is_empty());
        let prefix: String = prefix.map(|part| format!("{part}.")).collect();
        walk(module, |found| {
            if found.param().is_trainable()
                && let Some(gradient) = found.param().take_gradient(from)
            {
                self.add(format!("{prefix}{}", found.path()), gradient);
            }
        });
    }

    fn add(&mut self, path: String, gradient: Tensor<1>) {
        let sum = match self.0.remove(&path) {
            Some(earlier) => earlier + gradient,
            None => gradient,
        };
        self.0.insert(path, sum);
    }

    /// Adds all of `other`, as gradient accumulation does.
    pub fn accumulate(&mut self, other: Self) {
        for (path, gradient) in other.0 {
            self.add(path, gradient);
        }
    }

    /// All of them on `device`.
    #[must_use]
    pub fn to_device(self, device: &Device) -> Self {
        let moved = self.0.into_iter();
        Self(
            moved
                .map(|(path, gradient)| (path, gradient.to_device(device)))
                .collect(),
        )
    }

    /// Path and gradient, sorted by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor<1>)> {
        self.0
            .iter()
            .map(|(path, gradient)| (path.as_str(), gradient))
    }

    /// The gradient of the parameter at `path`.
    pub(crate) fn get(&self, path: &str) -> Option<&Tensor<1>> {
        self.0.get(path)
    }

    /// Removes and returns the gradient of the parameter at `path`.
    pub(crate) fn remove(&mut self, path: &str) -> Option<Tensor<1>> {
        self.0.remove(path)
    }

    /// The norm over all gradients together.
    ///
    /// One transfer from the device, then summed on the host in f64 in path order: the same bits wherever the gradients are the same, whatever order a device
    /// would reduce in.
    ///
    /// # Errors
    /// A gradient that holds NaN or infinity; the error names its parameter.
    pub fn norm(&self) -> Result<f64, LoraError> {
        let mut sum = 0.0;
        let gradients = self.0.iter();
        for (path, values) in gathered(gradients.map(|(path, g)| (path, g.clone()))) {
            if let Some(index) = values.iter().position(|v| !v.is_finite()) {
                return Err(LoraError::NotFinite {
                    key: format!("gradient of {path}"),
                    index,
                });
            }
            sum += values
                .iter()
                .map(|&v| f64::from(v) * f64::from(v))
                .sum::<f64>();
        }
        Ok(sum.sqrt())
    }

    /// Scales all gradients by `max_norm / (norm + 1e-6)` if `norm` is larger, as torch's `clip_grad_norm_` does.
    #[must_use]
    pub fn clip(self, norm: f64, max_norm: f64) -> Self {
        let factor = max_norm / (norm + 1e-6);
        if factor >= 1.0 {
            return self;
        }
        Self(
            self.0
                .into_iter()
                .map(|(path, gradient)| (path, gradient.mul_scalar(factor)))
                .collect(),
        )
    }
}
