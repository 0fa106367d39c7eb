//! Group norm of layers that are not trained, alone and before SiLU.
//!
//! ```text
//! y = (x - mean) / sqrt(variance + eps) * gamma + beta,   then maybe y / (1 + e^-y)
//! ```
//!
//! with mean and variance of a group of channels, and gamma and beta of a channel. A group is cut into pieces, each with its
//! mean and its sum of squares around that; these are put together in their order, in f64.
//!
//! There is no backward pass: what is tracked goes to Burn.
//!
//! Source: Wu and He 2018, arXiv:1803.08494; Chan, Golub and LeVeque 1979 (sums of squares of pieces).

use burn::nn::GroupNorm;
use burn::tensor::Tensor;

use crate::ops::silu::silu;

/// The norm of `layer`.
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`, unchanged
pub fn group_norm(layer: &GroupNorm, x: Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(operation) = cpu::Norm::of(layer, &x, false) {
        return operation.apply(layer, x);
    }
    layer.forward(x)
}

/// `silu` of the norm of `layer`.
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`, unchanged
pub fn group_norm_silu(layer: &GroupNorm, x: Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(operation) = cpu::Norm::of(layer, &x, true) {
        return operation.apply(layer, x);
    }
    silu(layer.forward(x))
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use burn::nn::GroupNorm;
    use burn::tensor::{DType, Tensor};
    use lora_core::ops::Operation;
    use lora_core::ops::kernel::{CHUNK, dims, exp, packed, simd, sum, tensor, values};
    use rayon::prelude::*;

    /// Inputs: `x`, gamma and beta.
    #[derive(Debug, Clone)]
    pub struct Norm {
        groups: usize,
        eps: f64,
        silu: bool,
    }

    impl Norm {
        /// The operation, if the kernels take it.
        pub fn of(layer: &GroupNorm, x: &Tensor<4>, silu: bool) -> Option<Self> {
            let groups = layer.num_groups;
            let [_, channels, ..] = x.dims();
            let fits = lora_core::ops::has_kernels(x)
                && channels == layer.num_channels
                && groups > 0
                && channels.is_multiple_of(groups)
                && x.shape().num_elements() > 0;
            let usual = [&layer.gamma, &layer.beta].iter().all(|of_channel| {
                let of_channel = of_channel.as_ref().map(|of_channel| of_channel.val());
                of_channel.is_some_and(|of_channel| {
                    of_channel.dims() == [channels]
                        && of_channel.dtype() == DType::F32
                        && !of_channel.is_tracked()
                })
            });
            (fits && usual && !x.is_tracked()).then_some(Self {
                groups,
                eps: layer.epsilon,
                silu,
            })
        }

        pub fn apply(self, layer: &GroupNorm, x: Tensor<4>) -> Tensor<4> {
            let of_channel = [&layer.gamma, &layer.beta].into_iter().flatten();
            let of_channel = of_channel.map(|of_channel| of_channel.val().into_dispatch());
            let inputs = of_channel.chain([x.into_dispatch()]).collect();
            lora_core::ops::apply::<_, 0, 4>(self, inputs)
        }

        #[inline(always)]
        fn element(&self, x: f32, [mean, scale, shift]: [f32; 3]) -> f32 {
            let y = (x - mean).mul_add(scale, shift);
            match self.silu {
                true => y / (1.0 + exp(-y)),
                false => y,
            }
        }
    }

    /// Mean and variance.
    fn moments(x: &[f32]) -> [f64; 2] {
        let pieces = x.par_chunks(CHUNK).map(|x| {
            simd(
                #[inline(always)]
                || {
                    let mean = sum([x], |[x]| x) / x.len() as f32;
                    let squares = sum([x], |[x]| (x - mean) * (x - mean));
                    [x.len() as f32, mean, squares].map(f64::from)
                },
            )
        });
        let (mut count, mut mean, mut squares) = (0.0, 0.0, 0.0);
        for [n, of_piece, squares_of_piece] in pieces.collect::<Vec<_>>() {
            let (before, apart) = (count, of_piece - mean);
            count += n;
            mean += apart * n / count;
            squares += squares_of_piece + apart * apart * before * n / count;
        }
        [mean, squares / count]
    }

    impl Operation<0> for Norm {
        type Saved = ();

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, ()) {
            let [gamma, beta, x] = <[_; 3]>::try_from(inputs)
                .expect("three inputs")
                .map(packed);
            let [_, channels, height, width] = dims(&x);
            let in_group = channels / self.groups * height * width;
            let groups: Vec<_> = values(&x).par_chunks(in_group).map(moments).collect();
            let of_plane = |plane: usize| {
                let [mean, variance] = groups[plane / (channels / self.groups)];
                let channel = plane % channels;
                let scale = f64::from(values(&gamma)[channel]) / (variance + self.eps).sqrt();
                [mean as f32, scale as f32, values(&beta)[channel]]
            };
            let mut y = vec![0f32; values(&x).len()];
            let planes = y
                .par_chunks_mut(height * width)
                .zip(values(&x).par_chunks(height * width));
            planes.enumerate().for_each(|(index, (y, x))| {
                let constants = of_plane(index);
                let pieces = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
                pieces.for_each(|(y, x)| {
                    simd(
                        #[inline(always)]
                        || {
                            for (y, &x) in y.iter_mut().zip(x) {
                                *y = self.element(x, constants);
                            }
                        },
                    )
                });
            });
            (tensor(y, x.layout().shape().clone()), ())
        }

        fn backward(&self, (): (), _: FlexTensor, _: [bool; 0]) -> [Option<FlexTensor>; 0] {
            []
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::nn::{GroupNorm, GroupNormConfig};
    use burn::tensor::{Device, Tensor};
    use lora_core::ops::check::{random, same_bits_with_any_threads_and_vectors};
    use lora_core::ops::composed;

    use super::*;

    fn layer(groups: usize, channels: usize) -> GroupNorm {
        let mut layer = GroupNormConfig::new(groups, channels)
            .with_epsilon(1e-6)
            .init(&Device::flex());
        let random = |_| random([channels]).inner();
        layer.gamma = layer.gamma.map(|gamma| gamma.map(random));
        layer.beta = layer.beta.map(|beta| beta.map(random));
        layer
    }

    fn values(x: Tensor<4>) -> Vec<f32> {
        x.into_data().try_into_vec().expect("f32")
    }

    #[test]
    fn a_norm_agrees_with_burns() {
        for [batch, groups, channels, height, width] in [
            [1, 1, 1, 2, 3],
            [2, 3, 6, 5, 7],
            [1, 2, 4, 130, 67],
            [2, 4, 4, 96, 96],
        ] {
            let layer = layer(groups, channels);
            // far from zero, where sums of squares would lose the variance
            let x = random([batch, channels, height, width]).inner() + 20.0;
            for run in [group_norm, group_norm_silu] {
                let (found, expected) =
                    (run(&layer, x.clone()), composed(|| run(&layer, x.clone())));
                assert_eq!(found.dims(), expected.dims());
                let (found, expected) = (values(found), values(expected));
                let largest = expected.iter().fold(0.02f32, |top, x| top.max(x.abs()));
                for (a, b) in found.iter().zip(&expected) {
                    assert!((a - b).abs() <= 2e-5 * largest, "{a}, not {b}");
                }
            }
        }
    }

    #[test]
    fn a_norm_has_the_same_bits_with_any_threads_and_vectors() {
        let layer = layer(2, 6);
        let x = random([2, 6, 99, 98]).inner();
        same_bits_with_any_threads_and_vectors(|| values(group_norm_silu(&layer, x.clone())));
    }

    #[test]
    fn what_is_tracked_gets_its_gradient() {
        let x = random([1, 4, 6, 7]).require_grad();
        let y = group_norm_silu(&layer(2, 4), x.clone());
        let gradient = x.grad(&y.square().sum().backward()).expect("a gradient");
        assert!(gradient.abs().max().into_scalar::<f32>() > 0.0);
    }
}
