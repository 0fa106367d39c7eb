//! A walk that fills a network with the values of a checkpoint.

use std::collections::BTreeMap;

use burn::module::{ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use lora_core::frozen::placeholder;

use super::storage::{BaseDtype, Held, Ready};
use super::stream::Parameter;
use super::walk::Walk;
use super::{Checkpoint, Layout};
use crate::error::WeightsError;

pub(super) struct Load<'a> {
    checkpoint: &'a Checkpoint,
    layout: Layout,
    base: BaseDtype,
    device: &'a Device,
    pub(super) walk: Walk,
    /// Checkpoint key to the rows that were read.
    used: BTreeMap<String, usize>,
    pub(super) error: Option<WeightsError>,
    /// What is to be put on the network after the walk.
    pub(super) held: Held,
    /// Paths of the blocks that are not read, and what was found of each.
    pub(super) streamed: Vec<(String, Vec<Parameter>)>,
}

impl<'a> Load<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        layout: Layout,
        base: BaseDtype,
        device: &'a Device,
    ) -> Self {
        Self {
            checkpoint,
            layout,
            base,
            device,
            walk: Walk::default(),
            used: BTreeMap::new(),
            error: None,
            held: Held::new(),
            streamed: Vec::new(),
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

    /// Finds the parameter that the walk is at in the checkpoint, checks its shape there, and reads it unless it is of a
    /// block that is streamed.
    fn read(&mut self, shape: &[usize]) -> Result<Option<Ready>, WeightsError> {
        let (key, path) = (self.walk.key(), self.walk.path.join("."));
        let is_linear = self.walk.is_transposed(shape.len());
        let expected = self.walk.stored_shape(shape);
        let place = self.checkpoint.find(self.layout, &key, expected)?;
        let used = self.used.entry(place.location.key.clone());
        *used.or_default() += place.rows();
        for (block, parameters) in &mut self.streamed {
            let within = path.strip_prefix(block.as_str());
            if let Some(within) = within.and_then(|path| path.strip_prefix('.')) {
                parameters.push(Parameter {
                    path: within.into(),
                    place,
                    is_linear,
                });
                return Ok(None);
            }
        }
        let stored = self.checkpoint.stored(&place)?;
        let ready = Ready::new(stored, is_linear, self.base, self.device);
        let key = &place.location.key;
        let ready = ready.map_err(|index| self.checkpoint.not_finite(key, index))?;
        Ok(Some(ready))
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
        let shape = param.lazy_shape();
        match self.read(&shape) {
            Ok(Some(ready)) => {
                let path = self.walk.path.join(".");
                Param::initialized(param.id, ready.on(path, &mut self.held, self.device))
            }
            Ok(None) => {
                let shape = std::array::from_fn(|axis| shape[axis]);
                Param::initialized(param.id, placeholder(shape, self.device))
            }
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}
