//! From an [`Operation`] to tensors: dispatch to the backend, and one node of the autodiff graph.

use std::fmt::Debug;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, Dispatch, DispatchDevice, DispatchTensor, Flex, backend_extension,
};
use burn::tensor::{DType, Device, Tensor};

use super::inputs::Inputs;

/// An operation on the CPU that knows its derivative. Its first `N` inputs may get gradients, those after them are constants.
pub trait Operation<const N: usize>: Clone + Debug + Send + 'static {
    /// What the backward pass needs; tensors by reference, not by copy.
    type Saved: Clone + Debug + Send + 'static;

    /// The result, and what to keep for the backward pass.
    fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Self::Saved);

    /// Gradients of the inputs for which one is wanted.
    fn backward(
        &self,
        saved: Self::Saved,
        grad: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// Whether there are kernels for the backend and the dtype of `x`.
pub(super) fn has_kernels<const D: usize>(x: &Tensor<D>) -> bool {
    is_flex(&x.device()) && x.dtype() == DType::F32
}

/// Whether `device` is of the backend with kernels.
pub(super) fn is_flex(device: &Device) -> bool {
    matches!(
        device.clone().inner().as_dispatch(),
        DispatchDevice::Flex(_)
    )
}

/// Runs `operation` on tensors of [`has_kernels`](super::has_kernels), with its gradient where one is asked for.
pub fn apply<O: Operation<N>, const N: usize, const D: usize>(
    operation: O,
    inputs: Vec<DispatchTensor>,
) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as Fused>::fused::<O, N>(
        operation,
        Inputs(inputs),
    ))
}

#[backend_extension(Autodiff, Flex)]
trait Fused: Backend {
    fn fused<O: Operation<N>, const N: usize>(
        operation: O,
        #[extension_type] inputs: Inputs<Self>,
    ) -> FloatTensor<Self>;
}

impl Fused for Flex {
    fn fused<O: Operation<N>, const N: usize>(
        operation: O,
        inputs: Inputs<Self>,
    ) -> FloatTensor<Self> {
        operation.forward(inputs.0).0
    }
}

impl<C: CheckpointStrategy> Fused for Autodiff<Flex, C> {
    fn fused<O: Operation<N>, const N: usize>(
        operation: O,
        inputs: Inputs<Self>,
    ) -> FloatTensor<Self> {
        let (values, mut nodes): (Vec<_>, Vec<_>) =
            inputs.0.into_iter().map(|input| input.into_parts()).unzip();
        nodes.truncate(N);
        let nodes: [_; N] = nodes
            .try_into()
            .expect("an operation is applied to at least N tensors");
        let (out, saved) = operation.forward(values);
        match Node(operation)
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(node) => node.finish(saved, out),
            OpsKind::UnTracked(node) => node.finish(out),
        }
    }
}

/// The backward step of an operation.
#[derive(Debug)]
struct Node<O>(O);

impl<O: Operation<N>, const N: usize> Backward<Flex, N> for Node<O> {
    type State = O::Saved;

    fn backward(self, ops: Ops<O::Saved, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let grad = gradients.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let found = self.0.backward(ops.state, grad, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}
