//! Dense linear algebra on the host in f64: thin QR and the singular value decompositions that the combination of adapters,
//! `pissa` and `olora` need.
//!
//! Every sum runs in one fixed order, whatever the number of threads, so equal input gives equal bits.

use std::thread;

use crate::random::Stream;

/// A matrix, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub fn new(rows: usize, cols: usize, data: Vec<f64>) -> Self {
        assert_eq!(rows * cols, data.len(), "{rows} x {cols} and values differ");
        Self { rows, cols, data }
    }

    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self::new(rows, cols, vec![0.0; rows * cols])
    }

    /// The elements, row by row, rounded.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&v| v as f32).collect()
    }

    /// Independent standard normals.
    pub fn normal(rows: usize, cols: usize, stream: &mut Stream) -> Self {
        let values = (0..rows * cols).map(|_| stream.normal()).collect();
        Self::new(rows, cols, values)
    }

    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..][..self.cols]
    }

    pub fn row_mut(&mut self, i: usize) -> &mut [f64] {
        &mut self.data[i * self.cols..][..self.cols]
    }

    pub fn transposed(&self) -> Self {
        const TILE: usize = 32;
        let mut out = Self::zeros(self.cols, self.rows);
        for top in (0..self.rows).step_by(TILE) {
            for left in (0..self.cols).step_by(TILE) {
                for i in top..self.rows.min(top + TILE) {
                    for j in left..self.cols.min(left + TILE) {
                        out.data[j * self.rows + i] = self.data[i * self.cols + j];
                    }
                }
            }
        }
        out
    }

    /// The first `n` rows.
    pub fn top(&self, n: usize) -> Self {
        Self::new(n, self.cols, self.data[..n * self.cols].to_vec())
    }

    /// Row `i` times `factors[i]`.
    pub fn scale_rows(mut self, factors: &[f64]) -> Self {
        for (i, factor) in factors.iter().enumerate() {
            self.row_mut(i).iter_mut().for_each(|v| *v *= factor);
        }
        self
    }

    pub fn scaled(mut self, factor: f64) -> Self {
        self.data.iter_mut().for_each(|v| *v *= factor);
        self
    }

    /// `self * other`, `[m, k] x [k, n]`.
    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.cols, other.rows, "inner sizes");
        let n = other.cols;
        let mut out = Self::zeros(self.rows, n);
        in_parallel(&mut out.data, n, self.cols * n, |first, rows| {
            for (i, out) in rows.chunks_mut(n).enumerate() {
                for (&a, row) in self.row(first + i).iter().zip(other.data.chunks(n)) {
                    add(out, a, row);
                }
            }
        });
        out
    }
}

fn add(out: &mut [f64], a: f64, row: &[f64]) {
    for (out, v) in out.iter_mut().zip(row) {
        *out += a * v;
    }
}

/// A dot product in eight partial sums.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8
        .remainder()
        .iter()
        .zip(b8.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f64>() + rest
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// Runs `f(index of its first row, rows)` on parts of `out`, rows of `width` that cost `work` multiplications each.
fn in_parallel(out: &mut [f64], width: usize, work: usize, f: impl Fn(usize, &mut [f64]) + Sync) {
    let rows = out.len() / width.max(1);
    let threads = match rows.saturating_mul(work) {
        0..1_000_000 => 1,
        _ => thread::available_parallelism().map_or(1, usize::from),
    };
    let part = rows.div_ceil(threads).max(1);
    if out.is_empty() {
        return;
    }
    if threads == 1 {
        return f(0, out);
    }
    thread::scope(|scope| {
        for (i, rows) in out.chunks_mut(part * width).enumerate() {
            let f = &f;
            scope.spawn(move || f(i * part, rows));
        }
    });
}

/// Thin QR by Householder reflections, with LAPACK's signs: `Q: [m, k]`, `R: [k, n]`, `k = min(m, n)`.
pub(crate) fn qr(matrix: &Matrix) -> (Matrix, Matrix) {
    let (m, n) = (matrix.rows, matrix.cols);
    let k = m.min(n);
    let mut columns = matrix.transposed(); // row j is column j
    let mut reflections = Vec::with_capacity(k);
    for j in 0..k {
        let column = &columns.row(j)[j..];
        let length = norm(column);
        let beta = if column[0] > 0.0 { -length } else { length };
        if length == 0.0 || norm(&column[1..]) == 0.0 {
            reflections.push(None); // LAPACK leaves a column that is done already
            continue;
        }
        let mut v = column.to_vec();
        v[0] -= beta;
        let factor = 2.0 / dot(&v, &v);
        for c in j..n {
            reflect(&mut columns.row_mut(c)[j..], &v, factor);
        }
        columns.row_mut(j)[j + 1..].fill(0.0);
        reflections.push(Some((v, factor)));
    }
    let mut q = Matrix::zeros(k, m); // row j is column j of Q
    for j in 0..k {
        q.row_mut(j)[j] = 1.0;
        for (start, reflection) in reflections[..=j].iter().enumerate().rev() {
            if let Some((v, factor)) = reflection {
                reflect(&mut q.row_mut(j)[start..], v, *factor);
            }
        }
    }
    (q.transposed(), columns.transposed().top(k))
}

fn reflect(x: &mut [f64], v: &[f64], factor: f64) {
    let a = -factor * dot(v, x);
    add(x, a, v);
}

/// `U diag(s) Vᵀ`, singular values falling. Vectors of a singular value of zero may be zero.
#[derive(Debug, Clone)]
pub(crate) struct Svd {
    /// `[r, rows]`: left vectors as rows.
    pub u: Matrix,
    pub s: Vec<f64>,
    /// `[r, cols]`: right vectors as rows.
    pub v: Matrix,
}

impl Svd {
    /// All `min(rows, cols)` triplets: QR, then one-sided Jacobi rotations of the triangle.
    pub fn complete(matrix: &Matrix) -> Self {
        if matrix.rows < matrix.cols {
            let Self { u, s, v } = Self::complete(&matrix.transposed());
            return Self { u: v, s, v: u };
        }
        let (q, r) = qr(matrix);
        let Self { u, s, v } = jacobi(&r);
        let u = u.times(&q.transposed());
        Self { u, s, v }
    }

    /// About the `rank` largest triplets: a random subspace of that size after `iterations` rounds of subspace iteration,
    /// as torch's `svd_lowrank(q=rank, niter=iterations)` (Halko et al. 2009, arXiv:0909.4061, algorithm 5.1).
    pub fn randomized(
        matrix: &Matrix,
        rank: usize,
        iterations: usize,
        stream: &mut Stream,
    ) -> Self {
        let transposed = matrix.transposed();
        let basis = |m: Matrix| qr(&m).0;
        let mut q = basis(matrix.times(&Matrix::normal(matrix.cols, rank, stream)));
        for _ in 0..iterations {
            q = basis(transposed.times(&q));
            q = basis(matrix.times(&q));
        }
        let q = q.transposed();
        let Self { u, s, v } = Self::complete(&q.times(matrix));
        let u = u.times(&q);
        Self { u, s, v }
    }
}

/// One-sided Jacobi (Hestenes): rotates pairs of columns until all are orthogonal; their norms are the singular values.
fn jacobi(square: &Matrix) -> Svd {
    let n = square.cols;
    let mut a = square.transposed(); // rows are columns
    let mut v = Matrix::zeros(n, n);
    (0..n).for_each(|i| v.data[i * n + i] = 1.0);
    let mut squares: Vec<f64> = (0..n).map(|i| dot(a.row(i), a.row(i))).collect();
    const SWEEPS: usize = 60; // a few suffice: convergence is quadratic
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for i in 0..n {
            for j in i + 1..n {
                let product = dot(a.row(i), a.row(j));
                let (p, q) = (squares[i], squares[j]);
                if product == 0.0 || product.abs() <= 1e-15 * (p * q).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (q - p) / (2.0 * product);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                rotate(&mut a, i, j, c, c * t);
                rotate(&mut v, i, j, c, c * t);
                squares[i] = dot(a.row(i), a.row(i));
                squares[j] = dot(a.row(j), a.row(j));
            }
        }
        if !rotated {
            break;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| squares[j].total_cmp(&squares[i]));
    let pick = |m: &Matrix| {
        let data = order.iter().flat_map(|&i| m.row(i).to_vec()).collect();
        Matrix::new(n, n, data)
    };
    let s: Vec<f64> = order.iter().map(|&i| squares[i].sqrt()).collect();
    let inverse: Vec<f64> = s
        .iter()
        .map(|&s| if s > 0.0 { 1.0 / s } else { 0.0 })
        .collect();
    Svd {
        u: pick(&a).scale_rows(&inverse),
        v: pick(&v),
        s,
    }
}

fn rotate(m: &mut Matrix, i: usize, j: usize, c: f64, s: f64) {
    let (head, tail) = m.data.split_at_mut(j * m.cols);
    let (a, b) = (&mut head[i * m.cols..][..m.cols], &mut tail[..m.cols]);
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (c * *a - s * *b, s * *a + c * *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream::new(5, "linalg", 0, 0)
    }

    fn distance(a: &Matrix, b: &Matrix) -> f64 {
        let difference: Vec<f64> = a.data.iter().zip(&b.data).map(|(a, b)| a - b).collect();
        norm(&difference) / norm(&b.data).max(1e-300)
    }

    fn identity(n: usize) -> Matrix {
        let mut eye = Matrix::zeros(n, n);
        (0..n).for_each(|i| eye.data[i * n + i] = 1.0);
        eye
    }

    fn product(svd: &Svd) -> Matrix {
        svd.u.clone().scale_rows(&svd.s).transposed().times(&svd.v)
    }

    #[test]
    fn qr_is_orthonormal_times_upper_triangle() {
        for (m, n) in [(7, 4), (4, 7), (5, 5), (1, 3), (3, 1)] {
            let a = Matrix::normal(m, n, &mut stream());
            let (q, r) = qr(&a);
            assert!(distance(&q.times(&r), &a) < 1e-14);
            assert!(distance(&q.transposed().times(&q), &identity(m.min(n))) < 1e-14);
            for i in 0..r.rows {
                assert!(r.row(i)[..i.min(n)].iter().all(|&v| v == 0.0));
            }
        }
        // LAPACK's signs: dgeqrf of [[3], [4]] is Q = [-0.6, -0.8], R = [-5].
        let (q, r) = qr(&Matrix::new(2, 1, vec![3.0, 4.0]));
        assert!((q.data[0] + 0.6).abs() < 1e-15 && (r.data[0] + 5.0).abs() < 1e-15);
    }

    #[test]
    fn products_do_not_depend_on_the_number_of_threads() {
        let (a, b) = (
            Matrix::normal(300, 97, &mut stream()),
            Matrix::normal(97, 41, &mut stream()),
        );
        let parallel = a.times(&b);
        for i in [0, 151, 299] {
            assert_eq!(a.top(i + 1).rows, i + 1);
            let one = Matrix::new(1, 97, a.row(i).to_vec()).times(&b); // below the threshold: one thread
            assert_eq!(one.data, parallel.row(i));
        }
    }

    #[test]
    fn the_complete_decomposition_gives_the_matrix_back() {
        for (m, n) in [(9, 5), (5, 9), (6, 6), (1, 4)] {
            let a = Matrix::normal(m, n, &mut stream());
            let svd = Svd::complete(&a);
            assert!(distance(&product(&svd), &a) < 1e-13);
            let v = svd.v.transposed();
            assert!(distance(&v.transposed().times(&v), &identity(m.min(n))) < 1e-13);
            assert!(svd.s.windows(2).all(|s| s[0] >= s[1]));
        }
    }

    #[test]
    fn subspace_iteration_approaches_the_largest_triplets() {
        let basis = |n| qr(&Matrix::normal(n, 12, &mut stream())).0.transposed();
        let s: Vec<f64> = (0..12).map(|i| 0.5f64.powi(i)).collect();
        for (rows, cols) in [(30, 18), (18, 30)] {
            let (u, v) = (basis(rows), basis(cols));
            let largest = |n| {
                let (u, s, v) = (u.top(n), s[..n].to_vec(), v.top(n));
                product(&Svd { u, s, v })
            };
            let matrix = largest(12);
            let found = |n| product(&Svd::randomized(&matrix, 4, n, &mut stream()));
            let error = |n| distance(&found(n), &largest(4));
            assert!(error(0) > 1e-2 && error(1) < error(0) / 2.0 && error(16) < 1e-9);
        }
    }
}
