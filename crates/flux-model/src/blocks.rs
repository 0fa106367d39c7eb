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

/// Tokens flow through double-stream blocks as text and image, from the first single-stream block on as one sequence, text
/// first.
impl<D: Clone, S: Clone> Block<D, S> {
    /// Block `index` of a network whose double-stream blocks come first.
    pub(crate) fn at(double: &[D], single: &[S], index: usize) -> Self {
        match index.checked_sub(double.len()) {
            None => Self::Double(double[index].clone()),
            Some(index) => Self::Single(single[index].clone()),
        }
    }

    /// What the block makes of the tokens, by the forward pass of its kind.
    pub(crate) fn forward(
        &self,
        tokens: Vec<Tensor<3>>,
        double: impl FnOnce(&D, [Tensor<3>; 2]) -> [Tensor<3>; 2],
        single: impl FnOnce(&S, Tensor<3>) -> Tensor<3>,
    ) -> Vec<Tensor<3>> {
        match self {
            Self::Double(block) => {
                let apart = <[Tensor<3>; 2]>::try_from(tokens);
                let apart = apart.expect("double-stream blocks come before single-stream ones");
                double(block, apart).into()
            }
            Self::Single(block) => vec![single(block, join(tokens))],
        }
    }
}

/// Path of block `index` of a network of which `double` blocks are double-stream.
pub(crate) fn block_path(double: usize, index: usize) -> String {
    match index.checked_sub(double) {
        None => format!("transformer_blocks.{index}"),
        Some(index) => format!("single_transformer_blocks.{index}"),
    }
}

/// What the last block gave, without the text tokens before the image's and those of reference pictures behind.
pub(crate) fn noisy_tokens(
    tokens: Vec<Tensor<3>>,
    txt_tokens: usize,
    reference_tokens: usize,
) -> Tensor<3> {
    let hidden = join(tokens);
    let noisy_tokens = hidden.dims()[1] - txt_tokens - reference_tokens;
    hidden.narrow(1, txt_tokens, noisy_tokens)
}

/// Text tokens, then image tokens, as one sequence; what is one already stays as it is.
fn join(mut tokens: Vec<Tensor<3>>) -> Tensor<3> {
    match tokens.len() {
        1 => tokens.remove(0),
        _ => Tensor::cat(tokens, 1),
    }
}
