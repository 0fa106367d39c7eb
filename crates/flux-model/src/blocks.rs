//! The blocks of a network, one at a time and of two kinds.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::{Device, Tensor};

/// A double-stream or a single-stream block as one module: it adds nothing to the paths of its parameters.
#[derive(Debug, Clone)]
pub enum Block<D, S> {
    /// Text and image tokens, each with its own weights.
    Double(D),
    /// All tokens together.
    Single(S),
}

/// The same expression for either kind; with a second one, what it gives is a block again.
macro_rules! either {
    ($block:expr, $inner:ident => $result:expr) => {
        match $block {
            Self::Double($inner) => $result,
            Self::Single($inner) => $result,
        }
    };
    ($block:expr, block $inner:ident => $result:expr) => {
        match $block {
            Self::Double($inner) => Self::Double($result),
            Self::Single($inner) => Self::Single($result),
        }
    };
}

impl<D: Module, S: Module> Module for Block<D, S> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        either!(self, block => block.collect_devices(devices))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        either!(self, block => block.visit(visitor));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        either!(self, block block => block.map(mapper))
    }

    fn fork(self, device: &Device) -> Self {
        either!(self, block block => block.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        either!(self, block block => block.to_device(device))
    }

    fn train(self) -> Self {
        either!(self, block block => block.train())
    }

    fn valid(&self) -> Self {
        either!(self, block block => block.valid())
    }

    fn materialize(self) -> Self {
        either!(self, block block => block.materialize())
    }
}

/// Text tokens, then image tokens, as one sequence; what is one already stays as it is.
pub(crate) fn join(mut tokens: Vec<Tensor<3>>) -> Tensor<3> {
    match tokens.len() {
        1 => tokens.remove(0),
        _ => Tensor::cat(tokens, 1),
    }
}
