//! `y = x₁ W₁ + x₂ W₂ + ...`: matrix products on slices, of matrices `W` that are read when they are needed.
//!
//! What the products of a linear layer have beside a general one: `W` is frozen, lies in any storage and is made f32 while it
//! is packed, once for all rows of `x`; and the side path of an adapter and the bias are further rows of one long product,
//! `[x, u, 1] [W; Bᵀ; b]`, not further passes over the result.
//!
//! `x` is packed into strips of `R` rows. A task takes a panel of the columns of `W` and all rows of the result: it packs some
//! rows of the panel at a time into strips of `C` columns, and sums up tiles `[R, C]` of the result over them in registers,
//! each element in the order of the rows. These sums are added up in order too, and where they are cut depends on shapes
//! alone: the bits depend neither on the number of threads nor on the width of the vectors.
//!
//! Few rows are not worth the packing: there each line of `W` is read once, and added or multiplied at once.
//!
//! Source: Goto and van de Geijn 2008, doi:10.1145/1356052.1356053; Van Zee and van de Geijn 2015, doi:10.1145/2764454.

use pulp::WithSimd;
use rayon::prelude::*;

use super::kernel::{self, arch, simd};
use super::tile::{Simd, columns_times};

/// Columns of a panel. A wide one has twice as many: of each row of `W` that many adjacent elements are read at a time, and
/// what is not in a cache comes the faster the more of it is read in one go.
const LINE: usize = 64;
const WIDE: usize = 2 * LINE;
/// Most rows of `W` that are packed at a time, which a tile is summed up over: a strip of so many rows fits into the first cache.
const DEPTH: usize = 256;
/// Rows of `x` that are taken at a time: they and a packed panel fit into the second cache.
const TALL: usize = 48;

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
    if rows * columns == 0 || products.iter().all(|product| product.x.is_empty()) {
        return vec![0.0; rows * columns];
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
    let depth = inner.div_ceil(inner.div_ceil(DEPTH));
    let width = panel_width(columns);
    let mut panels: Vec<Vec<&mut [f32]>> = Vec::new();
    panels.resize_with(columns.div_ceil(width), || Vec::with_capacity(rows));
    for row in y.chunks_exact_mut(columns) {
        for (panel, part) in panels.iter_mut().zip(row.chunks_mut(width)) {
            panel.push(part);
        }
    }
    let memory = || vec![[0f32; C]; width / C * depth];
    let tasks = panels.into_par_iter().enumerate();
    tasks.for_each_init(memory, |packed, (index, mut y)| {
        let first = index * width;
        let strips = width.min(columns - first).div_ceil(C);
        for k in (0..inner).step_by(depth) {
            let depth = depth.min(inner - k);
            let strips = &mut packed[..strips * depth];
            pack_right(products, rows, k, [first, columns], strips, depth);
            arch().dispatch(Panel::<C, R> {
                y: &mut y,
                x: &x,
                inner,
                k,
                strips,
                depth,
            });
        }
    });
    y
}

/// Columns of a panel: wide where there are enough for all threads. No bit depends on it.
fn panel_width(columns: usize) -> usize {
    match columns >= 4 * rayon::current_num_threads() * WIDE {
        true => WIDE,
        false => LINE,
    }
}

/// All left sides beside each other, `[rows / R, inner, R]`, filled up with zeros, and `inner`.
fn pack_left<const R: usize>(rows: usize, products: &[Product<'_>]) -> (Vec<[f32; R]>, usize) {
    let widths = products.iter().map(|product| product.x.len() / rows);
    let inner: usize = widths.sum();
    let mut packed = vec![[0f32; R]; rows.div_ceil(R) * inner];
    let tasks = packed.par_chunks_mut(inner).enumerate();
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
                    let mut line = [0f32; WIDE];
                    let count = (strips.len() / deep * C).min(columns - first);
                    for (i, row) in rows.enumerate() {
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
                        let mut block = [[0f32; DEPTH]; C];
                        for to in strip[from - k..to - k].chunks_mut(DEPTH) {
                            let lines = block.iter_mut().take(columns - first);
                            for (j, line) in lines.enumerate() {
                                read(first + j, at, &mut line[..to.len()]);
                            }
                            transpose(&block, to);
                            at += to.len();
                        }
                    }
                }
            }
        }
        before += own;
    }
}

/// `to[k][j] = lines[j][k]`, in squares that LLVM turns by shuffling.
fn transpose<const C: usize>(lines: &[[f32; DEPTH]; C], to: &mut [[f32; C]]) {
    let (squares, rest) = to.as_chunks_mut::<4>();
    let whole = 4 * squares.len();
    for (k, to) in squares.iter_mut().enumerate() {
        for (j, lines) in lines.as_chunks::<4>().0.iter().enumerate() {
            let square = lines.each_ref().map(|line| line.as_chunks::<4>().0[k]);
            for (i, to) in to.iter_mut().enumerate() {
                to.as_chunks_mut::<4>().0[j] = square.map(|line| line[i]);
            }
        }
    }
    for (k, to) in rest.iter_mut().enumerate() {
        for (to, line) in to.iter_mut().zip(lines) {
            *to = line[whole + k];
        }
    }
}

/// Adds what packed rows of a panel give to its columns of the result.
struct Panel<'a, 'y, const C: usize, const R: usize> {
    y: &'a mut [&'y mut [f32]],
    x: &'a [[f32; R]],
    inner: usize,
    /// The packed rows: `depth` of them from `k` on.
    k: usize,
    strips: &'a [[f32; C]],
    depth: usize,
}

impl<const C: usize, const R: usize> WithSimd for Panel<'_, '_, C, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let tall = self.x.chunks(TALL / R * self.inner);
        for (y, x) in self.y.chunks_mut(TALL).zip(tall) {
            for (index, strip) in self.strips.chunks_exact(self.depth).enumerate() {
                for (y, x) in y.chunks_mut(R).zip(x.chunks_exact(self.inner)) {
                    let mut sums = [[0f32; C]; R];
                    let x = &x[self.k..][..self.depth];
                    columns_times(simd, &mut sums, x, 0, strip);
                    for (y, sums) in y.iter_mut().zip(&sums) {
                        let y = &mut y[index * C..];
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
