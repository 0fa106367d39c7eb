//! Gradients by parameter path.
//!
//! Burn keys gradients by `ParamId`, which is random in every process. A path is the same in every run and on every
//! machine, and sorting by it fixes the order in which norms are summed.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients as BurnGradients, Tensor};

use crate::error::LoraError;

/// Gradient of every trainable parameter, flattened to one dimension.
#[derive(Debug, Clone, Default)]
pub struct Gradients(BTreeMap<String, Tensor<1>>);

impl Gradients {
    /// Moves the gradients of `module`'s trainable parameters out of `from`; paths get `prefix` in front.
    ///
    /// A path that is there already is added to.
    pub fn take<M: Module>(&mut self, prefix: &str, module: &M, from: &mut BurnGradients) {
        struct Take<'a> {
            path: Vec<String>,
            from: &'a mut BurnGradients,
            into: &'a mut Gradients,
        }
        impl ModuleVisitor for Take<'_> {
            fn enter_module(&mut self, name: &str, _: &str) {
                self.path.push(name.into());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.path.pop();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if param.is_require_grad()
                    && let Some(gradient) = param.grad_remove(self.from)
                {
                    let n = gradient.shape().num_elements();
                    self.into.add(self.path.join("."), gradient.reshape([n]));
                }
            }
        }
        let path = prefix
            .split('.')
            .filter(|part| !part.is_empty())
            .map(String::from)
            .collect();
        module.visit(&mut Take {
            path,
            from,
            into: self,
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

    /// Path and gradient, sorted by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor<1>)> {
        self.0
            .iter()
            .map(|(path, gradient)| (path.as_str(), gradient))
    }

    /// Removes and returns the gradient of the parameter at `path`.
    pub(crate) fn remove(&mut self, path: &str) -> Option<Tensor<1>> {
        self.0.remove(path)
    }

    /// A path that no parameter has claimed.
    pub(crate) fn leftover(&self) -> Option<&str> {
        self.0.keys().next().map(String::as_str)
    }

    /// The norm over all gradients together.
    ///
    /// Summed on the host in f64 in path order: the same bits wherever the gradients are the same, whatever order a device
    /// would reduce in.
    ///
    /// # Errors
    /// A gradient that holds NaN or infinity; the error names its parameter.
    pub fn norm(&self) -> Result<f64, LoraError> {
        let mut sum = 0.0;
        for (path, gradient) in &self.0 {
            let values = gradient
                .to_data()
                .convert::<f32>()
                .try_into_vec::<f32>()
                .expect("converted to f32");
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
