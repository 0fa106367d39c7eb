//! Operations with handwritten gradients: one node of the autodiff graph each, computed by own loops on Burn's CPU backend,
//! and some of them by own kernels on GPUs.
//!
//! Burn composes a layer of a network from many small operations; on the CPU each of them reads and writes its tensors once
//! more, most on one thread. An operation here reads its inputs once, keeps only what its backward pass needs, and computes
//! that pass itself.
//!
//! An operation is a file: its maths, its kernels, its composition of Burn's operations. The composition is what the kernels
//! are tested against, and what runs on every backend without kernels. Kernels exist on `flex` under the cargo feature of
//! that name, and for simple operations on wgpu and CUDA under theirs (`cube`).
//!
//! The bits of a result depend neither on the number of threads nor on the width of the vector unit: work is cut into
//! pieces of fixed size, sums have a fixed order, and a fused multiply-add is used only where it is written.

pub(crate) mod codes;
mod composition;
mod decoded;
#[cfg(any(feature = "flex", feature = "cube"))]
mod inputs;
pub mod linear;
pub(crate) mod matmul;
pub(crate) mod once;

#[cfg(feature = "flex")]
pub mod check;
#[cfg(feature = "cube")]
pub mod cube;
#[cfg(feature = "flex")]
pub mod gemm;
#[cfg(feature = "flex")]
pub mod kernel;
#[cfg(feature = "flex")]
mod low_rank;
#[cfg(feature = "flex")]
mod node;
#[cfg(feature = "flex")]
mod product;
#[cfg(feature = "flex")]
pub mod tile;

use std::cell::Cell;

use burn::tensor::{Device, Tensor};

pub use composition::{Composition, compose};
pub use matmul::matmul;
#[cfg(feature = "flex")]
pub use node::{Operation, apply};
pub use once::computed_once;

/// Names the kernels of `flex` in the fingerprint of a run, and what runs beside them: it changes with every change of their
/// bits.
pub const KERNELS: &str = if cfg!(feature = "flex") {
    "flex 3, composed 3"
} else {
    COMPOSITIONS
};

/// The same of wgpu and CUDA.
pub const CUBE_KERNELS: &str = "cube 1, composed 3";

/// The same of backends without kernels, for the compositions of Burn's operations.
pub const COMPOSITIONS: &str = "composed 3";

thread_local!(static COMPOSED: Cell<bool> = const { Cell::new(false) });

/// Runs `f` with every operation composed of Burn's own, as on a backend without kernels: what kernels are compared with.
pub fn composed<R>(f: impl FnOnce() -> R) -> R {
    let before = COMPOSED.replace(true);
    let result = f();
    COMPOSED.set(before);
    result
}

/// Runs `f`, which computes on `device`, on a thread of the pool that kernels share their work among, if there are kernels for it:
/// from a thread outside, each of them would wake one of the pool's, and wait for it. `f` must not wait for what needs the pool
/// itself.
pub fn in_pool<R: Send>(device: &Device, f: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "flex")]
    if node::is_flex(device) {
        let is_composed = COMPOSED.get();
        return rayon::scope(|_| match is_composed {
            true => composed(f),
            false => f(),
        });
    }
    let _ = device;
    f()
}

/// Whether operations have kernels where `x` is; else their composition is the way.
pub fn has_kernels<const D: usize>(x: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    return node::has_kernels(x) && !COMPOSED.get();
    #[cfg(not(feature = "flex"))]
    {
        let _ = x;
        false
    }
}
