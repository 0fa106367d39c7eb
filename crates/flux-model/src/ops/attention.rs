//! `y = softmax(scale q kᵀ) v`, heads merged; the scores of all tokens are never held.
//!
//! Where there are no kernels, `attention_composed` is what runs. What follows is of the kernels.
//!
//! For a query, the keys come in tiles. With the largest score `m` so far, the sum `l` of `e^(s - m)` and the sum `o` of
//! `e^(s - m) v`, a tile with a larger score first multiplies `l` and `o` by `e^(m - m')`. The result is `o / l`; kept for
//! the backward pass are it and `m + ln l`. There the scores are computed again, tile by tile, with `g` the gradient of `y`:
//!
//! ```text
//! p = e^(s - (m + ln l))    dv = pᵀ g    ds = scale p (g vᵀ - sum(g y))    dq = ds k    dk = dsᵀ q
//! ```
//!
//! Scores lie with keys down and queries across, so that maxima and sums over keys need no shuffling. A head is computed
//! by one thread in the backward pass, a block of its queries in the forward pass, tiles always in the same order.
//!
//! A block that is computed again takes `y` and `m + ln l` from its first run where they are kept ([`computed_once`]).
//!
//! [`computed_once`]: lora_core::ops::computed_once
//!
//! Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.

use burn::tensor::Tensor;
use lora_core::ops::compose;

use super::attention_composed::{Attention, queries_at_once, whole};

/// `softmax(scale * q kᵀ + bias) v`, heads merged; with a bias, the scores of all tokens are held at once.
///
/// # Shapes
/// - `q`: `[batch, heads, queries, head_dim]`, `k`, `v`: `[batch, heads, keys, head_dim]`
/// - `bias`: broadcast to `[batch, heads, queries, keys]`; returns `[batch, queries, heads * head_dim]`
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f64,
    bias: Option<Tensor<4>>,
) -> Tensor<3> {
    let [batch, heads, _, head_dim] = q.dims();
    let keys = k.dims()[2];
    let alike = k.dims() == [batch, heads, keys, head_dim] && v.dims() == k.dims();
    if bias.is_none() && alike && keys > 0 && q.shape().num_elements() > 0 {
        #[cfg(feature = "flex")]
        let has_kernels = lora_core::ops::has_kernels(&q);
        let inputs = vec![q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
        #[cfg(feature = "flex")]
        if has_kernels {
            let scale = scale as f32;
            return lora_core::ops::apply::<_, 3, 3>(cpu::Attention { scale }, inputs);
        }
        let rows = queries_at_once([batch, heads, keys]);
        return compose::<_, 3, 3>(Attention { scale, rows }, inputs);
    }
    whole(q, k, v, scale, bias)
}

#[cfg(feature = "flex")]
mod cpu {
    use burn::backend::flex::FlexTensor;
    use lora_core::ops::Operation;
    use lora_core::ops::computed_once;
    use lora_core::ops::kernel::{ROWS, dims, exp, packed, simd, sum, tensor, values};
    use lora_core::ops::tile::{self, Kernel, Simd, block_times, columns_times};
    use rayon::prelude::*;

    #[derive(Debug, Clone)]
    pub struct Attention {
        pub scale: f32,
    }

    #[derive(Debug, Clone)]
    pub struct Saved {
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        out: FlexTensor,
        /// `m + ln l`, `[batch, heads, queries]`.
        log_sum: FlexTensor,
    }

    /// Columns of a strip: two vectors of AVX-512, four of AVX2.
    const COLUMNS: usize = 32;

    /// In tiles of 8 rows, of 2 where vectors are shorter.
    fn run<K: Kernel>(kernel: K) -> K::Output {
        tile::run::<K, 8, 2>(kernel)
    }

    type Lanes = [f32; COLUMNS];
    type Strips = tile::Strips<COLUMNS>;

    /// Keys of a tile in the forward pass, and queries of a task.
    const KEYS: usize = 128;
    const QUERIES: usize = 2 * COLUMNS;

    /// Keys and queries of a tile in the backward pass.
    const TILE: usize = 64;

    /// One head of a packed `[batch, heads, tokens, dim]`.
    fn head(x: &FlexTensor, index: usize) -> &[f32] {
        let [_, _, tokens, dim] = dims(x);
        &values(x)[index * tokens * dim..][..tokens * dim]
    }

    fn row(x: &[f32], start: usize, dim: usize) -> &[f32] {
        &x[start..start + dim]
    }

    /// The head with tokens across.
    fn across(x: &[f32], dim: usize) -> Strips {
        Strips::of_columns([dim, x.len() / dim], |token| &x[token * dim..][..dim])
    }

    /// The head with tokens down.
    fn down(x: &[f32], dim: usize) -> Strips {
        Strips::of([x.len() / dim, dim], |token| &x[token * dim..][..dim])
    }

    impl Attention {
        /// The result, and `m + ln l`.
        fn results(
            &self,
            q: &FlexTensor,
            k: &FlexTensor,
            v: &FlexTensor,
        ) -> (FlexTensor, FlexTensor) {
            let [batch, heads, queries, dim] = dims(q);
            let mut by_head = vec![0f32; values(q).len()];
            let mut log_sum = vec![0f32; batch * heads * queries];
            let tasks = by_head
                .par_chunks_mut(queries * dim)
                .zip(log_sum.par_chunks_mut(queries));
            tasks.enumerate().for_each(|(index, (out, log_sum))| {
                let (q, k) = (head(q, index), across(head(k, index), dim));
                let v = down(head(v, index), dim);
                let tasks = out
                    .par_chunks_mut(QUERIES * dim)
                    .zip(log_sum.par_chunks_mut(QUERIES))
                    .zip(q.par_chunks(QUERIES * dim));
                tasks.for_each(|((out, log_sum), q)| {
                    run(Forward {
                        q,
                        k: &k,
                        v: &v,
                        scale: self.scale,
                        out,
                        log_sum,
                    })
                });
            });
            let out = tensor(
                merge_heads(&by_head, [batch, heads, queries, dim]),
                [batch, queries, heads * dim],
            );
            (out, tensor(log_sum, [batch, heads, queries]))
        }
    }

    impl Operation<3> for Attention {
        type Saved = Saved;

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, Saved) {
            let [q, k, v] = <[_; 3]>::try_from(inputs)
                .expect("three inputs")
                .map(packed);
            let (out, log_sum) = computed_once(true, || self.results(&q, &k, &v));
            let saved = Saved {
                q,
                k,
                v,
                out: out.clone(),
                log_sum,
            };
            (out, saved)
        }

        fn backward(
            &self,
            saved: Saved,
            grad: FlexTensor,
            _: [bool; 3],
        ) -> [Option<FlexTensor>; 3] {
            let Saved {
                q,
                k,
                v,
                out,
                log_sum,
            } = saved;
            let grad = packed(grad);
            let [_, heads, queries, dim] = dims(&q);
            let keys = dims::<4>(&k)[2];
            let width = heads * dim;
            let (out, grad) = (values(&out), values(&grad));
            let mut dq = vec![0f32; values(&q).len()];
            let mut dk = vec![0f32; values(&k).len()];
            let mut dv = vec![0f32; values(&v).len()];
            let tasks = dq
                .par_chunks_mut(queries * dim)
                .zip(dk.par_chunks_mut(keys * dim))
                .zip(dv.par_chunks_mut(keys * dim));
            tasks.enumerate().for_each(|(index, ((dq, dk), dv))| {
                let start = index / heads * queries * width + index % heads * dim;
                let row = |token: usize| row(grad, start + token * width, dim);
                let along: Vec<f32> = (0..queries)
                    .map(|token| {
                        let out = self::row(out, start + token * width, dim);
                        let grad = row(token);
                        simd(
                            #[inline(always)]
                            || sum([out, grad], |[out, grad]| out * grad),
                        )
                    })
                    .collect();
                let (q, k, v) = (head(&q, index), head(&k, index), head(&v, index));
                let operands = Operands {
                    scale: self.scale,
                    dim,
                    q_across: across(q, dim),
                    q_down: down(q, dim),
                    k_across: across(k, dim),
                    k_down: down(k, dim),
                    v_across: across(v, dim),
                    grad_across: Strips::of_columns([dim, queries], row),
                    grad_down: Strips::of([queries, dim], row),
                    log_sum: by_group(self::row(values(&log_sum), index * queries, queries)),
                    along: by_group(&along),
                };
                run(Backward {
                    x: operands,
                    dq,
                    dk,
                    dv,
                });
            });
            let like =
                |values: Vec<f32>, x: &FlexTensor| Some(tensor(values, x.layout().shape().clone()));
            [like(dq, &q), like(dk, &k), like(dv, &v)]
        }
    }

    /// `[batch, heads, tokens, dim]` to `[batch, tokens, heads, dim]`.
    fn merge_heads(x: &[f32], [_, heads, tokens, dim]: [usize; 4]) -> Vec<f32> {
        let width = heads * dim;
        let mut merged = vec![0f32; x.len()];
        let tasks = merged.par_chunks_mut(ROWS * width).enumerate();
        tasks.for_each(|(task, to)| {
            for (i, to) in to.chunks_exact_mut(width).enumerate() {
                let (sample, token) = ((task * ROWS + i) / tokens, (task * ROWS + i) % tokens);
                for (head, to) in to.chunks_exact_mut(dim).enumerate() {
                    let from = ((sample * heads + head) * tokens + token) * dim;
                    to.copy_from_slice(&x[from..from + dim]);
                }
            }
        });
        merged
    }

    /// In groups of [`COLUMNS`], filled up with zeros.
    fn by_group(x: &[f32]) -> Vec<Lanes> {
        let mut groups = vec![[0f32; COLUMNS]; x.len().div_ceil(COLUMNS)];
        groups.as_flattened_mut()[..x.len()].copy_from_slice(x);
        groups
    }

    /// Results and `m + ln l` of up to [`QUERIES`] queries.
    struct Forward<'a> {
        q: &'a [f32],
        k: &'a Strips,
        v: &'a Strips,
        scale: f32,
        out: &'a mut [f32],
        log_sum: &'a mut [f32],
    }

    impl Kernel for Forward<'_> {
        type Output = ();

        #[inline(always)]
        fn tiles<S: Simd, const R: usize>(self, simd: S) {
            let (dim, keys) = (self.k.depth(), self.k.width());
            let q = across(self.q, dim);
            let empty = |_| Group {
                largest: [f32::NEG_INFINITY; COLUMNS],
                total: [0.0; COLUMNS],
                out: Strips::zeros([COLUMNS, dim]),
            };
            let mut groups: Vec<Group> = (0..q.count()).map(empty).collect();
            for first in (0..keys).step_by(KEYS) {
                for (index, group) in groups.iter_mut().enumerate() {
                    group.add::<S, R>(simd, q.strip(index), (self.k, self.v), first, self.scale);
                }
            }
            let out = self.out.chunks_mut(COLUMNS * dim);
            let results = out.zip(self.log_sum.chunks_mut(COLUMNS));
            for (group, (out, log_sum)) in groups.iter().zip(results) {
                for (i, (out, log_sum)) in out.chunks_exact_mut(dim).zip(log_sum).enumerate() {
                    *log_sum = group.largest[i] + group.total[i].ln();
                    let factor = 1.0 / group.total[i];
                    for (index, out) in out.chunks_mut(COLUMNS).enumerate() {
                        for (out, sum) in out.iter_mut().zip(&group.out.strip(index)[i]) {
                            *out = sum * factor;
                        }
                    }
                }
            }
        }
    }

    /// What is known of [`COLUMNS`] queries so far: `m`, `l`, `o`.
    struct Group {
        largest: Lanes,
        total: Lanes,
        out: Strips,
    }

    impl Group {
        /// Adds up to [`KEYS`] keys from `first` on.
        #[inline(always)]
        fn add<S: Simd, const R: usize>(
            &mut self,
            simd: S,
            q: &[Lanes],
            (k, v): (&Strips, &Strips),
            first: usize,
            scale: f32,
        ) {
            let keys = KEYS.min(k.width() - first);
            let mut scores = [[0f32; COLUMNS]; KEYS];
            for (index, scores) in scores[..keys.next_multiple_of(COLUMNS)]
                .chunks_exact_mut(COLUMNS)
                .enumerate()
            {
                let strip = k.strip(first / COLUMNS + index);
                for (part, scores) in scores.as_chunks_mut::<R>().0.iter_mut().enumerate() {
                    columns_times(simd, scores, strip, part * R, q);
                }
            }
            let scores = &mut scores[..keys];
            let mut largest = self.largest;
            for score in scores.iter_mut() {
                for j in 0..COLUMNS {
                    score[j] *= scale;
                    largest[j] = if score[j] > largest[j] {
                        score[j]
                    } else {
                        largest[j]
                    };
                }
            }
            let mut shrink = [0f32; COLUMNS];
            for j in 0..COLUMNS {
                shrink[j] = exp(self.largest[j] - largest[j]);
                self.total[j] *= shrink[j];
            }
            self.largest = largest;
            for score in scores.iter_mut() {
                for j in 0..COLUMNS {
                    score[j] = exp(score[j] - largest[j]);
                    self.total[j] += score[j];
                }
            }
            for index in 0..v.count() {
                let values = &v.strip(index)[first..first + scores.len()];
                let out = self.out.strip_mut(index).as_chunks_mut::<R>().0;
                for (part, out) in out.iter_mut().enumerate() {
                    for (out, shrink) in out.iter_mut().zip(&shrink[part * R..]) {
                        for out in out {
                            *out *= shrink;
                        }
                    }
                    columns_times(simd, out, scores, part * R, values);
                }
            }
        }
    }

    /// One head, as the products of the backward pass read it.
    struct Operands {
        scale: f32,
        dim: usize,
        q_across: Strips,
        q_down: Strips,
        k_across: Strips,
        k_down: Strips,
        v_across: Strips,
        grad_across: Strips,
        grad_down: Strips,
        log_sum: Vec<Lanes>,
        /// `sum(g y)` of each query.
        along: Vec<Lanes>,
    }

    /// Gradients of one head.
    struct Backward<'a> {
        x: Operands,
        dq: &'a mut [f32],
        dk: &'a mut [f32],
        dv: &'a mut [f32],
    }

    impl Kernel for Backward<'_> {
        type Output = ();

        #[inline(always)]
        fn tiles<S: Simd, const R: usize>(self, simd: S) {
            let Self { x, dq, dk, dv } = self;
            let (queries, keys) = (x.q_down.depth(), x.k_down.depth());
            let [mut p, mut ds] = [vec![[0f32; TILE]; TILE], vec![[0f32; TILE]; TILE]];
            let mut of_q = Strips::zeros([queries.next_multiple_of(COLUMNS), x.dim]);
            let tiles = dk.chunks_mut(TILE * x.dim).zip(dv.chunks_mut(TILE * x.dim));
            for (tile, (dk, dv)) in tiles.enumerate() {
                let first = tile * TILE;
                let count = TILE.min(keys - first);
                let mut of_k = Strips::zeros([TILE, x.dim]);
                let mut of_v = Strips::zeros([TILE, x.dim]);
                for query in (0..queries).step_by(TILE) {
                    let rows = TILE.min(queries - query);
                    scores_backward::<S, R>(simd, &x, first, query, &mut p, &mut ds);
                    for index in 0..x.q_down.count() {
                        let grad = &x.grad_down.strip(index)[query..query + rows];
                        let q = &x.q_down.strip(index)[query..query + rows];
                        let of_v = of_v.strip_mut(index).as_chunks_mut::<R>().0;
                        let of_k = of_k.strip_mut(index).as_chunks_mut::<R>().0;
                        for (part, (of_v, of_k)) in of_v.iter_mut().zip(of_k).enumerate() {
                            block_times(simd, of_v, &p, part * R, grad);
                            block_times(simd, of_k, &ds, part * R, q);
                        }
                        let k = &x.k_down.strip(index)[first..first + count];
                        let of_q = &mut of_q.strip_mut(index)[query..];
                        let of_q = &mut of_q[..rows.next_multiple_of(COLUMNS)];
                        for (part, of_q) in of_q.as_chunks_mut::<R>().0.iter_mut().enumerate() {
                            columns_times(simd, of_q, &ds, part * R, k);
                        }
                    }
                }
                unstrip(&of_k, dk, x.dim);
                unstrip(&of_v, dv, x.dim);
            }
            unstrip(&of_q, dq, x.dim);
        }
    }

    /// `p` and `ds` of a tile: keys down, queries across.
    #[inline(always)]
    fn scores_backward<S: Simd, const R: usize>(
        simd: S,
        x: &Operands,
        first: usize,
        query: usize,
        p: &mut [[f32; TILE]],
        ds: &mut [[f32; TILE]],
    ) {
        let strips = (TILE / COLUMNS).min(x.k_across.count() - first / COLUMNS);
        let groups = (TILE / COLUMNS).min(x.q_across.count() - query / COLUMNS);
        for group in 0..groups {
            let index = query / COLUMNS + group;
            let (q, grad) = (x.q_across.strip(index), x.grad_across.strip(index));
            let (log_sum, along) = (&x.log_sum[index], &x.along[index]);
            for strip in 0..strips {
                let k = x.k_across.strip(first / COLUMNS + strip);
                let v = x.v_across.strip(first / COLUMNS + strip);
                for part in 0..COLUMNS / R {
                    let mut scores = [[0f32; COLUMNS]; R];
                    columns_times(simd, &mut scores, k, part * R, q);
                    let mut products = [[0f32; COLUMNS]; R];
                    columns_times(simd, &mut products, v, part * R, grad);
                    for i in 0..R {
                        let key = strip * COLUMNS + part * R + i;
                        let p = &mut p[key][group * COLUMNS..][..COLUMNS];
                        let ds = &mut ds[key][group * COLUMNS..][..COLUMNS];
                        for j in 0..COLUMNS {
                            p[j] = exp(scores[i][j].mul_add(x.scale, -log_sum[j]));
                            ds[j] = p[j] * (products[i][j] - along[j]) * x.scale;
                        }
                    }
                }
            }
        }
    }

    /// Strips of `[tokens, dim]` back into rows.
    #[inline(always)]
    fn unstrip(strips: &Strips, to: &mut [f32], dim: usize) {
        for index in 0..strips.count() {
            for (to, from) in to.chunks_exact_mut(dim).zip(strips.strip(index)) {
                for (to, from) in to[index * COLUMNS..].iter_mut().zip(from) {
                    *to = *from;
                }
            }
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use lora_core::ops::check::{agree, random};

    use super::*;

    #[test]
    fn attention_agrees_with_its_composition() {
        for [b, h, s, t, d] in [
            [1, 1, 1, 1, 2],
            [2, 3, 7, 7, 6],
            [1, 5, 67, 67, 64],
            [2, 2, 130, 130, 34],
            [1, 2, 300, 300, 16],
            [1, 1, 40, 170, 128],
        ] {
            let scale = 1.0 / (d as f64).sqrt();
            if s == t {
                let all = [
                    random([b, h, s, d]),
                    random([b, h, s, d]),
                    random([b, h, s, d]),
                ];
                agree(all, |[q, k, v]| attention(q, k, v, scale, None));
            } else {
                agree([random([b, h, s, d])], |[q]| {
                    attention(q, random([b, h, t, d]), random([b, h, t, d]), scale, None)
                });
                agree([random([b, h, t, d]), random([b, h, t, d])], |[k, v]| {
                    attention(random([b, h, s, d]), k, v, scale, None)
                });
            }
        }
    }

    #[test]
    fn large_scores_give_no_infinity() {
        let [q, k, v] = [40.0, 40.0, 1.0].map(|factor| random([1, 1, 20, 8]) * factor);
        let y = attention(q, k, v, 1.0, None).into_data();
        assert!(y.iter::<f32>().all(f32::is_finite));
    }
}
