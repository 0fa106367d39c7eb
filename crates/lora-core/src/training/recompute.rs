//! Per-block recompute: gradients of a chain of blocks, keeping only each block's input.
//!
//! The forward pass runs without a graph; the backward pass takes the blocks in reverse, runs each again under autodiff
//! with its kept input as a leaf, and feeds in the gradient that came from behind (Chen et al. 2016, arXiv:1604.06174).
//! The gradients have the same bits as those of plain autodiff, provided that the untracked forward runs on the autodiff
//! device (other kernels may be picked on the plain one) and that every block uses each shared input through one node.

use burn::module::Module;
use burn::tensor::{Gradients as BurnGradients, Tensor};

use crate::training::gradients::Gradients;

/// A tensor, a tuple or a list of them, or a type of your own made of them, that flows between blocks.
///
/// A part that is a constant of the step, such as a position table, is lifted by `lift` and by `leaf` alike and keeps out of
/// the others: it gets no gradient.
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

impl<T: TensorTree> TensorTree for Vec<T> {
    fn lift(self) -> Self {
        self.into_iter().map(T::lift).collect()
    }
    fn leaf(self) -> Self {
        self.into_iter().map(T::leaf).collect()
    }
    fn inner(self) -> Self {
        self.into_iter().map(T::inner).collect()
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        let products = self.into_iter().zip(gradient);
        products
            .filter_map(|(part, gradient)| part.dot(gradient))
            .reduce(|a, b| a + b)
    }
    fn take_gradient(&self, from: &mut BurnGradients) -> Self {
        self.iter().map(|part| part.take_gradient(from)).collect()
    }
    fn plus(self, other: Self) -> Self {
        let pairs = self.into_iter().zip(other);
        pairs.map(|(a, b)| a.plus(b)).collect()
    }
}

/// A network whose depth is a chain of blocks.
pub trait Blocks {
    /// One block. Blocks of several kinds are one type that passes visitors on, without a path of its own.
    type Block: Module;
    /// What flows from block to block.
    type Carry: TensorTree;
    /// What every block reads besides.
    type Shared: TensorTree;
    /// Why a block cannot be had.
    type Error;

    /// How many there are.
    fn count(&self) -> usize;

    /// Block `index`, whose tensors may be shared with the network or read for this call.
    ///
    /// # Errors
    /// A block that is not resident and cannot be read.
    fn block(&self, index: usize) -> Result<Self::Block, Self::Error>;

    /// Path of block `index` in the network, in front of the paths of its parameters.
    fn path(&self, index: usize) -> String;

    /// What `block` makes of `carry`.
    fn apply(block: &Self::Block, carry: Self::Carry, shared: &Self::Shared) -> Self::Carry;
}

/// The forward pass of a chain of blocks, with what its backward pass needs.
pub struct Chain<'a, B: Blocks> {
    blocks: &'a B,
    inputs: Vec<B::Carry>,
    shared: B::Shared,
}

impl<'a, B: Blocks> Chain<'a, B> {
    /// Runs the first `count` blocks without a graph; what follows the chain may be further blocks. `carry` and `shared` are off
    /// the autodiff device, and so is the result.
    ///
    /// # Errors
    /// A block that cannot be had.
    pub fn run(
        blocks: &'a B,
        count: usize,
        carry: B::Carry,
        shared: B::Shared,
    ) -> Result<(Self, B::Carry), B::Error> {
        let lifted = shared.clone().lift();
        let mut inputs = Vec::with_capacity(count);
        let mut current = carry;
        for index in 0..count {
            let block = blocks.block(index)?.no_grad();
            inputs.push(current.clone());
            current = B::apply(&block, current.lift(), &lifted).inner();
        }
        let chain = Self {
            blocks,
            inputs,
            shared,
        };
        Ok((chain, current))
    }

    /// Adds the gradients of the blocks' trainable parameters to `into`; takes the gradients of the chain's output and of
    /// the shared input, as far as what follows the chain gave them, and returns those of the chain's input and of the
    /// shared input, from the blocks too.
    ///
    /// # Errors
    /// A block that cannot be had.
    pub fn backward(
        self,
        carry: B::Carry,
        shared: B::Shared,
        into: &mut Gradients,
    ) -> Result<(B::Carry, B::Shared), B::Error> {
        let (mut upstream, mut shared_gradient) = (carry, shared);
        for (index, input) in self.inputs.into_iter().enumerate().rev() {
            let block = self.blocks.block(index)?;
            let (carry, shared) = (input.leaf(), self.shared.clone().leaf());
            let output = B::apply(&block, carry.clone(), &shared);
            let Some(dot) = output.dot(upstream.clone().lift()) else {
                continue;
            };
            let mut gradients = dot.backward();
            upstream = carry.take_gradient(&mut gradients);
            shared_gradient = shared_gradient.plus(shared.take_gradient(&mut gradients));
            into.take(&self.blocks.path(index), &block, &mut gradients);
        }
        Ok((upstream, shared_gradient))
    }
}
