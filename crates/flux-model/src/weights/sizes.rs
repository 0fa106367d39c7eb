//! What a network takes in memory, from names, types and shapes alone.

use burn::module::{ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use lora_core::files::host::Dtype;

use super::storage::Kept;
use super::walk::Walk;
use super::{BaseDtype, Checkpoint, Layout};
use crate::network::{Network, Sees};

/// Sizes of a network's parts.
#[derive(Debug, Clone, Default)]
pub struct Sizes {
    /// Of each block.
    pub blocks: Vec<BlockSize>,
    /// Bytes of the base weights that are in no block.
    pub rest: u64,
    /// Width of a token between blocks.
    pub width: u64,
    /// Heads of the attention.
    pub heads: u64,
}

/// Sizes of a block.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockSize {
    /// Bytes of its base weights.
    pub weights: u64,
    /// Of these, bytes of weights that a stream maps from the file.
    pub mapped: u64,
    /// Numbers that an autodiff graph keeps for a token, about: what its linear layers read and write.
    pub activations: u64,
    /// Numbers of a token that are kept where the block's results are, about: what its linear layers write. Attention writes as
    /// much as the last of them, which is not kept.
    pub results: u64,
}

impl Checkpoint {
    /// Sizes of `network`, whose base weights are kept as `base` says. What is not in the checkpoint counts as f32.
    pub(crate) fn sizes<N: Network>(
        &self,
        network: &N,
        layout: Layout,
        base: BaseDtype,
        device: &Device,
    ) -> Sizes {
        struct Measure<'a> {
            checkpoint: &'a Checkpoint,
            layout: Layout,
            base: BaseDtype,
            device: &'a Device,
            paths: Vec<String>,
            walk: Walk,
            sizes: Sizes,
            /// Linear layers of each block.
            linears: Vec<usize>,
        }
        impl ModuleVisitor for Measure<'_> {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.walk.enter(name, container);
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.walk.exit();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let (key, shape) = (self.walk.key(), param.lazy_shape().to_vec());
                let is_linear = self.walk.is_transposed(D);
                let location = self.layout.locate(&key);
                let stored = location.as_ref();
                let stored = stored.and_then(|location| self.checkpoint.storage(&location.key));
                let is_mapped = location.is_some_and(|location| {
                    let (base, device) = (self.base, self.device);
                    let dtype = (self.checkpoint).as_stored(&location, is_linear, base, device);
                    dtype.is_some()
                });
                let kept = match stored {
                    Some(stored) if is_linear => self.base.kept(stored, self.device),
                    _ => Kept::Dense(Dtype::F32),
                };
                let bytes = kept.bytes(shape.iter().product());
                let is_of = |path: &String| {
                    let rest = key.strip_prefix(path.as_str());
                    rest.is_some_and(|rest| rest.starts_with('.'))
                };
                match self.paths.iter().position(is_of) {
                    None => self.sizes.rest += bytes,
                    Some(index) => {
                        let block = &mut self.sizes.blocks[index];
                        block.weights += bytes;
                        block.mapped += if is_mapped { bytes } else { 0 };
                        if is_linear {
                            block.activations += shape.iter().sum::<usize>() as u64;
                            if Sees::of(&key) != Sees::Conditioning {
                                block.results += shape[1] as u64;
                            }
                            self.linears[index] += 1;
                        }
                    }
                }
            }
        }
        let mut measure = Measure {
            checkpoint: self,
            layout,
            base,
            device,
            paths: (0..network.count()).map(|i| network.path(i)).collect(),
            walk: Walk::default(),
            sizes: Sizes {
                blocks: vec![BlockSize::default(); network.count()],
                rest: 0,
                width: network.width() as u64,
                heads: network.heads() as u64,
            },
            linears: vec![0; network.count()],
        };
        network.visit(&mut measure);
        let mut sizes = measure.sizes;
        for (index, block) in sizes.blocks.iter_mut().enumerate() {
            // each layer sees the tokens of its stream
            block.activations /= network.streams(index) as u64;
            block.results /= network.streams(index) as u64;
            // What attention reads and what the residual adds is kept too. Separate layers for q, k and v count their input three
            // times, which is about as much; a block of two fused layers (FLUX.2) counts it once.
            if measure.linears[index] == 2 {
                block.activations += 4 * sizes.width;
            }
        }
        sizes
    }
}
