//! SiLU, alone and as the gate of an MLP.
//!
//! ```text
//! silu(x) = x s,   s = 1 / (1 + e^-x)        silu'(x) = s + x s (1 - s)
//! swiglu(x) = silu(a) b, where a and b are the halves of x
//! ```
//!
//! Kept for the backward pass: `x`.
//!
//! Source: Elfwing et al. 2017, arXiv:1702.03118; Shazeer 2020, arXiv:2002.05202; diffusers `Flux2SwiGLU`.

use burn::tensor::Tensor;

use crate::layers::in_f32;

/// `x * sigmoid(x)`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if lora_core::ops::has_kernels(&x) {
        return lora_core::ops::apply::<_, 1, D>(cpu::Silu, vec![x.into_dispatch()]);
    }
    in_f32(x, burn::tensor::activation::silu)
}

/// `silu(first half) * second half` of the last dimension.
///
/// # Shapes
/// - `x`: `[batch, tokens, 2 n]`; returns `[batch, tokens, n]`
pub fn swiglu(x: Tensor<3>) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    #[cfg(feature = "flex")]
    if lora_core::ops::has_kernels(&x) && x.shape().num_elements() > 0 && x.dims()[2] == 2 * half {
        return lora_core::ops::apply::<_, 1, 3>(cpu::Swiglu, vec![x.into_dispatch()]);
    }
    #[cfg(feature = "cube")]
    if lora_core::ops::cube::has_row_kernels(&x) && x.dims()[2] == 2 * half {
        return lora_core::ops::compose::<_, 1, 3>(cube::Swiglu, vec![x.into_dispatch()]);
    }
    let gate = x.clone().narrow(2, 0, half);
    in_f32(gate, burn::tensor::activation::silu) * x.narrow(2, half, half)
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use lora_core::ops::Operation;
    use lora_core::ops::kernel::{ROWS, dims, exp, packed, simd, tensor, values};
    use rayon::prelude::*;

    use crate::ops::activation::{self, Activation};

    #[derive(Debug, Clone)]
    pub struct Silu;

    impl Activation for Silu {
        #[inline(always)]
        fn gate(x: f32) -> f32 {
            1.0 / (1.0 + exp(-x))
        }

        #[inline(always)]
        fn derivative(x: f32) -> f32 {
            let gate = Self::gate(x);
            (x * (1.0 - gate)).mul_add(gate, gate)
        }
    }

    impl Operation<1> for Silu {
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
    pub struct Swiglu;

    impl Operation<1> for Swiglu {
        type Saved = FlexTensor;

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, FlexTensor) {
            let [x] = <[_; 1]>::try_from(inputs).expect("one input").map(packed);
            let [batch, tokens, width] = dims(&x);
            let half = width / 2;
            let mut y = vec![0f32; batch * tokens * half];
            let tasks = y
                .par_chunks_mut(ROWS * half)
                .zip(values(&x).par_chunks(ROWS * width));
            tasks.for_each(|(y, x)| {
                simd(
                    #[inline(always)]
                    || {
                        for (y, x) in y.chunks_exact_mut(half).zip(x.chunks_exact(width)) {
                            let (a, b) = x.split_at(half);
                            for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                                *y = a * Silu::gate(a) * b;
                            }
                        }
                    },
                )
            });
            (tensor(y, [batch, tokens, half]), x)
        }

        fn backward(
            &self,
            x: FlexTensor,
            grad: FlexTensor,
            _: [bool; 1],
        ) -> [Option<FlexTensor>; 1] {
            let grad = packed(grad);
            let width = dims::<3>(&x)[2];
            let half = width / 2;
            let mut dx = vec![0f32; values(&x).len()];
            let tasks = dx
                .par_chunks_mut(ROWS * width)
                .zip(values(&x).par_chunks(ROWS * width))
                .zip(values(&grad).par_chunks(ROWS * half));
            tasks.for_each(|((dx, x), grad)| {
                simd(
                    #[inline(always)]
                    || {
                        let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
                        for ((dx, x), grad) in rows.zip(grad.chunks_exact(half)) {
                            let ((a, b), (da, db)) = (x.split_at(half), dx.split_at_mut(half));
                            let inputs = a.iter().zip(b).zip(grad);
                            for (((&a, &b), &grad), (da, db)) in inputs.zip(da.iter_mut().zip(db)) {
                                let gate = Silu::gate(a);
                                *db = grad * (a * gate);
                                *da = grad * b * (a * (1.0 - gate)).mul_add(gate, gate);
                            }
                        }
                    },
                )
            });
            [Some(tensor(dx, x.layout().shape().clone()))]
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
    use lora_core::ops::cube::{CubeTensor, by_row, dispatch, empty, empty_like, tensor};

    #[derive(Debug, Clone)]
    pub struct Swiglu;

    impl Composition<1> for Swiglu {
        type Saved = CubeTensor;

        fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, CubeTensor) {
            let [x] = <[_; 1]>::try_from(inputs).expect("one input").map(tensor);
            let shape = x.meta.shape();
            let [batch, tokens, half] = [shape[0], shape[1], shape[2] / 2];
            let y = empty([batch, tokens, half], &x);
            let (cubes, units) = by_row(&y);
            launch_as!(
                y.dtype,
                swiglu,
                &y.client,
                cubes,
                units,
                x.clone().into_linear_view(),
                y.clone().into_linear_view(),
                half,
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
            let (cubes, units) = by_row(&dx);
            launch_as!(
                dx.dtype,
                swiglu_backward,
                &dx.client,
                cubes,
                units,
                x.into_linear_view(),
                tensor(grad).into_linear_view(),
                dx.clone().into_linear_view(),
                dx.meta.shape()[2] / 2,
            );
            [Some(dispatch(dx))]
        }
    }

    /// `s`.
    #[cube]
    fn gate(x: f32) -> f32 {
        1.0f32 / (f32::exp(-x) + 1.0)
    }

    #[cube(launch)]
    fn swiglu<E: Float>(x: LinearView<'_, E>, mut y: LinearViewMut<'_, E>, half: usize) {
        let row = CUBE_POS * half;
        for j in range_stepped(UNIT_POS as usize, half, CUBE_DIM as usize) {
            let a = f32::cast_from(x.read(2 * row + j));
            let b = f32::cast_from(x.read(2 * row + half + j));
            y.write(row + j, E::cast_from(a * gate(a) * b));
        }
    }

    #[cube(launch)]
    fn swiglu_backward<E: Float>(
        x: LinearView<'_, E>,
        grad: LinearView<'_, E>,
        mut dx: LinearViewMut<'_, E>,
        half: usize,
    ) {
        let row = CUBE_POS * half;
        for j in range_stepped(UNIT_POS as usize, half, CUBE_DIM as usize) {
            let a = f32::cast_from(x.read(2 * row + j));
            let b = f32::cast_from(x.read(2 * row + half + j));
            let g = f32::cast_from(grad.read(row + j));
            let s = gate(a);
            let of_gate = s + a * s * (1.0f32 - s);
            dx.write(2 * row + j, E::cast_from(g * b * of_gate));
            dx.write(2 * row + half + j, E::cast_from(g * (a * s)));
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::{silu, swiglu};
    use lora_core::ops::check::{agree, random};

    #[test]
    fn silu_agrees_with_its_composition() {
        for shape in [[1, 1], [3, 17], [5, 8193]] {
            agree([random(shape)], |[x]| silu(x));
        }
    }

    #[test]
    fn a_gated_activation_agrees_with_its_composition() {
        for shape in [[1, 1, 2], [2, 7, 34], [1, 33, 514]] {
            agree([random(shape)], |[x]| swiglu(x));
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_a_gated_activation_agrees_with_its_composition() {
        use lora_core::ops::check::agree_on_wgpu;

        for shape in [[1, 1, 2], [2, 7, 34], [1, 33, 514]] {
            agree_on_wgpu([random(shape)], |[x]| swiglu(x));
            agree_on_wgpu([random(shape)], |[x]| swiglu(x.swap_dims(0, 1)));
        }
    }
}
