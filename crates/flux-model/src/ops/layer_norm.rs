//! `y = n (1 + scale) + shift` with `n = (x - mean) / sqrt(variance + eps)` over the last dimension: adaptive layer norm.
//!
//! With the gradient `g` of `y`, `h = g (1 + scale)` and means over the last dimension:
//!
//! ```text
//! dx = (h - mean(h) - n mean(h n)) / sqrt(variance + eps)      dscale = sum of g n      dshift = sum of g
//! ```
//!
//! where the sums run over the tokens of a sample. Kept for the backward pass: `x` and `scale`; mean and variance are
//! computed again.
//!
//! Source: Ba et al. 2016, arXiv:1607.06450; diffusers `AdaLayerNormZero`, `AdaLayerNormContinuous`.

use burn::tensor::Tensor;

use crate::layers::{in_f32, layer_norm};

/// `layer_norm(x) * (1 + scale) + shift`.
///
/// # Shapes
/// - `x`: `[batch, tokens, width]`, unchanged; `scale`, `shift`: `[batch, 1, width]`
pub fn layer_norm_modulate(
    x: Tensor<3>,
    scale: Tensor<3>,
    shift: Tensor<3>,
    eps: f64,
) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if lora_core::ops::has_kernels(&x) && x.shape().num_elements() > 0 {
        let [batch, _, width] = x.dims();
        if [scale.dims(), shift.dims()] == [[batch, 1, width]; 2] {
            let inputs = vec![
                x.into_dispatch(),
                scale.into_dispatch(),
                shift.into_dispatch(),
            ];
            let operation = cpu::LayerNormModulate { eps: eps as f32 };
            return lora_core::ops::apply::<_, 3, 3>(operation, inputs);
        }
    }
    #[cfg(feature = "cube")]
    if cube::takes(&x, &scale, &shift) {
        let inputs = [x, scale, shift].map(Tensor::into_dispatch);
        return lora_core::ops::compose::<_, 3, 3>(cube::LayerNormModulate { eps }, inputs.into());
    }
    in_f32(x, |x| layer_norm(x, eps) * (scale + 1.0) + shift)
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use lora_core::ops::Operation;
    use lora_core::ops::kernel::{ROWS, dims, owned, packed, simd, sum, tensor, values};
    use rayon::prelude::*;

    #[derive(Debug, Clone)]
    pub struct LayerNormModulate {
        pub eps: f32,
    }

    /// Mean and reciprocal standard deviation.
    #[inline(always)]
    fn moments(row: &[f32], eps: f32) -> (f32, f32) {
        let n = row.len() as f32;
        let mean = sum([row], |[x]| x) / n;
        let variance = sum([row], |[x]| (x - mean) * (x - mean)) / n;
        (mean, 1.0 / (variance + eps).sqrt())
    }

    /// Of one sample; `grad` becomes the gradient of `x`. Returns the sums of `g n` and of `g` if asked for.
    fn backward_sample(
        x: &[f32],
        scale: &[f32],
        grad: &mut [f32],
        eps: f32,
        sums: bool,
    ) -> [Vec<f32>; 2] {
        let width = scale.len();
        let rows = |grad: &mut [f32], x: &[f32], parts: &mut [Vec<f32>; 2]| {
            let [of_scale, of_shift] = parts;
            simd(
                #[inline(always)]
                || {
                    for (grad, x) in grad.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        let (mean, rstd) = moments(x, eps);
                        let totals = of_scale.iter_mut().zip(&mut *of_shift);
                        for (((scale, shift), &x), &grad) in totals.zip(x).zip(&*grad) {
                            *scale = grad.mul_add((x - mean) * rstd, *scale);
                            *shift += grad;
                        }
                        let n = width as f32;
                        let along_one = sum([grad, scale], |[g, s]| g * (1.0 + s)) / n;
                        let along_x = sum([grad, scale, x], |[g, s, x]| {
                            g * (1.0 + s) * ((x - mean) * rstd)
                        }) / n;
                        for ((grad, &scale), &x) in grad.iter_mut().zip(scale).zip(x) {
                            let h = *grad * (1.0 + scale);
                            *grad = rstd * (h - along_one - (x - mean) * rstd * along_x);
                        }
                    }
                },
            )
        };
        let tasks = grad
            .par_chunks_mut(ROWS * width)
            .zip(x.par_chunks(ROWS * width));
        let kept = if sums { width } else { 0 };
        let parts: Vec<[Vec<f32>; 2]> = tasks
            .map(|(grad, x)| {
                let mut parts = [vec![0f32; kept], vec![0f32; kept]];
                rows(grad, x, &mut parts);
                parts
            })
            .collect();
        let mut total = [vec![0f32; kept], vec![0f32; kept]];
        for part in parts {
            for (total, part) in total.iter_mut().zip(part) {
                for (total, part) in total.iter_mut().zip(part) {
                    *total += part;
                }
            }
        }
        total
    }

    impl Operation<3> for LayerNormModulate {
        type Saved = [FlexTensor; 2];

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Self::Saved) {
            let [x, scale, shift] = <[_; 3]>::try_from(inputs)
                .expect("three inputs")
                .map(packed);
            let [_, tokens, width] = dims(&x);
            let mut y = vec![0f32; values(&x).len()];
            let samples = y
                .chunks_mut(tokens * width)
                .zip(values(&x).chunks(tokens * width));
            let modulation = values(&scale)
                .chunks(width)
                .zip(values(&shift).chunks(width));
            for ((y, x), (scale, shift)) in samples.zip(modulation) {
                let tasks = y
                    .par_chunks_mut(ROWS * width)
                    .zip(x.par_chunks(ROWS * width));
                tasks.for_each(|(y, x)| {
                    simd(
                        #[inline(always)]
                        || {
                            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                                let (mean, rstd) = moments(x, self.eps);
                                let columns = y.iter_mut().zip(x).zip(scale.iter().zip(shift));
                                for ((y, &x), (&scale, &shift)) in columns {
                                    *y = ((x - mean) * rstd).mul_add(1.0 + scale, shift);
                                }
                            }
                        },
                    )
                });
            }
            (tensor(y, x.layout().shape().clone()), [x, scale])
        }

        fn backward(
            &self,
            [x, scale]: Self::Saved,
            grad: FlexTensor,
            [want_x, want_scale, want_shift]: [bool; 3],
        ) -> [Option<FlexTensor>; 3] {
            let mut grad = owned(grad);
            let [batch, tokens, width] = dims(&x);
            let samples = grad
                .storage_mut::<f32>()
                .chunks_mut(tokens * width)
                .zip(values(&x).chunks(tokens * width))
                .zip(values(&scale).chunks(width));
            let [mut of_scale, mut of_shift] = [Vec::new(), Vec::new()];
            for ((grad, x), scale) in samples {
                let sums = want_scale || want_shift;
                let [scale, shift] = backward_sample(x, scale, grad, self.eps, sums);
                of_scale.extend(scale);
                of_shift.extend(shift);
            }
            [
                want_x.then_some(grad),
                want_scale.then(|| tensor(of_scale, [batch, 1, width])),
                want_shift.then(|| tensor(of_shift, [batch, 1, width])),
            ]
        }
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
        CubeTensor, by_row, dispatch, empty_like, has_f32_kernels, has_row_kernels, sum_of_units,
        tensor,
    };

    use crate::layers::{layer_norm, packed};

    pub fn takes(x: &Tensor<3>, scale: &Tensor<3>, shift: &Tensor<3>) -> bool {
        let [batch, _, width] = x.dims();
        let modulation = [scale, shift];
        has_row_kernels(x)
            && modulation.map(|x| x.dims()) == [[batch, 1, width]; 2]
            && modulation.into_iter().all(has_f32_kernels)
    }

    #[derive(Debug, Clone)]
    pub struct LayerNormModulate {
        pub eps: f64,
    }

    impl Composition<3> for LayerNormModulate {
        type Saved = [CubeTensor; 2];

        fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, Self::Saved) {
            let [x, scale, shift] = <[_; 3]>::try_from(inputs)
                .expect("three inputs")
                .map(tensor);
            let y = empty_like(&x);
            let (cubes, units) = by_row(&y);
            launch_as!(
                y.dtype,
                layer_norm_modulate,
                &y.client,
                cubes,
                units,
                x.clone().into_linear_view(),
                scale.clone().into_linear_view(),
                shift.into_linear_view(),
                y.clone().into_linear_view(),
                y.meta.shape()[2],
                self.eps as f32,
            );
            (dispatch(y), [x, scale])
        }

        fn backward(
            &self,
            [x, scale]: Self::Saved,
            grad: DispatchTensor,
            [want_x, want_scale, want_shift]: [bool; 3],
        ) -> [Option<DispatchTensor>; 3] {
            let dx = want_x.then(|| {
                let dx = empty_like(&x);
                let (cubes, units) = by_row(&dx);
                launch_as!(
                    dx.dtype,
                    layer_norm_modulate_backward,
                    &dx.client,
                    cubes,
                    units,
                    x.clone().into_linear_view(),
                    scale.into_linear_view(),
                    tensor(grad.clone()).into_linear_view(),
                    dx.clone().into_linear_view(),
                    dx.meta.shape()[2],
                    self.eps as f32,
                );
                dispatch(dx)
            });
            // Only where a layer that makes them is trained, so of Burn's operations.
            let [x, grad] =
                [dispatch(x), grad].map(|x| Tensor::<3>::from_dispatch(x).cast(DType::F32));
            let over_tokens = |x: Tensor<3>| packed(x).sum_dim(1).into_dispatch();
            let dscale = want_scale.then(|| over_tokens(grad.clone() * layer_norm(x, self.eps)));
            let dshift = want_shift.then(|| over_tokens(grad));
            [dx, dscale, dshift]
        }
    }

    #[cube(launch)]
    fn layer_norm_modulate<E: Float>(
        x: LinearView<'_, E>,
        scale: LinearView<'_, f32>,
        shift: LinearView<'_, f32>,
        mut y: LinearViewMut<'_, E>,
        width: usize,
        eps: f32,
    ) {
        let row = CUBE_POS * width;
        let sample = CUBE_POS_Y as usize * width;
        let (mean, rstd) = moments::<E>(x, row, width, eps);
        for j in range_stepped(UNIT_POS as usize, width, CUBE_DIM as usize) {
            let n = (f32::cast_from(x.read(row + j)) - mean) * rstd;
            let scale = scale.read(sample + j) + 1.0;
            y.write(row + j, E::cast_from(n * scale + shift.read(sample + j)));
        }
    }

    #[cube(launch)]
    fn layer_norm_modulate_backward<E: Float>(
        x: LinearView<'_, E>,
        scale: LinearView<'_, f32>,
        grad: LinearView<'_, E>,
        mut dx: LinearViewMut<'_, E>,
        width: usize,
        eps: f32,
    ) {
        let row = CUBE_POS * width;
        let sample = CUBE_POS_Y as usize * width;
        let (mean, rstd) = moments::<E>(x, row, width, eps);
        let mut along_one = 0.0f32;
        let mut along_n = 0.0f32;
        for j in range_stepped(UNIT_POS as usize, width, CUBE_DIM as usize) {
            let h = f32::cast_from(grad.read(row + j)) * (scale.read(sample + j) + 1.0);
            along_one += h;
            along_n += h * ((f32::cast_from(x.read(row + j)) - mean) * rstd);
        }
        let along_one = sum_of_units(along_one) / f32::cast_from(width);
        let along_n = sum_of_units(along_n) / f32::cast_from(width);
        for j in range_stepped(UNIT_POS as usize, width, CUBE_DIM as usize) {
            let h = f32::cast_from(grad.read(row + j)) * (scale.read(sample + j) + 1.0);
            let n = (f32::cast_from(x.read(row + j)) - mean) * rstd;
            dx.write(row + j, E::cast_from((h - along_one - n * along_n) * rstd));
        }
    }

    /// Mean and `1 / sqrt(variance + eps)` of the row of this cube.
    #[cube]
    fn moments<E: Float>(x: LinearView<'_, E>, row: usize, width: usize, eps: f32) -> (f32, f32) {
        let mut sum = 0.0f32;
        for j in range_stepped(UNIT_POS as usize, width, CUBE_DIM as usize) {
            sum += f32::cast_from(x.read(row + j));
        }
        let mean = sum_of_units(sum) / f32::cast_from(width);
        let mut squares = 0.0f32;
        for j in range_stepped(UNIT_POS as usize, width, CUBE_DIM as usize) {
            let centered = f32::cast_from(x.read(row + j)) - mean;
            squares += centered * centered;
        }
        let variance = sum_of_units(squares) / f32::cast_from(width);
        (mean, 1.0f32 / f32::sqrt(variance + eps))
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use lora_core::ops::check::{agree, random};

    #[test]
    fn layer_norm_and_modulation_agree_with_their_composition() {
        for [b, s, d] in [[1, 1, 17], [2, 7, 31], [3, 33, 96], [1, 130, 257]] {
            agree(
                [random([b, s, d]), random([b, 1, d]), random([b, 1, d])],
                |[x, scale, shift]| layer_norm_modulate(x, scale, shift, 1e-6),
            );
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_they_agree_with_their_composition() {
        use lora_core::ops::check::agree_on_wgpu;

        for [b, s, d] in [[1, 1, 17], [2, 7, 31], [3, 33, 96], [2, 5, 1000]] {
            let modulation = [random([b, 1, d]), random([b, 1, d])];
            let [scale, shift] = modulation.clone();
            agree_on_wgpu([random([b, s, d]), scale, shift], |[x, scale, shift]| {
                layer_norm_modulate(x, scale, shift, 1e-6)
            });
            let [scale, shift] = modulation;
            agree_on_wgpu([random([s, b, d]), scale, shift], |[x, scale, shift]| {
                layer_norm_modulate(x.swap_dims(0, 1), scale, shift, 1e-6)
            });
        }
    }
}
