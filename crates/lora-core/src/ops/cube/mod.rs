//! What own kernels on GPUs share: tensors in and out, and how many units run.
//!
//! A kernel is Rust that cubecl compiles for the device while the program runs. A [`Composition`](super::Composition) whose
//! passes launch kernels is an operation like any other. Kernels read through views, which know strides and broadcast
//! dimensions, so that nothing is copied first. Their indices are checked, which is what makes a launch safe.
//!
//! For the same bits in every run one unit computes an element, sums have a fixed order, nothing is added atomically, and
//! nothing is chosen by its time.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Cube, DispatchDevice, DispatchTensor};
use burn::tensor::{DType, Shape, Tensor};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::{CubeCount, CubeDim};

pub(super) mod matmul;
mod units;

pub use units::{largest_of_units, sum_of_units};

use super::composition::routed::Routed;

/// Launches a kernel that is generic over the type of what it reads and writes: `launch_as!(dtype, kernel, arguments)`.
#[macro_export]
macro_rules! launch_as {
    ($dtype:expr, $kernel:ident, $($argument:expr),+ $(,)?) => {
        match $dtype {
            ::burn::tensor::DType::BF16 => $kernel::launch::<::burn::tensor::bf16>($($argument),+),
            _ => $kernel::launch::<f32>($($argument),+),
        }
    };
}

/// A tensor on a GPU.
pub type CubeTensor = FloatTensor<Cube>;

/// Units that share a row. It is part of what the bits of a sum depend on.
pub const UNITS: usize = 256;

/// Cubes that every device takes along an axis.
pub const CUBES: usize = 65535;

/// Whether kernels take `x`: on a GPU, in f32 or bf16, not empty, with elements that four bytes count.
pub fn has_kernels<const D: usize>(x: &Tensor<D>) -> bool {
    matches!(x.dtype(), DType::F32 | DType::BF16) && is_counted(x)
}

/// The same of f32 alone.
pub fn has_f32_kernels<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_counted(x)
}

/// The same of any type.
pub(super) fn is_counted<const D: usize>(x: &Tensor<D>) -> bool {
    matches!(x.device().inner().as_dispatch(), DispatchDevice::Cube(_))
        && (1..u32::MAX as usize).contains(&x.shape().num_elements())
        && !super::COMPOSED.get()
}

/// The same of kernels [by row](by_row).
pub fn has_row_kernels(x: &Tensor<3>) -> bool {
    let [batch, tokens, _] = x.dims();
    has_kernels(x) && batch.max(tokens) <= CUBES
}

/// What kernels read.
pub fn tensor(x: DispatchTensor) -> CubeTensor {
    Cube::of(x)
}

/// What Burn's operations read.
pub fn dispatch(x: CubeTensor) -> DispatchTensor {
    Cube::to(x)
}

/// A tensor for a kernel to write, where `x` is and of its type.
pub fn empty(shape: impl Into<Shape>, x: &CubeTensor) -> CubeTensor {
    empty_as(x.dtype, shape, x)
}

/// The same of another type.
pub fn empty_as(dtype: DType, shape: impl Into<Shape>, x: &CubeTensor) -> CubeTensor {
    let shape = shape.into();
    let memory = x.client.empty(shape.num_elements() * dtype.size());
    CubeTensor::new_contiguous(x.client.clone(), x.device.clone(), shape, memory, dtype)
}

/// The same in the shape of `x`.
pub fn empty_like(x: &CubeTensor) -> CubeTensor {
    empty(x.meta.shape().clone(), x)
}

/// A unit for each element of `y` at least.
pub fn by_element(y: &CubeTensor) -> (CubeCount, CubeDim) {
    let elements = y.meta.shape().num_elements();
    let units = CubeDim::new(&y.client, elements);
    let cubes = calculate_cube_count_elemwise(&y.client, elements, units);
    (cubes, units)
}

/// A cube for each row of `y`, which is `[batch, tokens, width]`: `CUBE_POS` is the row, `CUBE_POS_Y` the sample.
pub fn by_row(y: &CubeTensor) -> (CubeCount, CubeDim) {
    let shape = y.meta.shape();
    let cubes = CubeCount::new_2d(shape[1] as u32, shape[0] as u32);
    (cubes, CubeDim::new_1d(UNITS as u32))
}
