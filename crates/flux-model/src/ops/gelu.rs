//! GELU by its tanh approximation, alone and as the second part of a concatenation.
//!
//! ```text
//! gelu(x) = x s,   s = (1 + tanh u) / 2 = 1 / (1 + e^(-2u)),   u = sqrt(2/π) (x + 0.044715 x³)
//! gelu'(x) = s + 2 x s (1 - s) u',   u' = sqrt(2/π) (1 + 3 * 0.044715 x²)
//! ```
//!
//! The second form of `s` needs one exponential and cancels nothing where `tanh u` is near -1. Kept for the backward pass:
//! `x`.
//!
//! Source: Hendrycks & Gimpel 2016, arXiv:1606.08415; torch `gelu(approximate="tanh")`.

use burn::tensor::Tensor;
use burn::tensor::activation::gelu_approximate;

use crate::layers::in_f32;

/// `gelu(x)`.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if lora_core::ops::has_kernels(&x) {
        return lora_core::ops::apply::<_, 1, D>(cpu::Gelu, vec![x.into_dispatch()]);
    }
    gelu(x)
}

/// `cat(first, gelu(x))` over the last dimension: the input of a single-stream block's projection.
///
/// # Shapes
/// - `first`: `[batch, tokens, m]`, `x`: `[batch, tokens, n]`; returns `[batch, tokens, m + n]`
pub fn cat_gelu_tanh(first: Tensor<3>, x: Tensor<3>) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if lora_core::ops::has_kernels(&x) && x.shape().num_elements() > 0 {
        let inputs = vec![first.into_dispatch(), x.into_dispatch()];
        return lora_core::ops::apply::<_, 2, 3>(cpu::CatGelu, inputs);
    }
    Tensor::cat(vec![first, gelu(x)], 2)
}

/// `gelu(x)` computed in f32, where the CPU's kernels are not the way.
fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cube")]
    if lora_core::ops::cube::has_kernels(&x) {
        return lora_core::ops::compose::<_, 1, D>(cube::Gelu, vec![x.into_dispatch()]);
    }
    in_f32(x, gelu_approximate)
}

/// `2 sqrt(2/π)`.
#[cfg(any(feature = "flex", feature = "cube"))]
const A: f32 = 1.595_769;
#[cfg(any(feature = "flex", feature = "cube"))]
const B: f32 = 0.044_715;

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use lora_core::ops::Operation;
    use lora_core::ops::kernel::{ROWS, dims, exp, narrow_last, packed, simd, tensor, values};
    use rayon::prelude::*;

    use super::{A, B};
    use crate::ops::activation::{self, Activation};

    #[derive(Debug, Clone)]
    pub struct Gelu;

    impl Activation for Gelu {
        #[inline(always)]
        fn gate(x: f32) -> f32 {
            1.0 / (1.0 + exp(-A * x * (x * x).mul_add(B, 1.0)))
        }

        #[inline(always)]
        fn derivative(x: f32) -> f32 {
            let gate = Self::gate(x);
            let slope = A * (x * x).mul_add(3.0 * B, 1.0);
            (x * slope * (1.0 - gate)).mul_add(gate, gate)
        }
    }

    impl Operation<1> for Gelu {
        type Saved = FlexTensor;

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, FlexTensor) {
            activation::forward::<Self>(inputs)
        }

        fn backward(
            &self,
            x: FlexTensor,
            grad: FlexTensor,
            _: [bool; 1],
        ) -> [Option<FlexTensor>; 1] {
            [Some(activation::backward::<Self>(&x, grad))]
        }
    }

    #[derive(Debug, Clone)]
    pub struct CatGelu;

    impl Operation<2> for CatGelu {
        type Saved = (FlexTensor, usize);

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Self::Saved) {
            let [first, x] = <[_; 2]>::try_from(inputs).expect("two inputs").map(packed);
            let ([batch, tokens, m], [_, _, n]) = (dims(&first), dims(&x));
            let mut y = vec![0f32; batch * tokens * (m + n)];
            let tasks = y.par_chunks_mut(ROWS * (m + n)).enumerate();
            let (firsts, xs) = (values(&first), values(&x));
            tasks.for_each(|(task, y)| {
                simd(
                    #[inline(always)]
                    || {
                        for (i, y) in y.chunks_exact_mut(m + n).enumerate() {
                            let row = task * ROWS + i;
                            let (first, y) = y.split_at_mut(m);
                            first.copy_from_slice(&firsts[row * m..][..m]);
                            for (y, &x) in y.iter_mut().zip(&xs[row * n..][..n]) {
                                *y = x * Gelu::gate(x);
                            }
                        }
                    },
                )
            });
            (tensor(y, [batch, tokens, m + n]), (x, m))
        }

        fn backward(
            &self,
            (x, m): Self::Saved,
            grad: FlexTensor,
            [want_first, want_x]: [bool; 2],
        ) -> [Option<FlexTensor>; 2] {
            let grad = packed(grad);
            let [_, _, n] = dims(&x);
            let dx = want_x.then(|| {
                let mut dx = vec![0f32; values(&x).len()];
                let (xs, grads) = (values(&x), values(&grad));
                let tasks = dx.par_chunks_mut(ROWS * n).enumerate();
                tasks.for_each(|(task, dx)| {
                    simd(
                        #[inline(always)]
                        || {
                            for (i, dx) in dx.chunks_exact_mut(n).enumerate() {
                                let row = task * ROWS + i;
                                let grad = &grads[row * (m + n) + m..][..n];
                                let x = &xs[row * n..][..n];
                                for ((dx, &x), &grad) in dx.iter_mut().zip(x).zip(grad) {
                                    *dx = grad * Gelu::derivative(x);
                                }
                            }
                        },
                    )
                });
                tensor(dx, x.layout().shape().clone())
            });
            [want_first.then(|| narrow_last(&grad, 0, m)), dx]
        }
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn::backend::DispatchTensor;
    use cubecl::prelude::*;
    use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};
    use lora_core::launch_as;
    use lora_core::ops::Composition;
    use lora_core::ops::cube::{CubeTensor, by_element, dispatch, empty_like, tensor};

    use super::{A, B};

    const THREE_B: f32 = 3.0 * B;

    #[derive(Debug, Clone)]
    pub struct Gelu;

    impl Composition<1> for Gelu {
        type Saved = CubeTensor;

        fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, CubeTensor) {
            let [x] = <[_; 1]>::try_from(inputs).expect("one input").map(tensor);
            let y = empty_like(&x);
            let (cubes, units) = by_element(&y);
            launch_as!(
                y.dtype,
                gelu,
                &y.client,
                cubes,
                units,
                x.clone().into_linear_view(),
                y.clone().into_linear_view(),
            );
            (dispatch(y), x)
        }

        fn backward(
            &self,
            x: CubeTensor,
            grad: DispatchTensor,
            _: [bool; 1],
        ) -> [Option<DispatchTensor>; 1] {
            let dx = empty_like(&x);
            let (cubes, units) = by_element(&dx);
            launch_as!(
                dx.dtype,
                gelu_backward,
                &dx.client,
                cubes,
                units,
                x.into_linear_view(),
                tensor(grad).into_linear_view(),
                dx.clone().into_linear_view(),
            );
            [Some(dispatch(dx))]
        }
    }

    /// `s`.
    #[cube]
    fn gate(x: f32) -> f32 {
        1.0f32 / (f32::exp(-(A * x * (x * x * B + 1.0))) + 1.0)
    }

    #[cube(launch)]
    fn gelu<E: Float>(x: LinearView<'_, E>, mut y: LinearViewMut<'_, E>) {
        if y.is_in_bounds(ABSOLUTE_POS) {
            let x = f32::cast_from(x.read(ABSOLUTE_POS));
            y.write(ABSOLUTE_POS, E::cast_from(x * gate(x)));
        }
    }

    #[cube(launch)]
    fn gelu_backward<E: Float>(
        x: LinearView<'_, E>,
        grad: LinearView<'_, E>,
        mut dx: LinearViewMut<'_, E>,
    ) {
        if dx.is_in_bounds(ABSOLUTE_POS) {
            let x = f32::cast_from(x.read(ABSOLUTE_POS));
            let s = gate(x);
            let slope = A * (x * x * THREE_B + 1.0);
            let derivative = s + x * slope * s * (1.0f32 - s);
            let grad = f32::cast_from(grad.read(ABSOLUTE_POS));
            dx.write(ABSOLUTE_POS, E::cast_from(grad * derivative));
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use lora_core::ops::check::{agree, random};

    #[test]
    fn gelu_agrees_with_its_composition() {
        for shape in [[1, 1], [3, 17], [5, 8193], [131, 257]] {
            agree([random(shape)], |[x]| gelu_tanh(x));
        }
    }

    #[test]
    fn gelu_of_large_numbers_is_finite() {
        let device = burn::tensor::Device::flex();
        let x = [-1e30, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e30];
        let y: Vec<f32> = gelu_tanh(Tensor::<1>::from_floats(x, &device))
            .into_data()
            .try_to_vec()
            .expect("f32");
        assert_eq!(y[5..], [20.0, 100.0, 1e30]);
        assert!(y[..5].iter().all(|y| y.abs() < 1e-6), "{y:?}");
    }

    #[test]
    fn a_concatenation_agrees_with_its_composition() {
        for [tokens, m, n] in [[1, 1, 1], [7, 3, 17], [33, 96, 257]] {
            agree(
                [random([2, tokens, m]), random([2, tokens, n])],
                |[first, x]| cat_gelu_tanh(first, x),
            );
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_it_agrees_with_its_composition() {
        use lora_core::ops::check::agree_on_wgpu;

        for shape in [[1, 1], [3, 17], [5, 8193], [131, 257]] {
            agree_on_wgpu([random(shape)], |[x]| gelu_tanh(x));
        }
        agree_on_wgpu([random([33, 14])], |[x]| gelu_tanh(x.transpose()));
        let inputs = [random([2, 7, 3]), random([2, 7, 17])];
        agree_on_wgpu(inputs, |[first, x]| cat_gelu_tanh(first, x));
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_gelu_of_large_numbers_is_finite() {
        let device = lora_core::ops::check::wgpu();
        let x = Tensor::<1>::from_floats([-1e30, -100.0, -20.0, 20.0, 100.0, 1e30], &device);
        let y = gelu_tanh(x.clone()).into_data();
        let y: Vec<f32> = y.try_to_vec().expect("f32");
        assert_eq!(y[3..], [20.0, 100.0, 1e30]);
        assert!(y[..3].iter().all(|y| y.abs() < 1e-6), "{y:?}");
        let x = x.narrow(0, 1, 4).detach().require_grad();
        let gradients = gelu_tanh(x.clone()).sum().backward();
        let dx = x.grad(&gradients).expect("a gradient").into_data();
        let dx: Vec<f32> = dx.try_to_vec().expect("f32");
        assert!(dx[..2].iter().all(|dx| dx.abs() < 1e-6), "{dx:?}");
        assert_eq!(dx[2..], [1.0, 1.0]);
    }
}
