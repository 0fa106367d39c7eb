//! Tokens to heads: RMS norm, rotary positions, and the layout attention reads, in one pass.
//!
//! For a head `x` of a token, with `r = 1 / sqrt(mean(x²) + eps)` and the pairs (2k, 2k + 1) rotated by the token's angles:
//!
//! ```text
//! y = rotate(r w x)               h = w rotateᵀ(g)
//! dx = r (h - x r² mean(h x))     dw = sum of r x rotateᵀ(g)
//! ```
//!
//! where `g` is the gradient of `y`. One or two streams of tokens come in, the first before the second, each with a norm of
//! its own. Kept for the backward pass: the inputs and the angles.
//!
//! Source: Zhang & Sennrich 2019, arXiv:1910.07467; Su et al. 2021, arXiv:2104.09864; black-forest-labs/flux
//! `src/flux/math.py`, `modules/layers.py` (802fb47).

use burn::tensor::{DType, Tensor};

use crate::layers::{RotaryTable, Stream, rms_norm, split_heads};

/// Normed and rotated heads. `rotary` gets no gradient.
///
/// # Shapes
/// - returns `[batch, heads, tokens of all streams, head_dim]`
pub fn norm_rotate<const N: usize>(
    streams: [Stream; N],
    heads: usize,
    rotary: &RotaryTable,
) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if cpu::takes(&streams.each_ref().map(|stream| &stream.x), heads) {
        return cpu::norm_rotate(streams, heads, rotary);
    }
    #[cfg(feature = "cube")]
    if cube::takes(&streams, heads) {
        return cube::norm_rotate(streams, heads, rotary);
    }
    let dtype = streams[0].x.dtype();
    let normed = streams.map(|Stream { x, norm, eps }| {
        rms_norm(split_heads(x, heads).cast(DType::F32), norm, eps) // the casts are free in f32
    });
    rotate(Tensor::cat(normed.into(), 1).swap_dims(1, 2), rotary).cast(dtype)
}

/// Heads as they are.
///
/// # Shapes
/// - `streams`: `[batch, tokens, heads * head_dim]`; returns `[batch, heads, tokens of all streams, head_dim]`
pub fn to_heads<const N: usize>(streams: [Tensor<3>; N], heads: usize) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if cpu::takes(&streams.each_ref(), heads) {
        return cpu::to_heads(streams, heads);
    }
    split_heads(Tensor::cat(streams.into(), 1), heads).swap_dims(1, 2)
}

/// Rotates the pairs (2k, 2k + 1) of the last dimension of `[batch, heads, tokens, head_dim]`.
fn rotate(x: Tensor<4>, rotary: &RotaryTable) -> Tensor<4> {
    let [batch, heads, tokens, dim] = x.dims();
    let pairs = x.reshape([batch * heads, tokens, dim / 2, 2]);
    let table = |t: &Tensor<2>| t.clone().reshape([1, tokens, dim / 2, 1]);
    let (cos, sin) = (table(&rotary.cos), table(&rotary.sin));
    let (even, odd) = (pairs.clone().narrow(3, 0, 1), pairs.narrow(3, 1, 1));
    let rotated = Tensor::cat(
        vec![
            even.clone() * cos.clone() - odd.clone() * sin.clone(),
            even * sin + odd * cos,
        ],
        3,
    );
    rotated.reshape([batch, heads, tokens, dim])
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use burn::tensor::Tensor;
    use lora_core::ops::kernel::{ROWS, dims, packed, simd, sum, tensor, values};
    use lora_core::ops::{Operation, apply, has_kernels};
    use rayon::prelude::*;

    use crate::layers::RotaryTable;
    use crate::layers::Stream;

    /// One or two streams with something in them.
    pub fn takes(streams: &[&Tensor<3>], heads: usize) -> bool {
        let whole = streams
            .iter()
            .all(|x| x.dims()[2].is_multiple_of(2 * heads));
        let filled = streams.iter().all(|x| x.shape().num_elements() > 0);
        has_kernels(streams[0]) && streams.len() <= 2 && whole && filled
    }

    pub fn norm_rotate<const N: usize>(
        streams: [Stream; N],
        heads: usize,
        rotary: &RotaryTable,
    ) -> Tensor<4> {
        let eps = streams.each_ref().map(|stream| stream.eps as f32);
        let operation = Heads {
            heads,
            eps: Some([eps[0], eps[N - 1]]),
        };
        let none = rotary.cos.device();
        let none = (
            Tensor::<3>::empty([0, 0, 0], &none),
            Tensor::<1>::empty([0], &none),
        );
        let given = streams.into_iter().map(|stream| (stream.x, stream.norm));
        let mut inputs = Vec::with_capacity(6);
        for (x, norm) in given.chain([none]).take(2) {
            inputs.extend([x.into_dispatch(), norm.into_dispatch()]);
        }
        inputs.extend([&rotary.cos, &rotary.sin].map(|table| table.clone().into_dispatch()));
        apply::<_, 4, 4>(operation, inputs)
    }

    pub fn to_heads<const N: usize>(streams: [Tensor<3>; N], heads: usize) -> Tensor<4> {
        let device = streams[0].device();
        let none = Tensor::<3>::empty([0, 0, 0], &device);
        let mut inputs = Vec::with_capacity(4);
        for x in streams.into_iter().chain([none]).take(2) {
            let norm = Tensor::<1>::empty([0], &device);
            inputs.extend([x.into_dispatch(), norm.into_dispatch()]);
        }
        apply::<_, 4, 4>(Heads { heads, eps: None }, inputs)
    }

    /// Inputs: tokens and norm of the first stream, of the second; cosines and sines where there is a norm.
    #[derive(Debug, Clone)]
    struct Heads {
        heads: usize,
        /// Of the streams' norms; `None`: neither norm nor rotation.
        eps: Option<[f32; 2]>,
    }

    /// Factors of an element and of its neighbour in the pair, `[tokens, 2, head_dim]`.
    fn table(cos: &[f32], sin: &[f32], half: usize) -> Vec<f32> {
        let mut table = Vec::with_capacity(4 * cos.len());
        for (cos, sin) in cos.chunks_exact(half).zip(sin.chunks_exact(half)) {
            table.extend(cos.iter().flat_map(|&c| [c, c]));
            table.extend(sin.iter().flat_map(|&s| [-s, s]));
        }
        table
    }

    const BLOCK: usize = 16;

    /// `y[j] = x[j] of_self[j] + sign * x[j ^ 1] of_other[j]`.
    #[inline(always)]
    fn rotate(y: &mut [f32], x: &[f32], table: &[f32], sign: f32) {
        let (of_self, of_other) = table.split_at(x.len());
        let blocks = x.len() / BLOCK * BLOCK;
        for start in (0..blocks).step_by(BLOCK) {
            let part = |x: &[f32]| -> [f32; BLOCK] {
                let mut part = [0f32; BLOCK];
                part.copy_from_slice(&x[start..start + BLOCK]);
                part
            };
            let (x, a, b) = (part(x), part(of_self), part(of_other));
            let mut turned = [0f32; BLOCK];
            for j in 0..BLOCK {
                turned[j] = x[j].mul_add(a[j], sign * x[j ^ 1] * b[j]);
            }
            y[start..start + BLOCK].copy_from_slice(&turned);
        }
        for j in blocks..x.len() {
            y[j] = x[j].mul_add(of_self[j], sign * x[j ^ 1] * of_other[j]);
        }
    }

    #[inline(always)]
    fn reciprocal_rms(x: &[f32], eps: f32) -> f32 {
        1.0 / (sum([x], |[x]| x * x) / x.len() as f32 + eps).sqrt()
    }

    /// Tokens of a stream with something in it.
    fn tokens(x: &FlexTensor) -> usize {
        dims::<3>(x)[1]
    }

    impl Operation<4> for Heads {
        type Saved = ([FlexTensor; 4], Vec<f32>);

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Self::Saved) {
            let mut inputs = inputs.into_iter().map(packed);
            let mut next = || inputs.next().expect("as many inputs as there are operands");
            let streams = [next(), next(), next(), next()];
            let [first, first_norm, last, last_norm] = &streams;
            let [batch, _, width] = dims(first);
            let (split, dim) = (tokens(first), width / self.heads);
            let all = split + tokens(last);
            let table = match self.eps {
                Some(_) => table(values(&next()), values(&next()), dim / 2),
                None => Vec::new(),
            };
            let mut y = vec![0f32; batch * all * width];
            let tasks = y.par_chunks_mut(all * dim).enumerate();
            tasks.for_each(|(task, y)| {
                let (sample, head) = (task / self.heads, task % self.heads);
                let tasks = y.par_chunks_mut(4 * ROWS * dim).enumerate();
                tasks.for_each(|(block, y)| {
                    simd(
                        #[inline(always)]
                        || {
                            let mut normed = vec![0f32; dim];
                            for (i, y) in y.chunks_exact_mut(dim).enumerate() {
                                let token = block * 4 * ROWS + i;
                                let is_last = token >= split;
                                let (x, norm, row) = match is_last {
                                    false => (first, first_norm, sample * split + token),
                                    true => {
                                        let row = sample * (all - split) + token - split;
                                        (last, last_norm, row)
                                    }
                                };
                                let x = &values(x)[row * width + head * dim..][..dim];
                                let Some(eps) = self.eps else {
                                    y.copy_from_slice(x);
                                    continue;
                                };
                                let r = reciprocal_rms(x, eps[usize::from(is_last)]);
                                for ((to, &x), &w) in normed.iter_mut().zip(x).zip(values(norm)) {
                                    *to = x * r * w;
                                }
                                rotate(y, &normed, &table[token * 2 * dim..][..2 * dim], 1.0);
                            }
                        },
                    )
                })
            });
            (tensor(y, [batch, self.heads, all, dim]), (streams, table))
        }

        fn backward(
            &self,
            (streams, table): Self::Saved,
            grad: FlexTensor,
            [want_first, want_first_norm, want_last, want_last_norm]: [bool; 4],
        ) -> [Option<FlexTensor>; 4] {
            let grad = packed(grad);
            let [first, first_norm, last, last_norm] = streams;
            let split = tokens(&first);
            let of = |x: &FlexTensor, norm: &FlexTensor, index: usize, wanted: [bool; 2]| {
                let start = index * split;
                let grads = Grads {
                    heads: self.heads,
                    eps: self.eps.map(|eps| eps[index]),
                    table: &table,
                    grad: &grad,
                    start,
                };
                let dx = wanted[0].then(|| grads.of_stream(x, norm));
                (dx, wanted[1].then(|| grads.of_norm(x)))
            };
            let (dx, dw) = of(&first, &first_norm, 0, [want_first, want_first_norm]);
            let (last_dx, last_dw) = of(&last, &last_norm, 1, [want_last, want_last_norm]);
            [dx, dw, last_dx, last_dw]
        }
    }

    /// Gradients of one stream, whose tokens start at `start`.
    struct Grads<'a> {
        heads: usize,
        eps: Option<f32>,
        table: &'a [f32],
        grad: &'a FlexTensor,
        start: usize,
    }

    impl Grads<'_> {
        /// The gradient of a head's result.
        #[inline(always)]
        fn of_result(&self, sample: usize, token: usize, head: usize, dim: usize) -> &[f32] {
            let all = dims::<4>(self.grad)[2];
            &values(self.grad)[((sample * self.heads + head) * all + token) * dim..][..dim]
        }

        fn of_stream(&self, x: &FlexTensor, norm: &FlexTensor) -> FlexTensor {
            let [_, tokens, width] = dims(x);
            let dim = width / self.heads;
            let mut dx = vec![0f32; values(x).len()];
            let tasks = dx
                .par_chunks_mut(ROWS * width)
                .zip(values(x).par_chunks(ROWS * width));
            tasks.enumerate().for_each(|(task, (dx, x))| {
                simd(
                    #[inline(always)]
                    || {
                        let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
                        for (i, (dx, x)) in rows.enumerate() {
                            let (sample, token) =
                                ((task * ROWS + i) / tokens, (task * ROWS + i) % tokens);
                            let token = self.start + token;
                            let by_head = dx.chunks_exact_mut(dim).zip(x.chunks_exact(dim));
                            for (head, (dx, x)) in by_head.enumerate() {
                                let grad = self.of_result(sample, token, head, dim);
                                let Some(eps) = self.eps else {
                                    dx.copy_from_slice(grad);
                                    continue;
                                };
                                rotate(dx, grad, &self.table[token * 2 * dim..][..2 * dim], -1.0);
                                for (dx, &w) in dx.iter_mut().zip(values(norm)) {
                                    *dx *= w;
                                }
                                let r = reciprocal_rms(x, eps);
                                let along = sum([dx, x], |[dx, x]| dx * x) * (r * r) / dim as f32;
                                for (dx, &x) in dx.iter_mut().zip(x) {
                                    *dx = r * x.mul_add(-along, *dx);
                                }
                            }
                        }
                    },
                )
            });
            tensor(dx, x.layout().shape().clone())
        }

        /// Only where a norm is trained, so on one thread.
        fn of_norm(&self, x: &FlexTensor) -> FlexTensor {
            let [_, tokens, width] = dims(x);
            let dim = width / self.heads;
            let (mut dw, mut turned) = (vec![0f32; dim], vec![0f32; dim]);
            for (row, x) in values(x).chunks_exact(width).enumerate() {
                let token = self.start + row % tokens;
                for (head, x) in x.chunks_exact(dim).enumerate() {
                    let grad = self.of_result(row / tokens, token, head, dim);
                    rotate(
                        &mut turned,
                        grad,
                        &self.table[token * 2 * dim..][..2 * dim],
                        -1.0,
                    );
                    let r = reciprocal_rms(x, self.eps.unwrap_or_default());
                    for ((dw, &turned), &x) in dw.iter_mut().zip(&turned).zip(x) {
                        *dw += turned * x * r;
                    }
                }
            }
            tensor(dw, [dim])
        }
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn::backend::DispatchTensor;
    use burn::tensor::Tensor;
    use cubecl::prelude::*;
    use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};
    use lora_core::launch_as;
    use lora_core::ops::cube::{
        CUBES, CubeTensor, dispatch, empty, empty_like, has_f32_kernels, has_kernels, sum_of_units,
        tensor,
    };
    use lora_core::ops::{Composition, compose};

    use crate::layers::{RotaryTable, Stream};

    /// Units that share a head of a token.
    const UNITS: u32 = 32;

    /// One or two streams of one type, with frozen norms.
    pub fn takes<const N: usize>(streams: &[Stream; N], heads: usize) -> bool {
        let [batch, _, width] = streams[0].x.dims();
        let fits = |stream: &Stream| {
            has_kernels(&stream.x)
                && has_f32_kernels(&stream.norm)
                && !stream.norm.is_tracked()
                && stream.x.dtype() == streams[0].x.dtype()
                && stream.x.dims()[1] <= CUBES
        };
        width.is_multiple_of(2 * heads)
            && (1..=2).contains(&N)
            && heads.max(batch) <= CUBES
            && streams.iter().all(fits)
    }

    pub fn norm_rotate<const N: usize>(
        streams: [Stream; N],
        heads: usize,
        rotary: &RotaryTable,
    ) -> Tensor<4> {
        let eps = streams.each_ref().map(|stream| stream.eps as f32);
        let operation = NormRotate {
            heads,
            eps: [eps[0], eps[N - 1]],
        };
        let norms = streams.each_ref().map(|stream| stream.norm.clone());
        let tokens = streams.map(|stream| stream.x.into_dispatch());
        let tables = [&rotary.cos, &rotary.sin].map(|table| table.clone().into_dispatch());
        let constants = norms.map(Tensor::into_dispatch).into_iter().chain(tables);
        let inputs = tokens.into_iter().chain(constants).collect();
        compose::<_, N, 4>(operation, inputs)
    }

    /// Inputs: the streams, their norms, cosines, sines.
    #[derive(Debug, Clone)]
    struct NormRotate {
        heads: usize,
        eps: [f32; 2],
    }

    impl<const N: usize> Composition<N> for NormRotate {
        type Saved = Vec<CubeTensor>;

        fn forward(&self, inputs: Vec<DispatchTensor>) -> (DispatchTensor, Vec<CubeTensor>) {
            let inputs: Vec<_> = inputs.into_iter().map(tensor).collect();
            let (streams, constants) = inputs.split_at(N);
            let (norms, tables) = constants.split_at(N);
            let shape = streams[0].meta.shape();
            let (batch, width) = (shape[0], shape[2]);
            let tokens = streams.iter().map(|x| x.meta.shape()[1]).sum::<usize>();
            let dim = width / self.heads;
            let y = empty([batch, self.heads, tokens, dim], &streams[0]);
            let mut first = 0;
            for ((x, norm), eps) in streams.iter().zip(norms).zip(self.eps) {
                let own = x.meta.shape()[1];
                launch_as!(
                    x.dtype,
                    norm_rotate_kernel,
                    &y.client,
                    CubeCount::new_3d(own as u32, self.heads as u32, batch as u32),
                    CubeDim::new_1d(UNITS),
                    x.clone().into_linear_view(),
                    norm.clone().into_linear_view(),
                    tables[0].clone().into_linear_view(),
                    tables[1].clone().into_linear_view(),
                    y.clone().into_linear_view(),
                    first,
                    tokens,
                    dim / 2,
                    eps,
                );
                first += own;
            }
            (dispatch(y), inputs)
        }

        fn backward(
            &self,
            inputs: Vec<CubeTensor>,
            grad: DispatchTensor,
            wanted: [bool; N],
        ) -> [Option<DispatchTensor>; N] {
            let (streams, constants) = inputs.split_at(N);
            let (norms, tables) = constants.split_at(N);
            let grad = tensor(grad);
            let (batch, tokens, dim) = (
                grad.meta.shape()[0],
                grad.meta.shape()[2],
                grad.meta.shape()[3],
            );
            let mut first = 0;
            std::array::from_fn(|index| {
                let (x, eps) = (&streams[index], self.eps[index]);
                let own = x.meta.shape()[1];
                let start = first;
                first += own;
                wanted[index].then(|| {
                    let dx = empty_like(x);
                    launch_as!(
                        x.dtype,
                        norm_rotate_backward,
                        &dx.client,
                        CubeCount::new_3d(own as u32, self.heads as u32, batch as u32),
                        CubeDim::new_1d(UNITS),
                        x.clone().into_linear_view(),
                        norms[index].clone().into_linear_view(),
                        tables[0].clone().into_linear_view(),
                        tables[1].clone().into_linear_view(),
                        grad.clone().into_linear_view(),
                        dx.clone().into_linear_view(),
                        start,
                        tokens,
                        dim / 2,
                        eps,
                    );
                    dispatch(dx)
                })
            })
        }
    }

    /// Where the head of this cube begins in a stream, `[batch, tokens, heads, 2 pairs]`.
    #[cube]
    fn in_stream(pairs: usize) -> usize {
        let token = CUBE_POS_Z as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
        (token * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize) * 2 * pairs
    }

    /// The same among heads, `[batch, heads, tokens, 2 pairs]`, whose `first` tokens are of another stream.
    #[cube]
    fn among_heads(first: usize, tokens: usize, pairs: usize) -> usize {
        let head = CUBE_POS_Z as usize * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize;
        (head * tokens + first + CUBE_POS_X as usize) * 2 * pairs
    }

    #[cube]
    fn reciprocal_rms<E: Float>(x: LinearView<'_, E>, from: usize, pairs: usize, eps: f32) -> f32 {
        let mut squares = 0.0f32;
        for k in range_stepped(UNIT_POS as usize, 2 * pairs, CUBE_DIM as usize) {
            let value = f32::cast_from(x.read(from + k));
            squares += value * value;
        }
        1.0f32 / f32::sqrt(sum_of_units(squares) / f32::cast_from(2 * pairs) + eps)
    }

    /// A pair as f32.
    #[cube]
    fn pair<E: Float>(x: LinearView<'_, E>, at: usize) -> (f32, f32) {
        (f32::cast_from(x.read(at)), f32::cast_from(x.read(at + 1)))
    }

    #[cube(launch)]
    fn norm_rotate_kernel<E: Float>(
        x: LinearView<'_, E>,
        norm: LinearView<'_, f32>,
        cos: LinearView<'_, f32>,
        sin: LinearView<'_, f32>,
        mut y: LinearViewMut<'_, E>,
        first: usize,
        tokens: usize,
        pairs: usize,
        eps: f32,
    ) {
        let from = in_stream(pairs);
        let to = among_heads(first, tokens, pairs);
        let angles = (first + CUBE_POS_X as usize) * pairs;
        let r = reciprocal_rms::<E>(x, from, pairs, eps);
        for k in range_stepped(UNIT_POS as usize, pairs, CUBE_DIM as usize) {
            let (x_even, x_odd) = pair::<E>(x, from + 2 * k);
            let even = x_even * r * norm.read(2 * k);
            let odd = x_odd * r * norm.read(2 * k + 1);
            let cos = cos.read(angles + k);
            let sin = sin.read(angles + k);
            y.write(to + 2 * k, E::cast_from(even * cos - odd * sin));
            y.write(to + 2 * k + 1, E::cast_from(even * sin + odd * cos));
        }
    }

    /// `h` of pair `k`.
    #[cube]
    fn turned_back<E: Float>(
        grad: LinearView<'_, E>,
        of_grad: usize,
        norm: LinearView<'_, f32>,
        cos: LinearView<'_, f32>,
        sin: LinearView<'_, f32>,
        angles: usize,
        k: usize,
    ) -> (f32, f32) {
        let (even, odd) = pair::<E>(grad, of_grad + 2 * k);
        let cos = cos.read(angles + k);
        let sin = sin.read(angles + k);
        (
            norm.read(2 * k) * (even * cos + odd * sin),
            norm.read(2 * k + 1) * (odd * cos - even * sin),
        )
    }

    #[cube(launch)]
    fn norm_rotate_backward<E: Float>(
        x: LinearView<'_, E>,
        norm: LinearView<'_, f32>,
        cos: LinearView<'_, f32>,
        sin: LinearView<'_, f32>,
        grad: LinearView<'_, E>,
        mut dx: LinearViewMut<'_, E>,
        first: usize,
        tokens: usize,
        pairs: usize,
        eps: f32,
    ) {
        let from = in_stream(pairs);
        let of_grad = among_heads(first, tokens, pairs);
        let angles = (first + CUBE_POS_X as usize) * pairs;
        let r = reciprocal_rms::<E>(x, from, pairs, eps);
        let mut along = 0.0f32;
        for k in range_stepped(UNIT_POS as usize, pairs, CUBE_DIM as usize) {
            let (h_even, h_odd) = turned_back::<E>(grad, of_grad, norm, cos, sin, angles, k);
            let (x_even, x_odd) = pair::<E>(x, from + 2 * k);
            along += h_even * x_even;
            along += h_odd * x_odd;
        }
        let along = sum_of_units(along) * r * r / f32::cast_from(2 * pairs);
        for k in range_stepped(UNIT_POS as usize, pairs, CUBE_DIM as usize) {
            let (h_even, h_odd) = turned_back::<E>(grad, of_grad, norm, cos, sin, angles, k);
            let (x_even, x_odd) = pair::<E>(x, from + 2 * k);
            dx.write(from + 2 * k, E::cast_from(r * (h_even - x_even * along)));
            dx.write(from + 2 * k + 1, E::cast_from(r * (h_odd - x_odd * along)));
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use lora_core::ops::check::{agree, random};

    use super::*;

    #[test]
    fn normed_and_rotated_heads_agree_with_their_composition() {
        for [b, s, t, h, d] in [
            [1, 1, 1, 1, 2],
            [2, 7, 3, 3, 6],
            [1, 67, 5, 5, 64],
            [2, 130, 70, 2, 34],
        ] {
            let angle = random([s + t, d / 2]);
            let rotary = RotaryTable {
                cos: angle.clone().cos(),
                sin: angle.sin(),
            };
            let stream = |x: Tensor<3>, w: Tensor<3>| Stream {
                x,
                norm: w.reshape([d]),
                eps: 1e-6,
            };
            agree(
                [
                    random([b, s, h * d]),
                    random([1, 1, d]),
                    random([b, t, h * d]),
                    random([1, 1, d]),
                ],
                |[x, w, x2, w2]| norm_rotate([stream(x, w), stream(x2, w2)], h, &rotary),
            );
            agree([random([b, s + t, h * d]), random([1, 1, d])], |[x, w]| {
                norm_rotate([stream(x, w)], h, &rotary)
            });
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_frozen_norms_agree_with_their_composition() {
        use lora_core::ops::check::{agree_on_wgpu, wgpu};

        for [b, s, t, h, d] in [[1, 1, 1, 1, 2], [2, 7, 3, 3, 6], [2, 33, 20, 2, 130]] {
            let angle = random([s + t, d / 2]).inner().to_device(&wgpu().inner());
            let rotary = RotaryTable {
                cos: angle.clone().cos(),
                sin: angle.sin(),
            };
            let norms = [random([d]), random([d])].map(|w| w.inner().to_device(&wgpu()));
            let stream = |x: Tensor<3>, norm: usize| Stream {
                x,
                norm: norms[norm].clone(),
                eps: 1e-6,
            };
            let both = [random([b, s, h * d]), random([b, t, h * d])];
            agree_on_wgpu(both, |[x, y]| {
                norm_rotate([stream(x, 0), stream(y, 1)], h, &rotary)
            });
            agree_on_wgpu([random([b, s + t, h * d])], |[x]| {
                norm_rotate([stream(x, 1)], h, &rotary)
            });
        }
    }

    #[test]
    fn heads_as_they_are_agree_with_their_composition() {
        for [b, s, t, h, d] in [[1, 1, 1, 1, 2], [2, 7, 3, 3, 6], [1, 67, 5, 5, 64]] {
            agree([random([b, s, h * d]), random([b, t, h * d])], |streams| {
                to_heads(streams, h)
            });
            agree([random([b, s, h * d])], |streams| to_heads(streams, h));
        }
    }
}
