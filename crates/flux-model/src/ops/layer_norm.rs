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
}
