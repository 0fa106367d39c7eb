//! Filling a network with the values of a checkpoint.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use lora_core::frozen::{hold, placeholder};

use super::checkpoint::Checkpoint;
use super::compute::Compute;
use super::find::Parameter;
use super::layout::Layout;
use super::storage::{BaseDtype, Held, Ready};
use super::stream::Stream;
use super::walk::Walk;
use crate::error::WeightsError;
use crate::network::Network;

/// How the base weights of a network are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Base {
    /// What the weights of linear layers are kept as.
    pub dtype: BaseDtype,
    /// Whether blocks are read from the checkpoint each time they are needed, and not kept.
    pub is_streamed: bool,
    /// What the blocks compute in.
    pub compute: Compute,
}

impl Checkpoint {
    /// Fills `module` with this checkpoint's values on `device`, without gradients; the weights of linear layers are kept as
    /// `base` says.
    ///
    /// # Errors
    /// A tensor that is missing, left over, of another shape, or not finite.
    pub fn load<M: Module>(
        &self,
        module: M,
        layout: Layout,
        base: BaseDtype,
        device: &Device,
    ) -> Result<M, WeightsError> {
        self.fill(module, &mut Load::new(self, layout, base, device))
    }

    /// As [`load`](Self::load), but the parts of `module` at the paths `blocks` get no values; the stream has them, in this
    /// order.
    ///
    /// # Errors
    /// As [`load`](Self::load); the values in blocks are looked at when they are read.
    pub(crate) fn stream<M: Module>(
        self,
        module: M,
        blocks: Vec<String>,
        layout: Layout,
        base: BaseDtype,
        device: &Device,
    ) -> Result<(M, Stream), WeightsError> {
        let mut load = Load::new(&self, layout, base, device);
        load.streamed = blocks.into_iter().map(|path| (path, Vec::new())).collect();
        let module = self.fill(module, &mut load)?;
        let blocks = load.streamed;
        Ok((module, Stream::new(self, base, device, blocks)))
    }

    /// A network whose blocks are streamed if `base` says so.
    ///
    /// # Errors
    /// As [`load`](Self::load) or [`stream`](Self::stream).
    pub(crate) fn load_network<N: Network>(
        self,
        network: N,
        layout: Layout,
        base: Base,
        device: &Device,
    ) -> Result<N, WeightsError> {
        let network = network.with_compute(base.compute);
        if !base.is_streamed {
            return self.load(network, layout, base.dtype, device);
        }
        let (network, stream) = self.stream_network(network, layout, base.dtype, device)?;
        Ok(network.with_stream(stream))
    }

    /// A network without the values of its blocks, and the stream of them.
    ///
    /// # Errors
    /// As [`stream`](Self::stream).
    pub(crate) fn stream_network<N: Network>(
        self,
        network: N,
        layout: Layout,
        base: BaseDtype,
        device: &Device,
    ) -> Result<(N, Stream), WeightsError> {
        let blocks = (0..network.count()).map(|i| network.path(i)).collect();
        self.stream(network, blocks, layout, base, device)
    }

    fn fill<M: Module>(&self, module: M, load: &mut Load<'_>) -> Result<M, WeightsError> {
        let module = module.map(load);
        if let Some(error) = load.error.take() {
            return Err(error);
        }
        let unused: Vec<&str> = self.names().filter(|key| !load.is_used(key)).collect();
        match unused.first() {
            None => Ok(hold(module, std::mem::take(&mut load.held))
                .expect("they are of the network's shapes")),
            Some(key) => Err(WeightsError::Leftover {
                path: self.path.clone(),
                key: key.to_string(),
                count: unused.len(),
            }),
        }
    }
}

/// The walk.
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
        let parameter = Parameter {
            name: path,
            place,
            is_linear,
        };
        for (block, parameters) in &mut self.streamed {
            if parameter.within(block).is_some() {
                parameters.push(parameter);
                return Ok(None);
            }
        }
        let ready = self.checkpoint.ready(&parameter, self.base, self.device)?;
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
