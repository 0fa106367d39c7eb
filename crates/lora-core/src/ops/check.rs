//! What an operation is tested with: its kernels against its composition, results and gradients. It panics by design.

use std::cell::Cell;

use burn::tensor::{Device, Tensor, TensorData};

use super::composed;
use super::kernel::without_avx512;

thread_local!(static COUNT: Cell<u64> = const { Cell::new(1) });

/// On flex with autodiff, roughly normal, the same in every run of a test.
pub fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let nth = COUNT.get(); // a test has a thread of its own
    COUNT.set(nth + 1);
    let mut state = shape.iter().fold(nth, |s, &n| s * 31 + n as u64);
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 1.4)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff())
}

/// Asserts that `f` gives the same with kernels and composed, and so do the gradients of its inputs: within 5e-6 of the
/// largest element, or of 0.02 where all are smaller (a gradient may cancel to zero).
pub fn agree<const K: usize, const D: usize, const E: usize>(
    inputs: [Tensor<D>; K],
    f: impl Fn([Tensor<D>; K]) -> Tensor<E>,
) {
    let shapes = inputs.each_ref().map(|x| x.dims());
    let run = || results(&inputs, &f);
    for (i, (found, expected)) in run().iter().zip(composed(run)).enumerate() {
        let largest = expected.iter().fold(0.02f32, |top, x| top.max(x.abs()));
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(&expected) {
            let distance = (a - b).abs() / largest;
            assert!(
                distance <= 5e-6,
                "output {i} of {shapes:?}: {a}, not {b}, {distance} of the largest"
            );
        }
    }
}

/// The first wgpu device, with autodiff.
#[cfg(feature = "wgpu")]
pub fn wgpu() -> Device {
    let devices = Device::enumerate(burn::tensor::DeviceType::Wgpu).into_vec();
    devices.into_iter().next().expect("a device").autodiff()
}

/// The same as [`agree`] there, for operations whose kernels take each of `inputs`. It also asserts that a second run has the
/// same bits.
#[cfg(feature = "wgpu")]
pub fn agree_on_wgpu<const K: usize, const D: usize, const E: usize>(
    inputs: [Tensor<D>; K],
    f: impl Fn([Tensor<D>; K]) -> Tensor<E>,
) {
    let device = wgpu();
    let inputs = inputs.map(|x| x.to_device(&device));
    for x in &inputs {
        assert!(super::cube::has_kernels(x), "{:?} has no kernels", x.dims());
    }
    assert!(
        results(&inputs, &f) == results(&inputs, &f),
        "two runs have other bits"
    );
    agree(inputs, f);
}

/// `f`'s result, and the gradients of its inputs of a loss that weighs each element differently.
fn results<const K: usize, const D: usize, const E: usize>(
    inputs: &[Tensor<D>; K],
    f: &impl Fn([Tensor<D>; K]) -> Tensor<E>,
) -> Vec<Vec<f32>> {
    COUNT.set(1000);
    let inputs = inputs.clone().map(|x| x.detach().require_grad());
    let y = f(inputs.clone());
    let n = y.shape().num_elements();
    let weights: Vec<f32> = (0..n)
        .map(|i| ((i * 7919 % 1013) as f32 / 500.0 - 1.0).sin())
        .collect();
    let weights = Tensor::from_data(TensorData::new(weights, y.dims()), &y.device());
    let gradients = (y.clone() * weights).sum().backward();
    let mut all = vec![values(y.detach())];
    for x in inputs {
        all.push(values(x.grad(&gradients).expect("a gradient")));
    }
    all
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("f32")
}

/// Asserts that the bits of `f`'s numbers are the same with 1, 2, 4 and 8 threads, and without AVX-512.
pub fn same_bits_with_any_threads_and_vectors(f: impl Fn() -> Vec<f32> + Sync) {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a pool");
        let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        bits(pool.install(&f))
    };
    let one = run(1);
    for threads in [2, 4, 8] {
        assert!(
            one == run(threads),
            "{threads} threads give other bits than one"
        );
    }
    let narrow = without_avx512(|| run(2));
    assert!(one == narrow, "AVX2 gives other bits than AVX-512");
}
