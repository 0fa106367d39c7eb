//! Attention made of Burn's operations: what runs where there are no kernels for it, on a GPU or in bf16.
//!
//! Queries come in groups of a size that depends on shapes alone, so that the scores of a group are some tens of megabytes.
//! Kept for the backward pass are `q`, `k`, `v`, the result `y` and the logarithm of the sum of `e^s` for each query; there the
//! scores of a group are computed again, with `g` the gradient of `y`:
//!
//! ```text
//! s = q kᵀ    p = e^(scale s - log_sum)    dv += pᵀ g    ds = scale p (g vᵀ - sum(g y))    dq = ds k    dk += dsᵀ q
//! ```
//!
//! Products are in the type of `q`, what is between them and the sums over groups in f32. Groups come in the order of their
//! queries.
//!
//! Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.

use burn::backend::DispatchTensor;
use burn::tensor::activation;
use burn::tensor::{DType, Tensor};
use lora_core::ops::{Composition, matmul};

use super::softmax::{softmax, softmax_gradient};
use crate::layers::{in_f32, packed};

/// Scores that are held at a time: 128 MiB in f32. It is part of what a result's bits depend on.
const SCORES: usize = 1 << 25;

/// Tensors of as many numbers in f32 that a group takes in the backward pass: `s`, `p`, `g vᵀ`, `ds`, and one that is copied.
const COPIES: usize = 5;

/// Queries of a group: as many as have no more than [`SCORES`] scores in all heads, in multiples of 16, which products of
/// matrices like.
pub(super) fn queries_at_once([batch, heads, keys]: [usize; 3]) -> usize {
    match SCORES / (batch * heads * keys).max(1) {
        few @ 0..16 => few.max(1),
        many => many / 16 * 16,
    }
}

/// Bytes that the scores of `tokens` among each other take at a time, at most.
pub fn scores_bytes([batch, heads, tokens]: [usize; 3]) -> usize {
    let rows = queries_at_once([batch, heads, tokens]).min(tokens);
    COPIES * batch * heads * rows * tokens * size_of::<f32>()
}

/// `softmax(scale * q kᵀ + bias) v`, heads merged, with the scores of all tokens at once.
pub(super) fn whole(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f64,
    bias: Option<Tensor<4>>,
) -> Tensor<3> {
    let [batch, heads, queries, head_dim] = q.dims();
    let scores = matmul(q.mul_scalar(scale), k.swap_dims(2, 3));
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    let p = in_f32(scores, |scores| activation::softmax(scores, 3));
    matmul(p, v)
        .swap_dims(1, 2)
        .reshape([batch, queries, heads * head_dim])
}

/// `softmax(scale * q kᵀ) v`, heads merged, of `q`, `k`, `v`, for `rows` queries at a time.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    pub scale: f64,
    pub rows: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Saved {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    /// `[batch, queries, heads * head_dim]`.
    out: Tensor<3>,
    /// `[batch, heads, queries, 1]`, f32.
    log_sum: Tensor<4>,
}

impl Attention {
    /// First query and number of queries of each group.
    fn groups(&self, queries: usize) -> impl Iterator<Item = (usize, usize)> {
        let rows = self.rows;
        let first = (0..queries).step_by(rows);
        first.map(move |first| (first, rows.min(queries - first)))
    }
}

impl Composition<3> for Attention {
    type Saved = Saved;

    fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, Saved) {
        let [q, k, v] = <[_; 3]>::try_from(inputs)
            .expect("three inputs")
            .map(Tensor::<4>::from_dispatch);
        let [batch, heads, queries, dim] = q.dims();
        let [mut outs, mut log_sums] = [Vec::new(), Vec::new()];
        for (first, rows) in self.groups(queries) {
            let q = q.clone().narrow(2, first, rows);
            let (p, log_sum) = softmax(matmul(q, k.clone().swap_dims(2, 3)), self.scale);
            log_sums.push(log_sum);
            outs.push(matmul(p, v.clone()).swap_dims(1, 2));
        }
        let out = Tensor::cat(outs, 1).reshape([batch, queries, heads * dim]);
        let saved = Saved {
            q,
            k,
            v,
            out: out.clone(),
            log_sum: Tensor::cat(log_sums, 2),
        };
        (out.into_dispatch(), saved)
    }

    fn backward(
        &self,
        saved: Saved,
        grad: DispatchTensor,
        [want_q, want_k, want_v]: [bool; 3],
    ) -> [Option<DispatchTensor>; 3] {
        let Saved {
            q,
            k,
            v,
            out,
            log_sum,
        } = saved;
        let (dtype, [batch, heads, queries, dim]) = (q.dtype(), q.dims());
        let by_head = |x: Tensor<3>| packed(x).reshape([batch, queries, heads, dim]);
        let grad = by_head(Tensor::from_dispatch(grad));
        let products = grad.clone().cast(DType::F32) * by_head(out).cast(DType::F32);
        let along = products.sum_dim(3).swap_dims(1, 2);
        let grad = packed(grad.swap_dims(1, 2)); // once, not for each product
        let mut dq = Vec::new();
        let [mut dk, mut dv] = [None, None];
        let one_group = self.rows >= queries;
        let add = |sum: &mut Option<Tensor<4>>, part: Tensor<4>| {
            *sum = Some(match sum.take() {
                Some(sum) => sum + part.cast(DType::F32),
                None if one_group => part,
                None => part.cast(DType::F32),
            });
        };
        for (first, rows) in self.groups(queries) {
            let part = |x: &Tensor<4>| x.clone().narrow(2, first, rows);
            let (q, grad) = (part(&q), part(&grad));
            let scores = matmul(q.clone(), k.clone().swap_dims(2, 3));
            let dp = matmul(grad.clone(), v.clone().swap_dims(2, 3));
            let (p, ds) = softmax_gradient(scores, part(&log_sum), dp, part(&along), self.scale);
            if want_v {
                add(&mut dv, matmul(p.swap_dims(2, 3), grad));
            }
            if want_k {
                add(&mut dk, matmul(ds.clone().swap_dims(2, 3), q));
            }
            if want_q {
                dq.push(matmul(ds, k.clone()));
            }
        }
        let dq = want_q.then(|| Tensor::cat(dq, 2));
        [dq, dk, dv].map(|gradient| gradient.map(|x| x.cast(dtype).into_dispatch()))
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::TensorData;
    use lora_core::ops::check::random;
    use lora_core::ops::compose;

    use super::*;

    /// The result and the gradients of `q`, `k`, `v`, of a loss that weighs each element differently.
    fn all(inputs: &[Tensor<4>; 3], f: impl Fn([Tensor<4>; 3]) -> Tensor<3>) -> [Vec<f32>; 4] {
        let inputs = inputs.clone().map(|x| x.detach().require_grad());
        let y = f(inputs.clone());
        let n = y.shape().num_elements();
        let weights: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let weights = Tensor::<3>::from_data(TensorData::new(weights, y.dims()), &y.device());
        let gradients = (y.clone().cast(DType::F32) * weights).sum().backward();
        let values = |x: TensorData| x.iter::<f32>().collect();
        let [q, k, v] = inputs.map(|x| values(x.grad(&gradients).expect("a gradient").into_data()));
        [values(y.into_data()), q, k, v]
    }

    fn groups(rows: usize, [q, k, v]: [Tensor<4>; 3]) -> Tensor<3> {
        let inputs = vec![q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
        compose::<_, 3, 3>(Attention { scale: 0.3, rows }, inputs)
    }

    /// Within `tolerance` of the largest element, where that is not next to nothing.
    fn assert_close(found: &[Vec<f32>; 4], expected: &[Vec<f32>; 4], tolerance: f32) {
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let largest = expected.iter().fold(0.02f32, |top, x| top.max(x.abs()));
            assert_eq!(found.len(), expected.len());
            for (a, b) in found.iter().zip(expected) {
                let distance = (a - b).abs() / largest;
                assert!(
                    distance <= tolerance,
                    "output {i}: {a}, not {b}: {distance}"
                );
            }
        }
    }

    fn inputs([batch, heads, queries, keys, dim]: [usize; 5]) -> [Tensor<4>; 3] {
        [queries, keys, keys].map(|tokens| random([batch, heads, tokens, dim]))
    }

    const SHAPES: [[usize; 5]; 4] = [
        [1, 1, 1, 1, 2],
        [2, 3, 7, 7, 6],
        [1, 2, 40, 23, 16],
        [1, 4, 67, 67, 128],
    ];

    #[test]
    fn groups_of_queries_agree_with_all_scores_at_once() {
        for shape in SHAPES {
            let inputs = inputs(shape);
            let expected = all(&inputs, |[q, k, v]| whole(q, k, v, 0.3, None));
            for rows in [1, 3, 16, 100] {
                let found = all(&inputs, |inputs| groups(rows, inputs));
                assert_close(&found, &expected, 5e-6);
            }
        }
    }

    #[test]
    fn in_bf16_groups_of_queries_are_as_far_from_f32_as_all_scores_at_once() {
        let inputs = inputs([1, 4, 67, 67, 64]);
        let exact = all(&inputs, |[q, k, v]| whole(q, k, v, 0.3, None));
        let rough = |inputs: [Tensor<4>; 3]| inputs.map(|x| x.cast(DType::BF16));
        let found = all(&inputs, |inputs| groups(16, rough(inputs)));
        assert_close(&found, &exact, 0.02);
        let found = all(&inputs, |inputs| {
            let [q, k, v] = rough(inputs);
            whole(q, k, v, 0.3, None)
        });
        assert_close(&found, &exact, 0.02);
    }

    #[test]
    fn an_input_without_a_gradient_changes_no_other_gradient() {
        let all_three = inputs([1, 2, 20, 20, 8]);
        let expected = all(&all_three, |inputs| groups(8, inputs));
        for constant in 0..3 {
            let tracked = all_three.clone().map(|x| x.detach().require_grad());
            let mut mixed = tracked.clone();
            mixed[constant] = all_three[constant].clone();
            let y = groups(8, mixed);
            let n = y.shape().num_elements();
            let weights: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let weights = Tensor::<3>::from_data(TensorData::new(weights, y.dims()), &y.device());
            let gradients = (y * weights).sum().backward();
            for (index, x) in tracked.iter().enumerate() {
                let found = x.grad(&gradients).map(|x| x.into_data().iter().collect());
                let wanted = (index != constant).then(|| expected[index + 1].clone());
                assert_eq!(found, wanted, "input {index} with {constant} constant");
            }
        }
    }

    #[test]
    fn a_group_is_as_large_as_its_scores_allow() {
        let flux = [1, 24, 4096 + 512];
        assert_eq!(queries_at_once(flux), 288);
        assert_eq!(scores_bytes(flux), 5 * 24 * 288 * 4608 * 4);
        assert_eq!(queries_at_once([8, 24, 4608]), 32);
        assert_eq!(queries_at_once([64, 64, 1 << 20]), 1);
        assert_eq!(scores_bytes([1, 2, 10]), 5 * 2 * 10 * 10 * 4);
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn wgpu_agrees_with_flex() {
        use burn::tensor::{Device, DeviceType};

        let device = Device::enumerate(DeviceType::Wgpu).into_vec();
        let device = device.into_iter().next().expect("a device").autodiff();
        for shape in SHAPES {
            let here = inputs(shape);
            let there = here.clone().map(|x| x.to_device(&device));
            let expected = all(&here, |[q, k, v]| whole(q, k, v, 0.3, None));
            for rows in [3, 16] {
                let found = all(&there, |inputs| groups(rows, inputs));
                assert_close(&found, &expected, 1e-5);
            }
        }
    }
}
