//! `flux-lora bench ops`: forward and backward pass of each operation of a block, with its kernels and composed of Burn's.
//!
//! Both ways in turns, in one process; medians.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor, TensorData};
use flux_model::layers::{RotaryTable, Stream};
use flux_model::ops::attention::attention;
use flux_model::ops::gate::gated_residual;
use flux_model::ops::gelu::{cat_gelu_tanh, gelu_tanh};
use flux_model::ops::heads::norm_rotate;
use flux_model::ops::layer_norm::layer_norm_modulate;
use lora_core::ops::composed;
use lora_core::ops::linear::{LowRank, linear};
use lora_core::random;

use super::median;
use crate::cli::OpsBenchArgs;
use crate::device;
use crate::output::{OutputError, say};

/// Rank of the adapters.
const RANK: usize = 16;
/// Channels of a head.
const HEAD: usize = 64;

/// Times every operation.
///
/// # Errors
/// No device.
pub fn run(args: &OpsBenchArgs) -> anyhow::Result<()> {
    let device = device::open(device::default_name())?;
    let raw = device.device.clone().autodiff();
    let (tokens, heads) = (args.tokens.max(1), args.heads.max(1));
    let width = heads * HEAD;
    let normal = |shape: &[usize]| normal(shape, &raw);
    let wide = |n: usize| normal(&[1, tokens, n]).reshape([1, tokens, n]);
    let vector = || normal(&[width]).reshape([1, 1, width]);
    let by_head = || normal(&[tokens, width]).reshape([1, heads, tokens, HEAD]);
    let matrix = |rows: usize, columns: usize| normal(&[rows, columns]).reshape([rows, columns]);

    say!("{tokens} tokens, width {width}; forward and backward, ms")?;
    say!(
        "{:<28} {:>9} {:>9} {:>6}",
        "",
        "composed",
        "kernels",
        "ratio"
    )?;
    let bench = |name: &str, run: &dyn Fn() -> Tensor<3>| row(name, args.rounds.max(1), run);

    let x = wide(4 * width);
    bench("gelu", &|| gelu_tanh(x.clone().require_grad()))?;
    let first = wide(width);
    bench("cat and gelu", &|| {
        cat_gelu_tanh(first.clone().require_grad(), x.clone().require_grad())
    })?;
    let (scale, shift) = (vector(), vector());
    bench("layer norm, modulation", &|| {
        layer_norm_modulate(
            first.clone().require_grad(),
            scale.clone(),
            shift.clone(),
            1e-6,
        )
    })?;
    let second = wide(width);
    bench("gated residual", &|| {
        let (x, y) = (first.clone().require_grad(), second.clone().require_grad());
        gated_residual(x, scale.clone(), y)
    })?;
    let rotary = RotaryTable {
        cos: matrix(tokens, HEAD / 2),
        sin: matrix(tokens, HEAD / 2),
    };
    let norm = normal(&[HEAD]);
    bench("norm, rotation, heads", &|| {
        let stream = Stream {
            x: first.clone().require_grad(),
            norm: norm.clone(),
            eps: 1e-6,
        };
        norm_rotate([stream], heads, &rotary).reshape([heads, tokens, HEAD])
    })?;
    let (q, k, v) = (by_head(), by_head(), by_head());
    bench("attention", &|| {
        let [q, k, v] = [&q, &k, &v].map(|x| x.clone().require_grad());
        attention(q, k, v, 0.125, None)
    })?;
    let weight = matrix(width, 4 * width);
    let bias = normal(&[4 * width]);
    let frozen = |x: Tensor<3>, adapter| linear(x, weight.clone(), Some(bias.clone()), adapter);
    bench("linear", &|| frozen(first.clone().require_grad(), None))?;
    let (a, b) = (matrix(RANK, width), matrix(4 * width, RANK));
    bench("linear with LoRA", &|| {
        let adapter = LowRank {
            a: a.clone().require_grad(),
            b: b.clone().require_grad(),
            scale: 1.0,
            mask: None,
        };
        frozen(first.clone().require_grad(), Some(adapter))
    })?;
    Ok(())
}

fn row(name: &str, rounds: usize, run: &dyn Fn() -> Tensor<3>) -> Result<(), OutputError> {
    let weights = run().detach();
    let time = || {
        let started = Instant::now();
        let _gradients = (run() * weights.clone()).sum().backward();
        started.elapsed()
    };
    let (mut plain, mut kernels): (Vec<Duration>, Vec<Duration>) = (Vec::new(), Vec::new());
    time();
    for _ in 0..rounds {
        plain.push(composed(time));
        kernels.push(time());
    }
    let (plain, kernels) = (median(&plain) * 1e3, median(&kernels) * 1e3);
    say!(
        "{name:<28} {plain:>9.2} {kernels:>9.2} {:>6.2}",
        kernels / plain
    )
}

/// Normal numbers.
fn normal(shape: &[usize], device: &Device) -> Tensor<1> {
    let n = shape.iter().product();
    let values = random::Stream::new(1234, "ops", 0, n as u64).normals(n);
    Tensor::from_data(TensorData::new(values, [n]), device)
}
