//! A walk that fills a network with the values of a checkpoint.

use std::collections::BTreeMap;

use burn::module::{ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};

use super::walk::Walk;
use super::{Checkpoint, Layout};
use crate::error::WeightsError;

pub(super) struct Load<'a> {
    checkpoint: &'a Checkpoint,
    layout: Layout,
    device: &'a Device,
    pub(super) walk: Walk,
    /// Checkpoint key to the rows that were read.
    used: BTreeMap<String, usize>,
    pub(super) error: Option<WeightsError>,
}

impl<'a> Load<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, layout: Layout, device: &'a Device) -> Self {
        Self {
            checkpoint,
            layout,
            device,
            walk: Walk::default(),
            used: BTreeMap::new(),
            error: None,
        }
    }

    pub(super) fn is_used(&self, key: &str) -> bool {
        let key = self.checkpoint.owner(key).unwrap_or(key);
        let all = |used: &usize| {
            self.checkpoint
                .shape(key)
                .is_none_or(|s| s.first().is_none_or(|rows| used == rows))
        };
        self.used.get(key).is_some_and(all) || key == "scaled_fp8" || self.layout.ignores(key)
    }

    fn values(&mut self, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        let key = self.walk.key();
        let path = || self.checkpoint.path.clone();
        let mut location = self
            .layout
            .locate(&key)
            .ok_or_else(|| WeightsError::Missing {
                path: path(),
                key: key.clone(),
            })?;
        if self.layout == Layout::T5
            && key == "shared.weight"
            && self.checkpoint.shape(&key).is_none()
        {
            location.key = "encoder.embed_tokens.weight".into();
        }
        let found = self
            .checkpoint
            .shape(&location.key)
            .ok_or_else(|| WeightsError::Missing {
                path: path(),
                key: location.key.clone(),
            })?
            .to_vec();
        let expected = self.walk.stored_shape(shape);
        let mut available = found.clone();
        if location.pointwise && found.ends_with(&[1, 1]) && found.len() == 4 {
            available.truncate(2);
        }
        if let (Some(rows), Some(first)) = (&location.rows, available.first_mut()) {
            if rows.end > *first {
                return Err(WeightsError::Shape {
                    path: path(),
                    key: location.key,
                    expected,
                    found,
                });
            }
            *first = rows.len();
        }
        if available != expected {
            return Err(WeightsError::Shape {
                path: path(),
                key: location.key,
                expected,
                found,
            });
        }
        let mut tensor = self.checkpoint.read(&location)?;
        let rows = tensor.shape.first().copied().unwrap_or(1);
        *self.used.entry(location.key.clone()).or_default() += rows;
        tensor.shape = expected;
        if location.swap_halves {
            let half = tensor.bytes.len() / 2;
            tensor.bytes.rotate_left(half);
        }
        if self.walk.is_transposed(shape.len()) {
            tensor = tensor.transposed();
        }
        let values = tensor.to_f32();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(WeightsError::NotFinite {
                path: path(),
                key: location.key,
                index,
            }),
        }
    }
}

impl ModuleMapper for Load<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.walk.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.walk.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let shape = param.lazy_shape().to_vec();
        match self.values(&shape) {
            Ok(values) => {
                let tensor = Tensor::from_data(TensorData::new(values, shape), self.device);
                Param::initialized(param.id, tensor)
            }
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}
