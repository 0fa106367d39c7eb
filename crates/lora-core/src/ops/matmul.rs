//! Products of matrices: Burn's, and on GPUs those of the kernel in `ops::cube`.

use burn::tensor::Tensor;
use burn::tensor::module::linear as burn_linear;

#[cfg(feature = "cube")]
use super::composition::compose;
#[cfg(feature = "cube")]
use super::cube;

/// `a b` of the matrices in the last two dimensions, as Burn has it; on a GPU by a kernel that is chosen here where
/// both have as many matrices.
pub fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cube")]
    if cube::matmul::takes(&a, &b) {
        let operation = cube::matmul::Matmul::<D> {
            wanted: [a.is_tracked(), b.is_tracked()],
        };
        return compose::<_, 2, D>(operation, vec![a.into_dispatch(), b.into_dispatch()]);
    }
    a.matmul(b)
}

pub(super) fn plus<const D: usize>(product: Tensor<D>, bias: Option<Tensor<1>>) -> Tensor<D> {
    match bias {
        Some(bias) => product + bias.unsqueeze(),
        None => product,
    }
}

/// `f` of `[rows, in]`, for `x` of `[..., in]`; returns `[..., out]`.
pub(super) fn by_rows<const D: usize>(
    x: Tensor<D>,
    f: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<D> {
    let mut shape = x.dims();
    let rows = shape[..D - 1].iter().product::<usize>();
    let y = f(x.reshape([rows, shape[D - 1]]));
    shape[D - 1] = y.dims()[1];
    y.reshape(shape)
}

/// `x W + b` of a `W` of the type of `x`, as Burn has it, with [`matmul`] on a GPU.
pub(crate) fn times<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    #[cfg(feature = "cube")]
    if cube::is_counted(&x) {
        return plus(by_rows(x, |x| matmul(x, weight)), bias);
    }
    burn_linear(x, weight, bias)
}
