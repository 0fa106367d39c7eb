//! Small matrix products on slices, for where a general product would spend its time on packing.
//!
//! One operand lies in strips of some columns, a tile of the result stays in registers, and the loop over the inner dimension
//! adds element by element in its order: the bits depend on neither the height of the tile nor the number of threads.

pub use pulp::Simd;
use pulp::WithSimd;

/// A kernel whose tiles are as tall as registers allow.
pub trait Kernel {
    /// What it gives.
    type Output;

    /// Runs it in tiles of `R` rows. This and all it calls must be inlined.
    fn tiles<S: Simd, const R: usize>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` with the best vector unit of this CPU, in tiles of `TALL` rows with vectors of 16 lanes and of `LOW` rows with
/// shorter ones.
pub fn run<K: Kernel, const TALL: usize, const LOW: usize>(kernel: K) -> K::Output {
    super::kernel::arch().dispatch(ByLanes::<K, TALL, LOW>(kernel))
}

struct ByLanes<K, const TALL: usize, const LOW: usize>(K);

impl<K: Kernel, const TALL: usize, const LOW: usize> WithSimd for ByLanes<K, TALL, LOW> {
    type Output = K::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> K::Output {
        match S::F32_LANES {
            16 => self.0.tiles::<S, TALL>(simd),
            _ => self.0.tiles::<S, LOW>(simd),
        }
    }
}

/// A matrix `[depth, width]` cut into strips of `C` columns, filled up with zeros: `[width / C, depth, C]`.
pub struct Strips<const C: usize> {
    values: Vec<[f32; C]>,
    depth: usize,
    width: usize,
}

impl<const C: usize> Strips<C> {
    /// Nothing but zeros.
    pub fn zeros([depth, width]: [usize; 2]) -> Self {
        Self {
            values: vec![[0.0; C]; width.div_ceil(C) * depth],
            depth,
            width,
        }
    }

    /// `row(k)` is the row `k` of the matrix.
    pub fn of<'a>([depth, width]: [usize; 2], row: impl Fn(usize) -> &'a [f32]) -> Self {
        let mut strips = Self::zeros([depth, width]);
        for k in 0..depth {
            for (i, from) in row(k).chunks(C).enumerate() {
                copy(from, &mut strips.values[i * depth + k]);
            }
        }
        strips
    }

    /// `column(j)` is the column `j` of the matrix.
    pub fn of_columns<'a>([depth, width]: [usize; 2], column: impl Fn(usize) -> &'a [f32]) -> Self {
        let mut strips = Self::zeros([depth, width]);
        for (i, strip) in strips.values.chunks_exact_mut(depth.max(1)).enumerate() {
            let first = i * C;
            for j in 0..C.min(width - first) {
                for (to, &from) in strip.iter_mut().zip(column(first + j)) {
                    to[j] = from;
                }
            }
        }
        strips
    }

    /// Rows of the matrix.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Columns of the matrix.
    pub fn width(&self) -> usize {
        self.width
    }

    /// How many strips there are.
    pub fn count(&self) -> usize {
        self.width.div_ceil(C)
    }

    /// The columns from `index * 16` on.
    #[inline(always)]
    pub fn strip(&self, index: usize) -> &[[f32; C]] {
        &self.values[index * self.depth..][..self.depth]
    }

    /// The columns from `index * 16` on.
    #[inline(always)]
    pub fn strip_mut(&mut self, index: usize) -> &mut [[f32; C]] {
        &mut self.values[index * self.depth..][..self.depth]
    }
}

/// Copies `from`, which may be shorter; a whole strip's width needs no call.
#[inline(always)]
pub fn copy<const C: usize>(from: &[f32], to: &mut [f32; C]) {
    match from.first_chunk::<C>() {
        Some(from) => *to = *from,
        None => to[..from.len()].copy_from_slice(from),
    }
}

/// `sums[i][j] += sum over k of x[i][k] * strip[k][j]`.
#[inline(always)]
pub fn rows_times<S: Simd, const R: usize, const C: usize>(
    simd: S,
    sums: &mut [[f32; C]; R],
    x: [&[f32]; R],
    strip: &[[f32; C]],
) {
    let x = x.map(|row| &row[..strip.len()]);
    add(simd, sums, strip, |k, i| x[i][k]);
}

/// `sums[i][j] += sum over k of x[k][first + i] * strip[k][j]`.
#[inline(always)]
pub fn columns_times<S: Simd, const R: usize, const C: usize, const N: usize>(
    simd: S,
    sums: &mut [[f32; C]; R],
    x: &[[f32; N]],
    first: usize,
    strip: &[[f32; C]],
) {
    let x = &x[..strip.len()];
    assert!(first + R <= N);
    add(simd, sums, strip, |k, i| x[k][first + i]);
}

/// `sums[i][j] += sum over k of x[first + i][k] * strip[k][j]`.
#[inline(always)]
pub fn block_times<S: Simd, const R: usize, const C: usize, const N: usize>(
    simd: S,
    sums: &mut [[f32; C]; R],
    x: &[[f32; N]],
    first: usize,
    strip: &[[f32; C]],
) {
    let x = &x[first..first + R];
    assert!(strip.len() <= N);
    add(simd, sums, strip, |k, i| x[i][k]);
}

/// `sums[i][j] += sum over k of x(k, i) * strip[k][j]`.
#[inline(always)]
fn add<S: Simd, const R: usize, const C: usize>(
    simd: S,
    sums: &mut [[f32; C]; R],
    strip: &[[f32; C]],
    x: impl Fn(usize, usize) -> f32,
) {
    match C / S::F32_LANES {
        1 => add_vectors::<S, R, C, 1>(simd, sums, strip, x),
        2 => add_vectors::<S, R, C, 2>(simd, sums, strip, x),
        4 => add_vectors::<S, R, C, 4>(simd, sums, strip, x),
        8 => add_vectors::<S, R, C, 8>(simd, sums, strip, x),
        _ => {
            for (k, strip) in strip.iter().enumerate() {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = x(k, i);
                    for (sum, strip) in sums.iter_mut().zip(strip) {
                        *sum = x.mul_add(*strip, *sum);
                    }
                }
            }
        }
    }
}

/// As [`add`], with `V` vectors a row. LLVM does not keep arrays of numbers in registers here, but arrays of vectors.
#[expect(
    clippy::needless_range_loop,
    reason = "indices of constant range are what keeps the tile in registers"
)]
#[inline(always)]
fn add_vectors<S: Simd, const R: usize, const C: usize, const V: usize>(
    simd: S,
    sums: &mut [[f32; C]; R],
    strip: &[[f32; C]],
    x: impl Fn(usize, usize) -> f32,
) {
    let mut tile = [[simd.splat_f32s(0.0); V]; R];
    for i in 0..R {
        let (from, _) = S::as_simd_f32s(&sums[i]);
        tile[i].copy_from_slice(&from[..V]);
    }
    for (k, strip) in strip.iter().enumerate() {
        let (strip, _) = S::as_simd_f32s(strip);
        let strip = &strip[..V];
        for i in 0..R {
            let x = simd.splat_f32s(x(k, i));
            for v in 0..V {
                tile[i][v] = simd.mul_add_f32s(x, strip[v], tile[i][v]);
            }
        }
    }
    for i in 0..R {
        let (to, _) = S::as_mut_simd_f32s(&mut sums[i]);
        to[..V].copy_from_slice(&tile[i]);
    }
}
