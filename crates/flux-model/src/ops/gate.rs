//! `y = x + gate * z`, with one gate for all tokens of a sample.
//!
//! With the gradient `g` of `y`: `dx = g`, `dz = gate * g`, `dgate` the sum over the tokens of `g z`. Kept for the backward
//! pass: `gate`, and `z` where the gate gets a gradient.

use burn::nn::Linear;
use burn::tensor::Tensor;
use lora_core::{last_linear, linear};

/// `x + gate * linear(z)`, with which a block ends.
///
/// # Shapes
/// - `x`: `[batch, tokens, width]`; `gate`: `[batch, 1, width]`; `z`: `[batch, tokens, in]`
pub fn gated_end(x: Tensor<3>, gate: Tensor<3>, layer: &Linear, z: Tensor<3>) -> Tensor<3> {
    let z = match gate.is_tracked() {
        true => linear(layer, z), // the gradient of the gate reads it
        false => last_linear(layer, z),
    };
    gated_residual(x, gate, z)
}

/// `x + gate * z`.
///
/// # Shapes
/// - `x`, `z`: `[batch, tokens, width]`; `gate`: `[batch, 1, width]`
pub fn gated_residual(x: Tensor<3>, gate: Tensor<3>, z: Tensor<3>) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if lora_core::ops::has_kernels(&x) && x.shape().num_elements() > 0 {
        let [batch, _, width] = x.dims();
        if z.dims() == x.dims() && gate.dims() == [batch, 1, width] {
            let operation = cpu::GatedResidual {
                of_gate: gate.is_tracked(),
            };
            let inputs = vec![x.into_dispatch(), gate.into_dispatch(), z.into_dispatch()];
            return lora_core::ops::apply::<_, 3, 3>(operation, inputs);
        }
    }
    #[cfg(feature = "cube")]
    if cube::takes(&x, &gate, &z) {
        let operation = cube::GatedResidual {
            of_gate: gate.is_tracked(),
        };
        let inputs = [x, gate, z].map(Tensor::into_dispatch);
        return lora_core::ops::compose::<_, 3, 3>(operation, inputs.into());
    }
    let gate = gate.cast(z.dtype());
    x + gate * z
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use lora_core::ops::Operation;
    use lora_core::ops::kernel::{ROWS, dims, packed, simd, tensor, values};
    use rayon::prelude::*;

    /// Elements that are not worth a second thread.
    const ALONE: usize = 1 << 19;

    #[derive(Debug, Clone)]
    pub struct GatedResidual {
        /// Whether the gate gets a gradient.
        pub of_gate: bool,
    }

    impl Operation<3> for GatedResidual {
        type Saved = (FlexTensor, Option<FlexTensor>);

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Self::Saved) {
            let [x, gate, z] = <[_; 3]>::try_from(inputs)
                .expect("three inputs")
                .map(packed);
            let [_, tokens, width] = dims(&x);
            let mut y = vec![0f32; values(&x).len()];
            let sample = tokens * width;
            let samples = values(&x).chunks(sample).zip(values(&z).chunks(sample));
            let gates = values(&gate).chunks(width);
            for (((x, z), y), gate) in samples.zip(y.chunks_mut(sample)).zip(gates) {
                let tasks = y
                    .par_chunks_mut(ROWS * width)
                    .zip(x.par_chunks(ROWS * width))
                    .zip(z.par_chunks(ROWS * width))
                    .with_min_len(tasks_alone(width));
                tasks.for_each(|((y, x), z)| {
                    simd(
                        #[inline(always)]
                        || {
                            let rows = y
                                .chunks_exact_mut(width)
                                .zip(x.chunks_exact(width))
                                .zip(z.chunks_exact(width));
                            for ((y, x), z) in rows {
                                for (((y, &x), &z), &gate) in y.iter_mut().zip(x).zip(z).zip(gate) {
                                    *y = gate.mul_add(z, x);
                                }
                            }
                        },
                    )
                });
            }
            let saved = (gate, self.of_gate.then_some(z));
            (tensor(y, x.layout().shape().clone()), saved)
        }

        fn backward(
            &self,
            (gate, z): Self::Saved,
            grad: FlexTensor,
            [want_x, want_gate, want_z]: [bool; 3],
        ) -> [Option<FlexTensor>; 3] {
            let grad = packed(grad);
            let [batch, tokens, width] = dims(&grad);
            let sample = tokens * width;
            let dgate = z.filter(|_| want_gate).map(|z| {
                let samples = values(&grad).chunks(sample).zip(values(&z).chunks(sample));
                let sums = samples.flat_map(|(grad, z)| sum_of_products(grad, z, width));
                tensor(sums.collect(), [batch, 1, width])
            });
            let dz = want_z.then(|| {
                let mut dz = vec![0f32; values(&grad).len()];
                let samples = dz.chunks_mut(sample).zip(values(&grad).chunks(sample));
                for ((dz, grad), gate) in samples.zip(values(&gate).chunks(width)) {
                    let tasks = dz
                        .par_chunks_mut(ROWS * width)
                        .zip(grad.par_chunks(ROWS * width));
                    tasks
                        .with_min_len(tasks_alone(width))
                        .for_each(|(dz, grad)| {
                            simd(
                                #[inline(always)]
                                || {
                                    let rows = dz.chunks_exact_mut(width);
                                    for (dz, grad) in rows.zip(grad.chunks_exact(width)) {
                                        for ((dz, &grad), &gate) in
                                            dz.iter_mut().zip(grad).zip(gate)
                                        {
                                            *dz = gate * grad;
                                        }
                                    }
                                },
                            )
                        });
                }
                tensor(dz, grad.layout().shape().clone())
            });
            [want_x.then_some(grad), dgate, dz]
        }
    }

    /// Tasks of [`ROWS`] rows that one thread does at a time: they are over before another one has begun.
    fn tasks_alone(width: usize) -> usize {
        ALONE.div_ceil(ROWS * width)
    }

    /// Sum over the rows of `x * y`, in parts of [`ROWS`] rows.
    fn sum_of_products(x: &[f32], y: &[f32], width: usize) -> Vec<f32> {
        let tasks = x.par_chunks(ROWS * width).zip(y.par_chunks(ROWS * width));
        let parts: Vec<Vec<f32>> = tasks
            .map(|(x, y)| {
                let mut sums = vec![0f32; width];
                simd(
                    #[inline(always)]
                    || {
                        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact(width)) {
                            for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
                                *sum = x.mul_add(y, *sum);
                            }
                        }
                    },
                );
                sums
            })
            .collect();
        let mut total = vec![0f32; width];
        for part in parts {
            for (total, part) in total.iter_mut().zip(part) {
                *total += part;
            }
        }
        total
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn::backend::DispatchTensor;
    use burn::tensor::{DType, Tensor};
    use cubecl::prelude::*;
    use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};
    use lora_core::launch_as;
    use lora_core::ops::Composition;
    use lora_core::ops::cube::{
        by_element, dispatch, empty_like, has_f32_kernels, has_kernels, tensor,
    };

    use crate::layers::packed;

    pub fn takes(x: &Tensor<3>, gate: &Tensor<3>, z: &Tensor<3>) -> bool {
        let [batch, _, width] = x.dims();
        has_f32_kernels(gate)
            && [x, z].into_iter().all(has_kernels)
            && z.dtype() == x.dtype()
            && z.dims() == x.dims()
            && gate.dims() == [batch, 1, width]
    }

    #[derive(Debug, Clone)]
    pub struct GatedResidual {
        /// Whether the gate gets a gradient.
        pub of_gate: bool,
    }

    impl Composition<3> for GatedResidual {
        type Saved = (DispatchTensor, Option<DispatchTensor>);

        fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, Self::Saved) {
            let [x, gate, z] = <[_; 3]>::try_from(inputs)
                .expect("three inputs")
                .map(tensor);
            let y = empty_like(&x);
            let (cubes, units) = by_element(&y);
            launch_as!(
                y.dtype,
                gated_residual,
                &y.client,
                cubes,
                units,
                x.into_linear_view(),
                gate.clone().into_linear_view_like(&y),
                z.clone().into_linear_view(),
                y.clone().into_linear_view(),
            );
            let saved = (dispatch(gate), self.of_gate.then(|| dispatch(z)));
            (dispatch(y), saved)
        }

        /// Of Burn's operations: each gradient is one of them, or two.
        fn backward(
            &self,
            (gate, z): Self::Saved,
            grad: DispatchTensor,
            [want_x, want_gate, want_z]: [bool; 3],
        ) -> [Option<DispatchTensor>; 3] {
            let [gate, grad] = [gate, grad].map(Tensor::<3>::from_dispatch);
            let dgate = z.filter(|_| want_gate).map(|z| {
                let z = Tensor::<3>::from_dispatch(z).cast(DType::F32);
                let products = grad.clone().cast(DType::F32) * z; // the casts are free in f32
                packed(products).sum_dim(1).into_dispatch()
            });
            let dz = want_z.then(|| (gate.cast(grad.dtype()) * grad.clone()).into_dispatch());
            [want_x.then(|| grad.into_dispatch()), dgate, dz]
        }
    }

    #[cube(launch)]
    fn gated_residual<E: Float>(
        x: LinearView<'_, E>,
        gate: LinearView<'_, f32>,
        z: LinearView<'_, E>,
        mut y: LinearViewMut<'_, E>,
    ) {
        if y.is_in_bounds(ABSOLUTE_POS) {
            let change = gate.read(ABSOLUTE_POS) * f32::cast_from(z.read(ABSOLUTE_POS));
            let y_value = f32::cast_from(x.read(ABSOLUTE_POS)) + change;
            y.write(ABSOLUTE_POS, E::cast_from(y_value));
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use lora_core::ops::check::{agree, random};

    #[test]
    fn a_gated_residual_agrees_with_its_composition() {
        for [b, s, d] in [[1, 1, 17], [2, 7, 31], [3, 33, 96]] {
            agree(
                [random([b, s, d]), random([b, 1, d]), random([b, s, d])],
                |[x, gate, z]| gated_residual(x, gate, z),
            );
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_it_agrees_with_its_composition() {
        use lora_core::ops::check::agree_on_wgpu;

        for [b, s, d] in [[1, 1, 17], [2, 7, 31], [3, 33, 96]] {
            let inputs = [random([b, s, d]), random([b, 1, d]), random([b, s, d])];
            agree_on_wgpu(inputs, |[x, gate, z]| gated_residual(x, gate, z));
            let inputs = [random([s, b, d]), random([b, 1, d]), random([b, s, d])];
            agree_on_wgpu(inputs, |[x, gate, z]| {
                gated_residual(x.swap_dims(0, 1), gate, z)
            });
        }
    }
}
