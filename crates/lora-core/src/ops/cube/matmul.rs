//! `a b` on the tensor cores of a GPU, in bf16, and in f32 to nearly all of its bits.
//!
//! Burn without autotune has one kernel for all products; it rounds f32 to TF32, eleven bits of 24, and gets a fraction of what a
//! card can do. Which kernel it is here depends on types and shapes alone: the bits are those of every run on such a card.
//!
//! A number in f32 is taken apart into the eleven bits that TF32 has, `h`, and what is left, `l`. With `a = h + l` and `b = h' + l'`,
//!
//! ```text
//! a b = [h h l] [h' l' h']ᵀ + l l'
//! ```
//!
//! of which the last term is left out, some 2⁻²² of the product: one product in TF32, summed in f32, that is three times as long.
//! The gradients are `da = g bᵀ` and `db = aᵀ g`.
//!
//! Source: Ootomo & Yokota 2022, arXiv:2203.03341.

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Tensor};
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems, MatmulSetupError};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::std::InputBinding;
use half::bf16;

use super::{CubeTensor, by_element, dispatch, empty, is_counted, tensor};
use crate::ops::Composition;

/// What the bulk copies of a card ask of the distance between rows.
const ALIGNMENT: usize = 16;

/// `a b` of tensors that are [taken](takes).
#[derive(Debug, Clone)]
pub(crate) struct Matmul<const D: usize> {
    /// Whether `a` gets a gradient, whether `b` does.
    pub(crate) wanted: [bool; 2],
}

/// Whether products of these two are made here: both in f32 or bf16 on a card with tensor cores that know TF32, and as many
/// matrices in one as in the other.
pub(crate) fn takes<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> bool {
    let is_known = matches!(a.dtype(), DType::F32 | DType::BF16) && a.dtype() == b.dtype();
    let alike = D > 1 && a.dims()[..D - 2] == b.dims()[..D - 2];
    is_known && alike && is_counted(a) && is_counted(b) && has_tf32(a)
}

fn has_tf32<const D: usize>(x: &Tensor<D>) -> bool {
    let x = tensor(x.clone().inner().into_dispatch());
    x.client
        .properties()
        .supports_type(tf32::elem_type_native())
}

impl<const D: usize> Composition<2> for Matmul<D> {
    /// `b` and `a`, for the gradient of the other.
    type Saved = [Option<DispatchTensor>; 2];

    fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, Self::Saved) {
        let [a, b] = <[_; 2]>::try_from(inputs).expect("two inputs");
        let [of_a, of_b] = self.wanted;
        let saved = [of_a.then(|| b.clone()), of_b.then(|| a.clone())];
        (product(a, b), saved)
    }

    fn backward(
        &self,
        [b, a]: Self::Saved,
        grad: DispatchTensor,
        [want_a, want_b]: [bool; 2],
    ) -> [Option<DispatchTensor>; 2] {
        let turned = |x| Tensor::<D>::from_dispatch(x).transpose().into_dispatch();
        [
            b.filter(|_| want_a)
                .map(|b| product(grad.clone(), turned(b))),
            a.filter(|_| want_b).map(|a| product(turned(a), grad)),
        ]
    }
}

fn product(a: DispatchTensor, b: DispatchTensor) -> DispatchTensor {
    let [mut a, mut b] = [a, b].map(tensor);
    let mut shape = a.meta.shape().clone();
    let last = shape.num_dims() - 1;
    let (inner, columns) = (shape[last], b.meta.shape()[last]);
    shape[last] = columns;
    let y = empty(shape, &a);
    if a.dtype == DType::F32 {
        a = split(a, last, inner, true);
        b = split(b, last - 1, inner * columns, false);
    }
    let mut kernels = vec![
        Strategy::SimpleCyclicMma(Default::default()),
        Strategy::Naive,
    ];
    if is_aligned(&a) && is_aligned(&b) {
        kernels.insert(0, Strategy::SpecializedTmaMma(Default::default()));
    }
    let mut problems = Vec::new();
    for kernel in kernels {
        match launch(kernel, &a, &b, &y) {
            Ok(()) => return dispatch(y),
            Err(problem) => problems.push(problem),
        }
    }
    unreachable!("there is a kernel for every product: {problems:?}")
}

/// Whether rows, or columns where those are what lies together, begin at multiples of [`ALIGNMENT`].
fn is_aligned(x: &CubeTensor) -> bool {
    let bytes = |stride: &usize| stride * x.dtype.size();
    let mut far = x.meta.strides().iter().filter(|stride| **stride != 1);
    far.all(|stride| bytes(stride).is_multiple_of(ALIGNMENT))
}

fn launch(
    kernel: Strategy,
    a: &CubeTensor,
    b: &CubeTensor,
    y: &CubeTensor,
) -> Result<(), MatmulSetupError> {
    let element = match a.dtype {
        DType::BF16 => bf16::elem_type_native(),
        _ => f32::elem_type_native(),
    };
    let mut elements = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: element,
        rhs: element,
        out: element,
    });
    let input = |x: &CubeTensor| InputBinding::new(x.clone().binding(), element);
    let y = y.clone().binding();
    launch_ref(
        &kernel.into(),
        &a.client,
        input(a),
        input(b),
        y,
        &mut elements,
    )
}

/// Three times as long in dimension `along`, `length` of whose elements follow each other: `h h l` of a left factor, `h l h` of a
/// right one.
fn split(x: CubeTensor, along: usize, length: usize, is_left: bool) -> CubeTensor {
    let mut shape = x.meta.shape().clone();
    shape[along] *= 3;
    let y = empty(shape, &x);
    let (cubes, units) = by_element(&x);
    split_f32::launch(
        &y.client,
        cubes,
        units,
        x.into_linear_view(),
        y.clone().into_linear_view(),
        length,
        is_left,
    );
    y
}

#[cube(launch)]
fn split_f32(
    x: LinearView<'_, f32>,
    mut y: LinearViewMut<'_, f32>,
    length: usize,
    #[comptime] is_left: bool,
) {
    if x.is_in_bounds(ABSOLUTE_POS) {
        let value = x.read(ABSOLUTE_POS);
        let high = f32::reinterpret(u32::reinterpret(value) & 0xffff_e000u32);
        let low = value - high;
        let at = ABSOLUTE_POS / length * 2 * length + ABSOLUTE_POS;
        y.write(at, high);
        if is_left {
            y.write(at + length, high);
            y.write(at + 2 * length, low);
        } else {
            y.write(at + length, low);
            y.write(at + 2 * length, high);
        }
    }
}

#[cfg(all(test, feature = "wgpu", feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{random, wgpu};

    fn values(x: CubeTensor) -> Vec<f32> {
        let x = Tensor::<2>::from_dispatch(dispatch(x));
        x.into_data().try_to_vec().expect("f32")
    }

    #[test]
    fn a_number_is_taken_apart_without_loss_and_its_high_part_is_tf32() {
        let [rows, columns] = [5, 7];
        let x = random([columns, rows]).inner().to_device(&wgpu().inner());
        let x = x.transpose(); // as a weight in the backward pass
        let all: Vec<f32> = x.clone().into_data().try_to_vec().expect("f32");
        let of = |is_left| {
            let x = tensor(x.clone().into_dispatch());
            values(match is_left {
                true => split(x, 1, columns, true),
                false => split(x, 0, rows * columns, false),
            })
        };
        let (left, right) = (of(true), of(false));
        for (row, column) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
            let value = all[row * columns + column];
            let in_left = |part| left[(row * 3 + part) * columns + column];
            let in_right = |part| right[(part * rows + row) * columns + column];
            let (high, low) = (in_left(0), in_left(2));
            assert_eq!(high + low, value);
            assert_eq!(high.to_bits() & 0x1fff, 0);
            assert!(low.abs() <= value.abs() / 1024.0);
            assert_eq!([in_left(1), in_right(0), in_right(2)], [high; 3]);
            assert_eq!(in_right(1), low);
        }
    }
}
