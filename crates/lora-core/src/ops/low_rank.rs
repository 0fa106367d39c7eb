//! Products with a narrow matrix: into the low-rank space, out of it, and the gradients of the factors.

use rayon::prelude::*;

use super::kernel::ROWS;
use super::tile::{self, Kernel, Simd, columns_times, copy, rows_times};

/// Columns of a strip: one vector of AVX-512, and the usual rank.
const COLUMNS: usize = 16;

/// In tiles of 8 rows, of 4 where vectors are shorter.
fn run<K: Kernel>(kernel: K) -> K::Output {
    tile::run::<K, 8, 4>(kernel)
}

type Lanes = [f32; COLUMNS];

/// A narrow matrix in strips.
pub type Strips = tile::Strips<COLUMNS>;

/// `R` rows of a matrix; those past its end repeat the last.
#[inline(always)]
fn rows<const R: usize>(x: &[f32], width: usize) -> [&[f32]; R] {
    let last = x.len() / width - 1;
    std::array::from_fn(|i| &x[i.min(last) * width..][..width])
}

/// `scale * x down`: `[rows, width of down]`.
///
/// # Shapes
/// - `x`: `[rows, depth of down]`
pub fn project(x: &[f32], down: &Strips, scale: f32) -> Vec<f32> {
    let rank = down.width();
    let mut low = vec![0f32; x.len() / down.depth() * rank];
    let tasks = low
        .par_chunks_mut(ROWS * rank)
        .zip(x.par_chunks(ROWS * down.depth()));
    tasks.for_each(|(low, x)| {
        run(Project {
            x,
            down,
            scale,
            low,
        })
    });
    low
}

/// Some rows of [`project`].
struct Project<'a> {
    x: &'a [f32],
    down: &'a Strips,
    scale: f32,
    low: &'a mut [f32],
}

impl Kernel for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn tiles<S: Simd, const R: usize>(self, simd: S) {
        let (depth, rank) = (self.down.depth(), self.down.width());
        for (low, x) in self.low.chunks_mut(R * rank).zip(self.x.chunks(R * depth)) {
            let x = rows::<R>(x, depth);
            for index in 0..self.down.count() {
                let mut sums = [[0f32; COLUMNS]; R];
                rows_times(simd, &mut sums, x, self.down.strip(index));
                let first = index * COLUMNS;
                for (low, sums) in low.chunks_exact_mut(rank).zip(&sums) {
                    for (low, sum) in low[first..].iter_mut().zip(sums) {
                        *low = self.scale * sum;
                    }
                }
            }
        }
    }
}

/// `y += mask * (low up)`.
///
/// # Shapes
/// - `y`, `mask`: `[rows, width of up]`, `low`: `[rows, depth of up]`
pub fn expand(y: &mut [f32], low: &[f32], up: &Strips, mask: &[f32]) {
    let step = ROWS * up.width();
    let tasks = y
        .par_chunks_mut(step)
        .zip(mask.par_chunks(step))
        .zip(low.par_chunks(ROWS * up.depth()));
    tasks.for_each(|((y, mask), low)| run(Expand { y, low, up, mask }));
}

/// Some rows of [`expand`].
struct Expand<'a> {
    y: &'a mut [f32],
    low: &'a [f32],
    up: &'a Strips,
    mask: &'a [f32],
}

impl Kernel for Expand<'_> {
    type Output = ();

    #[inline(always)]
    fn tiles<S: Simd, const R: usize>(self, simd: S) {
        let (rank, width) = (self.up.depth(), self.up.width());
        let blocks = self.y.chunks_mut(R * width).zip(self.low.chunks(R * rank));
        for (block, (y, low)) in blocks.enumerate() {
            let low = rows::<R>(low, rank);
            for index in 0..self.up.count() {
                let mut sums = [[0f32; COLUMNS]; R];
                rows_times(simd, &mut sums, low, self.up.strip(index));
                let first = index * COLUMNS;
                let columns = COLUMNS.min(width - first);
                for (i, (y, sums)) in y.chunks_exact_mut(width).zip(&mut sums).enumerate() {
                    let mask = &self.mask[(block * R + i) * width + first..][..columns];
                    for (sum, mask) in sums.iter_mut().zip(mask) {
                        *sum *= mask;
                    }
                    match y[first..first + columns].first_chunk_mut::<COLUMNS>() {
                        Some(y) => {
                            for j in 0..COLUMNS {
                                y[j] += sums[j];
                            }
                        }
                        None => {
                            for (y, sum) in y[first..].iter_mut().zip(&*sums) {
                                *y += sum;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Columns of a task of [`outer`], and rows that it takes at a time.
const OUTER: [usize; 2] = [128, 16];

/// `lowᵀ x`: `[rank, width]`.
///
/// # Shapes
/// - `low`: `[rows, rank]`, `x`: `[rows, width]`
pub fn outer(low: &[f32], x: &[f32], [rank, width]: [usize; 2]) -> Vec<f32> {
    let mut result = vec![0f32; rank * width];
    let parts: Vec<Vec<Lanes>> = (0..width.div_ceil(OUTER[0]))
        .into_par_iter()
        .map(|task| {
            run(Outer {
                low,
                x,
                rank,
                width,
                first: task * OUTER[0],
            })
        })
        .collect();
    for (task, part) in parts.iter().enumerate() {
        let first = task * OUTER[0];
        let columns = OUTER[0].min(width - first);
        let rows = result.chunks_exact_mut(width);
        for (result, part) in rows.zip(part.chunks_exact(OUTER[0] / COLUMNS)) {
            result[first..first + columns].copy_from_slice(&part.as_flattened()[..columns]);
        }
    }
    result
}

/// Columns of [`outer`] from `first` on, with gaps: `[rank rounded up, OUTER[0]]`.
struct Outer<'a> {
    low: &'a [f32],
    x: &'a [f32],
    rank: usize,
    width: usize,
    first: usize,
}

impl Kernel for Outer<'_> {
    type Output = Vec<Lanes>;

    #[inline(always)]
    fn tiles<S: Simd, const R: usize>(self, simd: S) -> Vec<Lanes> {
        const STRIPS: usize = OUTER[0] / COLUMNS;
        let Self {
            low,
            x,
            rank,
            width,
            first,
        } = self;
        let columns = OUTER[0].min(width - first);
        let mut sums = vec![[0f32; COLUMNS]; rank.next_multiple_of(R) * STRIPS];
        let mut block = [[[0f32; COLUMNS]; OUTER[1]]; STRIPS];
        let steps = low.chunks(OUTER[1] * rank).zip(x.chunks(OUTER[1] * width));
        for (low, x) in steps {
            let count = low.len() / rank;
            for (k, x) in x.chunks_exact(width).enumerate() {
                let x = x[first..first + columns].chunks(COLUMNS);
                for (block, x) in block.iter_mut().zip(x) {
                    copy(x, &mut block[k]);
                }
            }
            for (group, sums) in sums.chunks_exact_mut(R * STRIPS).enumerate() {
                let ranks = R.min(rank - group * R);
                let mut weights = [[0f32; R]; OUTER[1]];
                for (weights, low) in weights.iter_mut().zip(low.chunks_exact(rank)) {
                    weights[..ranks].copy_from_slice(&low[group * R..][..ranks]);
                }
                for (index, block) in block.iter().enumerate() {
                    let mut tile = [[0f32; COLUMNS]; R];
                    for i in 0..R {
                        tile[i] = sums[i * STRIPS + index];
                    }
                    columns_times(simd, &mut tile, &weights[..count], 0, &block[..count]);
                    for i in 0..R {
                        sums[i * STRIPS + index] = tile[i];
                    }
                }
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    fn near(found: &[f32], expected: impl Fn(usize) -> f64) {
        for (i, &found) in found.iter().enumerate() {
            let expected = expected(i);
            let distance = (f64::from(found) - expected).abs();
            assert!(distance < 1e-4, "{i}: {found}, not {expected}");
        }
    }

    #[test]
    fn products_agree_with_their_sums_on_odd_shapes() {
        for [n, depth, rank] in [[1, 1, 1], [5, 33, 3], [37, 130, 16], [70, 300, 21]] {
            let (x, down) = (numbers(n * depth), numbers(depth * rank));
            let strips = Strips::of([depth, rank], |k| &down[k * rank..][..rank]);
            let low = project(&x, &strips, 0.5);
            let dot = |terms: usize, term: &dyn Fn(usize) -> f32| {
                (0..terms).map(|k| f64::from(term(k))).sum::<f64>()
            };
            near(&low, |i| {
                0.5 * dot(depth, &|k| {
                    x[i / rank * depth + k] * down[k * rank + i % rank]
                })
            });
            let mut y = x.clone();
            let up = Strips::of_columns([rank, depth], |j| &down[j * rank..][..rank]);
            expand(&mut y, &low, &up, &x);
            near(&y, |i| {
                let (row, column) = (i / depth, i % depth);
                let product = dot(rank, &|r| low[row * rank + r] * down[column * rank + r]);
                f64::from(x[i]) * (1.0 + product)
            });
            near(&outer(&low, &x, [rank, depth]), |i| {
                dot(n, &|row| {
                    low[row * rank + i / depth] * x[row * depth + i % depth]
                })
            });
        }
    }
}
