//! What the update rules have in common: interpolation, and reading back what they keep.

use burn::optim::StateSource;
use burn::tensor::{Device, Tensor};
use burn_pack::Scalar;

/// Row by row.
pub(super) fn flattened<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let n = tensor.shape().num_elements();
    tensor.reshape([n])
}

/// `from + weight * (to - from)`, counted from the nearer end as torch's `lerp` does.
pub(super) fn lerp<const D: usize>(from: Tensor<D>, to: Tensor<D>, weight: f64) -> Tensor<D> {
    let way = to.clone() - from.clone();
    match weight.abs() < 0.5 {
        true => from + way * weight,
        false => to - way * (1.0 - weight),
    }
}

/// A number of a stored state.
pub(super) fn number<T: TryFrom<Scalar>>(
    from: &mut StateSource,
    prefix: &str,
    name: &str,
) -> Option<T> {
    T::try_from(from.take_scalar(prefix, name)?).ok()
}

/// A tensor of a stored state.
pub(super) fn restored<const D: usize>(
    from: &mut StateSource,
    prefix: &str,
    name: &str,
    device: &Device,
) -> Option<Tensor<D>> {
    let data = from.take_tensor(prefix, name)?;
    Some(Tensor::from_data(data, device))
}
