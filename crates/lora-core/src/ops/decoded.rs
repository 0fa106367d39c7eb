//! `x W` with a `W` that is kept in less than what it is computed in, where there are no kernels for it.
//!
//! Composed of Burn's operations, the product keeps the matrix that it was computed with until its backward pass: a dense
//! copy of each weight of a block. Here the graph has one node that keeps the weight as it is. In the forward pass and again
//! in the backward pass, `dx = g Wᵀ`, the weight is cast, or decoded from its codes, on the device. A weight that is trained
//! is left to Burn, which gives it its gradient.

use std::sync::Arc;

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Tensor};

use super::codes::Codes;
use super::composition::{Composition, compose};
use super::matmul::{by_rows, matmul};

/// A frozen weight, without autodiff.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "one is made for each call, and a tensor is what it mostly is"
)]
pub(super) enum Kept {
    /// `[in, out]`.
    Dense(Tensor<2>),
    Codes(Arc<Codes>),
}

impl Kept {
    /// `[in, out]`.
    fn to(&self, dtype: DType) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.clone().cast(dtype),
            Self::Codes(codes) => codes.dense().cast(dtype),
        }
    }
}

/// `x W` in the type of `x`.
pub(super) fn times<const D: usize>(x: Tensor<D>, weight: Kept) -> Tensor<D> {
    by_rows(x, |x| {
        compose::<_, 1, 2>(Product(weight), vec![x.into_dispatch()])
    })
}

/// `x W` of `x`, `[rows, in]`.
#[derive(Debug, Clone)]
struct Product(Kept);

impl Composition<1> for Product {
    type Saved = ();

    fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, ()) {
        let [x] = <[_; 1]>::try_from(inputs).expect("one input");
        let x = Tensor::<2>::from_dispatch(x);
        let weight = self.0.to(x.dtype());
        (matmul(x, weight).into_dispatch(), ())
    }

    fn backward(&self, (): (), grad: DispatchTensor, _: [bool; 1]) -> [Option<DispatchTensor>; 1] {
        let grad = Tensor::<2>::from_dispatch(grad);
        let weight = self.0.to(grad.dtype());
        [Some(matmul(grad, weight.transpose()).into_dispatch())]
    }
}
