//! Per-block recompute: gradients of a chain of blocks, keeping only each block's input.
//!
//! The forward pass runs without a graph; the backward pass takes the blocks in reverse, runs each again under autodiff
//! with its kept input as a leaf, and feeds in the gradient that came from behind (Chen et al. 2016, arXiv:1604.06174).
//! The gradients have the same bits as those of plain autodiff, provided that the untracked forward runs on the autodiff
//! device (other kernels may be picked on the plain one) and that every block uses each shared input through one node.

use burn::module::Module;
use burn::tensor::{Gradients as BurnGradients, Tensor};

use crate::training::gradients::Gradients;

/// A tensor, or a tuple of them, that flows between blocks.
pub trait TensorTree: Clone {
    /// On the autodiff device, not tracked.
    fn lift(self) -> Self;
    /// On the autodiff device, a fresh leaf that requires a gradient.
    fn leaf(self) -> Self;
    /// Off the autodiff device.
    fn inner(self) -> Self;
    /// Sum of the products with `gradient`; its backward pass seeds `self` with `gradient`.
    fn dot(self, gradient: Self) -> Option<Tensor<1>>;
    /// Moves this leaf's gradient out, zero where none arrived.
    fn take_gradient(&self, from: &mut BurnGradients) -> Self;
    /// Element-wise sum.
    fn plus(self, other: Self) -> Self;
}

impl<const D: usize> TensorTree for Tensor<D> {
    fn lift(self) -> Self {
        self.autodiff()
    }
    fn leaf(self) -> Self {
        self.autodiff().require_grad()
    }
    fn inner(self) -> Self {
        Tensor::inner(self)
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        Some((self * gradient).sum())
    }
    fn take_gradient(&self, from: &mut BurnGradients) -> Self {
        self.grad_remove(from)
            .unwrap_or_else(|| self.clone().inner().zeros_like())
    }
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl<A: TensorTree, B: TensorTree> TensorTree for (A, B) {
    fn lift(self) -> Self {
        (self.0.lift(), self.1.lift())
    }
    fn leaf(self) -> Self {
        (self.0.leaf(), self.1.leaf())
    }
    fn inner(self) -> Self {
        (self.0.inner(), self.1.inner())
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        match (self.0.dot(gradient.0), self.1.dot(gradient.1)) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        }
    }
    fn take_gradient(&self, from: &mut BurnGradients) -> Self {
        (self.0.take_gradient(from), self.1.take_gradient(from))
    }
    fn plus(self, other: Self) -> Self {
        (self.0.plus(other.0), self.1.plus(other.1))
    }
}

/// A constant of the step, such as a position table: it gets no gradient.
#[derive(Debug, Clone)]
pub struct Constant<T>(pub T);

impl<T: TensorTree> TensorTree for Constant<T> {
    fn lift(self) -> Self {
        Self(self.0.lift())
    }
    fn leaf(self) -> Self {
        self.lift()
    }
    fn inner(self) -> Self {
        Self(self.0.inner())
    }
    fn dot(self, _: Self) -> Option<Tensor<1>> {
        None
    }
    fn take_gradient(&self, _: &mut BurnGradients) -> Self {
        self.clone().inner()
    }
    fn plus(self, _: Self) -> Self {
        self
    }
}

/// The forward pass of a chain of blocks, with what its backward pass needs.
pub struct Chain<'a, B, X, S, F> {
    blocks: &'a [B],
    inputs: Vec<X>,
    shared: S,
    forward: F,
}

/// What the backward pass of a chain leaves for the stage before it.
pub struct ChainGradient<X, S> {
    /// Gradient of the chain's input.
    pub input: X,
    /// Gradient of the shared input, summed over the blocks; `None` if there is no block.
    pub shared: Option<S>,
}

impl<'a, B: Module, X: TensorTree, S: TensorTree, F: Fn(&B, X, &S) -> X> Chain<'a, B, X, S, F> {
    /// Runs `forward(block, x, shared)` over all blocks without a graph. `x` and `shared` are off the autodiff device, and
    /// so is the result.
    pub fn run(blocks: &'a [B], x: X, shared: S, forward: F) -> (Self, X) {
        let lifted = shared.clone().lift();
        let mut inputs = Vec::with_capacity(blocks.len());
        let mut current = x;
        for block in blocks {
            inputs.push(current.clone());
            current = forward(&block.clone().no_grad(), current.lift(), &lifted).inner();
        }
        (
            Self {
                blocks,
                inputs,
                shared,
                forward,
            },
            current,
        )
    }

    /// Adds the gradients of the blocks' trainable parameters to `into`, under paths `<prefix>.<index>...`.
    pub fn backward(self, prefix: &str, gradient: X, into: &mut Gradients) -> ChainGradient<X, S> {
        let mut upstream = gradient;
        let mut shared_gradient: Option<S> = None;
        for (index, (block, input)) in self.blocks.iter().zip(self.inputs).enumerate().rev() {
            let (x, shared) = (input.leaf(), self.shared.clone().leaf());
            let output = (self.forward)(block, x.clone(), &shared);
            let Some(dot) = output.dot(upstream.clone().lift()) else {
                continue;
            };
            let mut gradients = dot.backward();
            upstream = x.take_gradient(&mut gradients);
            let from_block = shared.take_gradient(&mut gradients);
            shared_gradient = Some(match shared_gradient {
                None => from_block,
                Some(sum) => sum.plus(from_block),
            });
            into.take(&format!("{prefix}.{index}"), block, &mut gradients);
        }
        ChainGradient {
            input: upstream,
            shared: shared_gradient,
        }
    }
}
