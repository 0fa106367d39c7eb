//! `x W` with a `W` that is kept in less than what it is computed in, where there are no kernels for it.
//!
//! Composed of Burn's operations, the product keeps the matrix that it was computed with until its backward pass: a dense
//! copy of each weight of a block. Here the graph has one node that keeps the weight as it is. In the forward pass and again
//! in the backward pass, `dx = g Wᵀ`, the weight is cast, or decoded from its codes, on the device. A weight that is trained
//! is left to Burn, which gives it its gradient.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, Dispatch, DispatchDevice, DispatchTensor, DispatchTensorKind,
    TensorMetadata, backend_extension,
};
use burn::tensor::{FloatDType, Tensor};

use super::codes::Codes;

/// Whether [`times`] works where `x` is.
pub(super) fn is_here<const D: usize>(x: &Tensor<D>) -> bool {
    match x.device().inner().as_dispatch() {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        DispatchDevice::Cube(_) => true,
        _ => false,
    }
}

/// `x W` in the type of `x`, of a `weight` in another type, `[in, out]`, or in `codes`, whose tensor does not count.
pub(super) fn times<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    codes: Option<Arc<Codes>>,
) -> Tensor<D> {
    let mut shape = x.dims();
    let rows = shape[..D - 1].iter().product::<usize>();
    let x = x.reshape([rows, shape[D - 1]]);
    let product =
        <Dispatch as Decoded>::product(x.into_dispatch(), weight.into_dispatch(), Source(codes));
    let product = Tensor::<2>::from_dispatch(product);
    shape[D - 1] = product.dims()[1];
    product.reshape(shape)
}

/// Codes in place of a tensor; the macro below takes an `Option` for one of tensors.
#[derive(Debug, Clone)]
struct Source(Option<Arc<Codes>>);

impl Source {
    /// The matrix, in `dtype`.
    fn dense<B: Routed>(&self, weight: FloatTensor<B>, dtype: FloatDType) -> FloatTensor<B> {
        match &self.0 {
            None => B::float_cast(weight, dtype),
            Some(codes) => B::of(codes.dense().cast(dtype).into_dispatch()),
        }
    }
}

#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda"))
)]
trait Decoded: Backend {
    fn product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        source: Source,
    ) -> FloatTensor<Self>;
}

/// A backend that a tensor can be taken back to.
trait Routed: Decoded {
    fn of(tensor: DispatchTensor) -> FloatTensor<Self>;
}

/// The product for one backend, without a graph.
macro_rules! on {
    ($backend:ident) => {
        impl Decoded for burn::backend::$backend {
            fn product(
                x: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                source: Source,
            ) -> FloatTensor<Self> {
                let weight = source.dense::<Self>(weight, x.dtype().into());
                Self::float_matmul(x, weight)
            }
        }

        impl Routed for burn::backend::$backend {
            fn of(tensor: DispatchTensor) -> FloatTensor<Self> {
                match tensor.kind {
                    DispatchTensorKind::$backend(tensor) => tensor.float(),
                    _ => unreachable!("codes lie where what they are multiplied with does"),
                }
            }
        }
    };
}

#[cfg(feature = "flex")]
on!(Flex);
#[cfg(any(feature = "wgpu", feature = "cuda"))]
on!(Cube);

impl<B: Routed, C: CheckpointStrategy> Decoded for Autodiff<B, C> {
    fn product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        source: Source,
    ) -> FloatTensor<Self> {
        let dtype: FloatDType = x.dtype().into();
        let probe = Backward::<B, 1>::prepare::<C>(Product, [weight.node()]);
        if let OpsKind::Tracked(_) = probe.compute_bound().stateful() {
            return Self::float_matmul(x, Self::float_cast(weight, dtype));
        }
        let (x, node) = x.into_parts();
        let weight = weight.into_primitive();
        let out = B::product(x, weight.clone(), source.clone());
        let product = Backward::<B, 1>::prepare::<C>(Product, [node]);
        match product.compute_bound().stateful() {
            OpsKind::Tracked(node) => node.finish((weight, source), out),
            OpsKind::UnTracked(node) => node.finish(out),
        }
    }
}

/// The backward step.
#[derive(Debug)]
struct Product;

impl<B: Routed> Backward<B, 1> for Product {
    type State = (FloatTensor<B>, Source);

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let grad = gradients.consume::<B>(&ops.node);
        let [Some(parent)] = ops.parents else { return };
        let (weight, source) = ops.state;
        let weight = source.dense::<B>(weight, grad.dtype().into());
        let dx = B::float_matmul(grad, B::float_transpose(weight));
        gradients.register::<B>(parent.id, dx);
    }
}
