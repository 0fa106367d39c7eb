//! `y = x₁ W₁ + x₂ W₂ + ...`: matrix products on slices, of matrices `W` that are read when they are needed.
//!
//! What the products of a linear layer have beside a general one: `W` is frozen, lies in any storage and is made f32 while it
//! is packed, once for all rows of `x`; and the side path of an adapter and the bias are further rows of one long product,
//! `[x, u, 1] [W; Bᵀ; b]`, not further passes over the result.
//!
//! `x` is packed into strips of `R` rows, a panel of the columns of `W` into strips of `C` columns, and a tile `[R, C]` of the
//! result is summed up in registers over some rows of `W`, each element in the order of the rows. These sums are added up in
//! order too, and where they are cut depends on shapes alone: the bits depend neither on the number of threads nor on the
//! width of the vectors.
//!
//! Few rows are not worth the packing: there each line of `W` is read once, and added or multiplied at once.
//!
//! Source: Goto and van de Geijn 2008, doi:10.1145/1356052.1356053; Van Zee and van de Geijn 2015, doi:10.1145/2764454.

use pulp::WithSimd;
use rayon::prelude::*;

use super::kernel::{self, arch, simd};
use super::tile::{Simd, columns_times};

/// Columns of `W` that are packed at a time.
const PANEL: usize = 512;
/// Rows of `W` that are packed at a time, in chunks: a panel takes 2 MiB.
const CHUNKS: usize = 4;
/// Most rows of a chunk, which a tile is summed up over: a strip of so many rows fits into the first cache.
const DEPTH: usize = 256;
/// Rows of `x` that a task takes: so much of a chunk fits into the second cache.
const TALL: usize = 48;
/// Elements that are read from a line of `W` at a time.
const LINE: usize = 64;

/// So many rows are not packed.
const FEW: usize = 4;
/// Elements of a line that are read at a time where there are few rows.
const LONG: usize = 512;

/// Writes the elements of a line of a matrix, the first of the numbers, from the second on.
pub type Read<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

/// A matrix, read by lines as its storage has them.
#[derive(Clone, Copy)]
pub enum Lines<'a> {
    /// Rows.
    Rows(&'a Read<'a>),
    /// Columns.
    Columns(&'a Read<'a>),
}

/// A summand `x W` of [`sum`].
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// `[rows, inner]`.
    pub x: &'a [f32],
    /// `W`, `[inner, columns]`.
    pub weight: Lines<'a>,
}

/// The sum of `products`, `[rows, columns]`.
///
/// # Panics
/// If a left side is not whole rows.
pub fn sum(rows: usize, columns: usize, products: &[Product<'_>]) -> Vec<f32> {
    if rows * columns == 0 {
        return Vec::new();
    }
    if rows <= FEW {
        return of_few_rows(rows, columns, products);
    }
    match is_wide() {
        true => blocked::<32, 12>(rows, columns, products),
        false => blocked::<16, 6>(rows, columns, products),
    }
}

fn of_few_rows(rows: usize, columns: usize, products: &[Product<'_>]) -> Vec<f32> {
    let mut y = vec![0f32; rows * columns];
    for Product { x, weight } in products {
        match weight {
            Lines::Rows(read) => add_rows(&mut y, x, columns, read),
            Lines::Columns(read) => add_columns(&mut y, x, columns, read),
        }
    }
    y
}

/// Adds `x W`, with `W` read by rows: a task takes some of them.
fn add_rows(y: &mut [f32], x: &[f32], columns: usize, read: &Read<'_>) {
    let inner = x.len() * columns / y.len();
    let parts: Vec<Vec<f32>> = (0..inner.div_ceil(DEPTH))
        .into_par_iter()
        .map(|task| {
            let mut sums = vec![0f32; y.len()];
            let mut line = [0f32; LONG];
            for k in task * DEPTH..inner.min((task + 1) * DEPTH) {
                for first in (0..columns).step_by(LONG) {
                    let line = &mut line[..LONG.min(columns - first)];
                    read(k, first, line);
                    for (sums, x) in sums.chunks_exact_mut(columns).zip(x.chunks_exact(inner)) {
                        let (x, sums) = (x[k], &mut sums[first..][..line.len()]);
                        simd(
                            #[inline(always)]
                            || {
                                for (sum, line) in sums.iter_mut().zip(&*line) {
                                    *sum = x.mul_add(*line, *sum);
                                }
                            },
                        );
                    }
                }
            }
            sums
        })
        .collect();
    for part in parts {
        for (y, part) in y.iter_mut().zip(part) {
            *y += part;
        }
    }
}

/// Adds `x W`, with `W` read by columns: a task takes some of them.
fn add_columns(y: &mut [f32], x: &[f32], columns: usize, read: &Read<'_>) {
    let rows = y.len() / columns;
    let inner = x.len() / rows;
    let parts: Vec<Vec<f32>> = (0..columns.div_ceil(LINE))
        .into_par_iter()
        .map(|task| {
            let columns = task * LINE..columns.min((task + 1) * LINE);
            let mut sums = vec![0f32; rows * columns.len()];
            let mut line = [0f32; LONG];
            for (column, sums) in columns.zip(sums.chunks_exact_mut(rows)) {
                for k in (0..inner).step_by(LONG) {
                    let line = &mut line[..LONG.min(inner - k)];
                    read(column, k, line);
                    for (sum, x) in sums.iter_mut().zip(x.chunks_exact(inner)) {
                        let x = &x[k..][..line.len()];
                        *sum += simd(
                            #[inline(always)]
                            || kernel::sum([x, line], |[x, w]| x * w),
                        );
                    }
                }
            }
            sums
        })
        .collect();
    for (column, sums) in parts
        .iter()
        .flat_map(|part| part.chunks_exact(rows))
        .enumerate()
    {
        for (row, sum) in sums.iter().enumerate() {
            y[row * columns + column] += sum;
        }
    }
}

/// Whether a vector has 16 lanes: tiles have two vectors a row, and as many rows as registers allow.
fn is_wide() -> bool {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    arch().dispatch(Lanes) == 16
}

fn blocked<const C: usize, const R: usize>(
    rows: usize,
    columns: usize,
    products: &[Product<'_>],
) -> Vec<f32> {
    let mut y = vec![0f32; rows * columns];
    let (x, inner) = pack_left::<R>(rows, products);
    let depth = inner.div_ceil(inner.div_ceil(DEPTH).max(1)).max(1);
    let mut packed = vec![[0f32; C]; PANEL.min(columns).div_ceil(C) * inner.min(CHUNKS * depth)];
    for first in (0..columns).step_by(PANEL) {
        let width = PANEL.min(columns - first);
        for k in (0..inner).step_by(CHUNKS * depth) {
            let deep = inner.min(k + CHUNKS * depth) - k;
            let packed = &mut packed[..width.div_ceil(C) * deep];
            let tasks = packed.par_chunks_mut(LINE / C * deep).enumerate();
            tasks.for_each(|(task, strips)| {
                let first = first + task * LINE;
                pack_right(products, rows, k, [first, columns], strips, deep);
            });
            let tasks = y.par_chunks_mut(TALL * columns);
            let tasks = tasks.zip(x.par_chunks(TALL / R * inner));
            tasks.for_each(|(y, x)| {
                arch().dispatch(Rows::<C, R> {
                    y,
                    x,
                    strips: packed,
                    inner,
                    k,
                    deep,
                    depth,
                    first,
                    columns,
                })
            });
        }
    }
    y
}

/// All left sides beside each other, `[rows / R, inner, R]`, filled up with zeros, and `inner`.
fn pack_left<const R: usize>(rows: usize, products: &[Product<'_>]) -> (Vec<[f32; R]>, usize) {
    let widths = products.iter().map(|product| product.x.len() / rows);
    let inner: usize = widths.sum();
    let mut packed = vec![[0f32; R]; rows.div_ceil(R) * inner];
    let tasks = packed.par_chunks_mut(inner.max(1)).enumerate();
    tasks.for_each(|(task, strip)| {
        let first = task * R;
        let mut rest = strip;
        for Product { x, .. } in products {
            let width = x.len() / rows;
            assert_eq!(width * rows, x.len(), "whole rows");
            let (strip, later) = rest.split_at_mut(width);
            for (part, strip) in strip.chunks_mut(LINE).enumerate() {
                for i in 0..R.min(rows - first) {
                    let row = &x[(first + i) * width + part * LINE..][..strip.len()];
                    for (to, from) in strip.iter_mut().zip(row) {
                        to[i] = *from;
                    }
                }
            }
            rest = later;
        }
    });
    (packed, inner)
}

/// Strips of `deep` rows from `k` on, from column `first` on.
fn pack_right<const C: usize>(
    products: &[Product<'_>],
    rows: usize,
    k: usize,
    [first, columns]: [usize; 2],
    strips: &mut [[f32; C]],
    deep: usize,
) {
    let mut before = 0;
    for Product { x, weight } in products {
        let own = x.len() / rows;
        // the rows of this matrix that are among the rows asked for
        let (from, to) = (k.max(before), (k + deep).min(before + own));
        if from < to {
            let rows = from - before..to - before;
            match weight {
                Lines::Rows(read) => {
                    for (i, row) in rows.enumerate() {
                        let mut line = [0f32; LINE];
                        let count = LINE.min(columns - first);
                        read(row, first, &mut line[..count]);
                        let strips = strips.chunks_exact_mut(deep);
                        for (strip, line) in strips.zip(line.as_chunks::<C>().0) {
                            strip[from - k + i] = *line;
                        }
                    }
                }
                Lines::Columns(read) => {
                    for (index, strip) in strips.chunks_exact_mut(deep).enumerate() {
                        let first = first + index * C;
                        let mut at = rows.start;
                        for to in strip[from - k..to - k].chunks_mut(LINE) {
                            let mut block = [[0f32; LINE]; C];
                            let lines = block.iter_mut().take(columns - first);
                            for (j, line) in lines.enumerate() {
                                read(first + j, at, &mut line[..to.len()]);
                            }
                            for (k, to) in to.iter_mut().enumerate() {
                                for (to, line) in to.iter_mut().zip(&block) {
                                    *to = line[k];
                                }
                            }
                            at += to.len();
                        }
                    }
                }
            }
        }
        before += own;
    }
}

/// Some rows of the result, and what a packed panel adds to them.
struct Rows<'a, const C: usize, const R: usize> {
    y: &'a mut [f32],
    x: &'a [[f32; R]],
    /// Columns from `first` on, `deep` rows from `k` on.
    strips: &'a [[f32; C]],
    inner: usize,
    k: usize,
    deep: usize,
    /// Rows of a chunk.
    depth: usize,
    first: usize,
    columns: usize,
}

impl<const C: usize, const R: usize> WithSimd for Rows<'_, C, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for from in (0..self.deep).step_by(self.depth) {
            let chunk = self.depth.min(self.deep - from);
            for (index, strip) in self.strips.chunks_exact(self.deep).enumerate() {
                let strip = &strip[from..from + chunk];
                let first = self.first + index * C;
                let last = self.columns.min(first + C);
                let y = self.y.chunks_mut(R * self.columns);
                for (y, x) in y.zip(self.x.chunks_exact(self.inner)) {
                    let mut sums = [[0f32; C]; R];
                    let x = &x[self.k + from..][..chunk];
                    columns_times(simd, &mut sums, x, 0, strip);
                    for (y, sums) in y.chunks_exact_mut(self.columns).zip(&sums) {
                        let y = &mut y[first..last];
                        match y.first_chunk_mut::<C>() {
                            Some(y) => {
                                for j in 0..C {
                                    y[j] += sums[j];
                                }
                            }
                            None => {
                                for (y, sum) in y.iter_mut().zip(sums) {
                                    *y += sum;
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::same_bits_with_any_threads_and_vectors;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    /// `x W + u V + 1 b`, with `W` read by columns, `V` and `b` by rows.
    fn three(rows: usize, inner: usize, rank: usize, columns: usize) -> Vec<f32> {
        let (x, u, ones) = (numbers(rows * inner), numbers(rows * rank), vec![1.0; rows]);
        let (w, v) = (numbers(inner * columns), numbers(rank * columns));
        let products = [
            Product {
                x: &x,
                weight: Lines::Columns(&|j, k, to| {
                    to.copy_from_slice(&w[j * inner + k..][..to.len()])
                }),
            },
            Product {
                x: &u,
                weight: Lines::Rows(&|k, j, to| {
                    to.copy_from_slice(&v[k * columns + j..][..to.len()])
                }),
            },
            Product {
                x: &ones,
                weight: Lines::Rows(&|_, j, to| to.copy_from_slice(&v[j..][..to.len()])),
            },
        ];
        let y = sum(rows, columns, &products);
        for (i, &found) in y.iter().enumerate() {
            let (row, j) = (i / columns, i % columns);
            let dot = |n, term: &dyn Fn(usize) -> (f32, f32)| -> f64 {
                (0..n)
                    .map(term)
                    .map(|(a, b)| f64::from(a) * f64::from(b))
                    .sum()
            };
            let expected = dot(inner, &|k| (x[row * inner + k], w[j * inner + k]))
                + dot(rank, &|k| (u[row * rank + k], v[k * columns + j]))
                + f64::from(v[j]);
            let distance = (f64::from(found) - expected).abs();
            assert!(
                distance < 2e-5 * (inner + rank) as f64,
                "{i}: {found}, not {expected}"
            );
        }
        y
    }

    #[test]
    fn sums_of_products_agree_with_their_sums_on_odd_shapes() {
        for [rows, inner, rank, columns] in [
            [1, 1, 1, 1],
            [5, 33, 3, 17],
            [48, 256, 16, 512],
            [97, 1100, 7, 600],
            [1, 1100, 7, 600],
            [4, 300, 3, 30],
            [13, 511, 1, 1030],
        ] {
            three(rows, inner, rank, columns);
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_vectors() {
        for rows in [3, 101] {
            same_bits_with_any_threads_and_vectors(|| three(rows, 700, 5, 530));
        }
    }

    #[test]
    fn nothing_gives_zeros() {
        assert_eq!(sum(2, 3, &[]), [0.0; 6]);
        let nothing = Product {
            x: &[],
            weight: Lines::Rows(&|_, _, _| panic!("there are no rows")),
        };
        assert_eq!(sum(2, 3, &[nothing]), [0.0; 6]);
        assert!(sum(0, 3, &[nothing]).is_empty());
    }
}
