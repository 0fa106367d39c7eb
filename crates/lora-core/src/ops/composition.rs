//! From a [`Composition`] to tensors: one node of the autodiff graph, on every backend that this crate has a feature for.

use std::fmt::Debug;

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::tensor::{Device, Tensor};

/// An operation made of Burn's tensor operations that knows its derivative, and so what to keep for it.
///
/// Burn keeps for the backward pass what each operation that it is made of reads. Here the graph has one node, which keeps what
/// `forward` says. Its first `N` inputs may get gradients, those after them are constants.
pub trait Composition<const N: usize>: Clone + Debug + Send + 'static {
    /// What the backward pass needs.
    type Saved: Clone + Debug + Send + 'static;

    /// The result, and what to keep for the backward pass.
    fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, Self::Saved);

    /// Gradients of the inputs for which one is wanted.
    fn backward(
        &self,
        saved: Self::Saved,
        grad: DispatchTensor,
        wanted: [bool; N],
    ) -> [Option<DispatchTensor>; N];
}

/// Runs `operation` on float tensors of one backend, with its gradient where one is asked for. On a backend that this crate
/// has no feature for, `forward` sees tensors with autodiff, and the gradient is Burn's.
pub fn compose<O: Composition<N>, const N: usize, const D: usize>(
    operation: O,
    inputs: Vec<DispatchTensor>,
) -> Tensor<D> {
    let device = inputs.first().map(|x| Device::new(x.device()));
    let out = match device.is_some_and(|device| has_node(&device)) {
        #[cfg(any(feature = "flex", feature = "cube"))]
        true => routed::compose(operation, inputs),
        _ => operation.forward(inputs).0,
    };
    Tensor::from_dispatch(out)
}

/// Whether a composition is one node of the graph on `device`.
pub(crate) fn has_node(device: &Device) -> bool {
    match device.clone().inner().as_dispatch() {
        #[cfg(feature = "flex")]
        burn::backend::DispatchDevice::Flex(_) => true,
        #[cfg(feature = "cube")]
        burn::backend::DispatchDevice::Cube(_) => true,
        _ => false,
    }
}

#[cfg(any(feature = "flex", feature = "cube"))]
pub(super) mod routed {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{
        Autodiff, Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor,
        DispatchTensorKind, backend_extension,
    };

    use super::Composition;
    use crate::ops::inputs::Inputs;

    pub fn compose<O: Composition<N>, const N: usize>(
        operation: O,
        inputs: Vec<DispatchTensor>,
    ) -> DispatchTensor {
        <Dispatch as Composed>::composed::<O, N>(operation, Inputs(inputs))
    }

    #[backend_extension(
        Autodiff,
        Flex: cfg(feature = "flex"),
        Cube: cfg(feature = "cube")
    )]
    pub trait Composed: Backend {
        fn composed<O: Composition<N>, const N: usize>(
            operation: O,
            #[extension_type] inputs: Inputs<Self>,
        ) -> FloatTensor<Self>;
    }

    /// A backend whose tensors can be handed to Burn's tensor operations and taken back.
    pub trait Routed: Composed {
        fn to(tensor: FloatTensor<Self>) -> DispatchTensor;
        fn of(tensor: DispatchTensor) -> FloatTensor<Self>;
    }

    /// Without a graph.
    macro_rules! on {
        ($backend:ident) => {
            impl Composed for burn::backend::$backend {
                fn composed<O: Composition<N>, const N: usize>(
                    operation: O,
                    inputs: Inputs<Self>,
                ) -> FloatTensor<Self> {
                    let inputs = inputs.0.into_iter().map(Self::to).collect();
                    Self::of(operation.forward(inputs).0)
                }
            }

            impl Routed for burn::backend::$backend {
                fn to(tensor: FloatTensor<Self>) -> DispatchTensor {
                    DispatchTensor {
                        kind: DispatchTensorKind::$backend(BackendTensor::Float(tensor)),
                        autodiff: DispatchAutodiffContext::Disabled,
                    }
                }

                fn of(tensor: DispatchTensor) -> FloatTensor<Self> {
                    match tensor.kind {
                        DispatchTensorKind::$backend(tensor) => tensor.float(),
                        _ => unreachable!("an operation stays on the device of its inputs"),
                    }
                }
            }
        };
    }

    #[cfg(feature = "flex")]
    on!(Flex);
    #[cfg(feature = "cube")]
    on!(Cube);

    impl<B: Routed, C: CheckpointStrategy> Composed for Autodiff<B, C> {
        fn composed<O: Composition<N>, const N: usize>(
            operation: O,
            inputs: Inputs<Self>,
        ) -> FloatTensor<Self> {
            let (values, mut nodes): (Vec<_>, Vec<_>) =
                inputs.0.into_iter().map(|input| input.into_parts()).unzip();
            nodes.truncate(N);
            let nodes: [_; N] = nodes
                .try_into()
                .expect("an operation is applied to at least N tensors");
            let values = values.into_iter().map(B::to).collect();
            let (out, saved) = operation.forward(values);
            let out = B::of(out);
            let node = Backward::<B, N>::prepare::<C>(Node(operation), nodes);
            match node.compute_bound().stateful() {
                OpsKind::Tracked(node) => node.finish(saved, out),
                OpsKind::UnTracked(node) => node.finish(out),
            }
        }
    }

    /// The backward step of an operation.
    #[derive(Debug)]
    struct Node<O>(O);

    impl<B: Routed, O: Composition<N>, const N: usize> Backward<B, N> for Node<O> {
        type State = O::Saved;

        fn backward(self, ops: Ops<O::Saved, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
            let grad = B::to(gradients.consume::<B>(&ops.node));
            let wanted = ops.parents.each_ref().map(Option::is_some);
            let found = self.0.backward(ops.state, grad, wanted);
            for (parent, gradient) in ops.parents.into_iter().zip(found) {
                if let (Some(parent), Some(gradient)) = (parent, gradient) {
                    gradients.register::<B>(parent.id, B::of(gradient));
                }
            }
        }
    }
}
