//! What kernels are made of: loops that LLVM turns into vector code, and slices of tensors.
//!
//! Sums have one shape whatever the vector unit, and `mul_add` is one rounding everywhere: the bits are the same on every
//! CPU, with any number of threads.

use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};

/// Partial sums of [`sum`]: so many that a loop does not wait for its last addition.
pub const LANES: usize = 32;

/// Elements of a task that works element by element.
pub const CHUNK: usize = 1 << 13;

/// Rows of a task that works row by row.
pub const ROWS: usize = 16;

/// Runs `f` compiled for the best vector unit of this CPU. `f` and all it calls must be inlined.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    arch().dispatch(f)
}

static NARROW: AtomicBool = AtomicBool::new(false);

/// Runs `f` with the vectors of AVX2 where the CPU has those of AVX-512, on all threads: both must give the same bits.
pub fn without_avx512<R>(f: impl FnOnce() -> R) -> R {
    NARROW.store(true, Ordering::Relaxed);
    let result = f();
    NARROW.store(false, Ordering::Relaxed);
    result
}

/// The best vector unit of this CPU.
#[inline(always)]
pub(super) fn arch() -> pulp::Arch {
    #[cfg(target_arch = "x86_64")]
    if NARROW.load(Ordering::Relaxed)
        && let Some(avx2) = pulp::x86::V3::try_new()
    {
        return pulp::Arch::V3(avx2);
    }
    pulp::Arch::new()
}

/// `e^x` to 2 ulp, `e^±87` beyond ±87; NaN stays NaN.
///
/// # Source
/// Cephes `expf`: 2^n times a polynomial of the rest, whose bounds are ±ln(2) / 2.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 87.0 { 87.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_66);
    let p = p.mul_add(r, 0.5);
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    (p.mul_add(r * r, r) + 1.0) * power
}

/// Sum over `i` of `f([x[0][i], x[1][i] ...])`, in [`LANES`] partial sums.
#[inline(always)]
pub fn sum<const K: usize>(x: [&[f32]; K], f: impl Fn([f32; K]) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let n = x.iter().map(|x| x.len()).min().unwrap_or(0);
    let whole = n / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        // copies, so that LLVM sees arrays without bounds
        let mut parts = [[0f32; LANES]; K];
        for (part, x) in parts.iter_mut().zip(&x) {
            part.copy_from_slice(&x[start..start + LANES]);
        }
        for i in 0..LANES {
            let mut at = [0f32; K];
            for k in 0..K {
                at[k] = parts[k][i];
            }
            lanes[i] += f(at);
        }
    }
    for i in whole..n {
        lanes[i - whole] += f(x.map(|x| x[i]));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Row-major; a copy only if it is not so already.
pub fn packed(x: FlexTensor) -> FlexTensor {
    match x.is_contiguous() {
        true => x,
        false => x.to_contiguous(),
    }
}

/// The elements of a [`packed`] f32 tensor.
pub fn values(x: &FlexTensor) -> &[f32] {
    x.as_slice().expect("a packed tensor of f32")
}

/// `x`, row-major, in a buffer of its own size: [`FlexTensor::storage_mut`] is its elements, copied only if shared.
pub fn owned(x: FlexTensor) -> FlexTensor {
    let own = x.to_contiguous();
    drop(x); // else the result is shared and writing to it copies
    own
}

/// A tensor of these values.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::F32,
    )
}

/// The sizes of a tensor of `D` dimensions.
pub fn dims<const D: usize>(x: &FlexTensor) -> [usize; D] {
    std::array::from_fn(|i| x.layout().shape()[i])
}

/// `len` of the last dimension from `start` on, a view.
pub fn narrow_last(x: &FlexTensor, start: usize, len: usize) -> FlexTensor {
    let last = x.layout().num_dims() - 1;
    let layout = x.layout().narrow(last, start, len);
    x.clone().with_layout(layout)
}

/// The transposed matrix, a view.
pub fn transposed(x: FlexTensor) -> FlexTensor {
    let layout = x.layout().transpose(0, 1);
    x.with_layout(layout)
}
