//! The bits of all operations together, with any number of threads and either width of vectors.

use burn::tensor::{Device, Tensor, TensorData};
use lora_core::ops::check::same_bits_with_any_threads_and_vectors;
use lora_core::ops::linear::{LowRank, linear};

use super::attention::attention;
use super::gate::gated_residual;
use super::gelu::{cat_gelu_tanh, gelu_tanh};
use super::heads::{norm_rotate, to_heads};
use super::layer_norm::layer_norm_modulate;
use super::silu::silu;
use crate::layers::RotaryTable;
use crate::layers::Stream;

#[test]
fn neither_threads_nor_vectors_change_a_bit() {
    let tensor = |n: usize, factor: f32| {
        let values: Vec<f32> = (0..n).map(|i| (i as f32 * factor).sin()).collect();
        Tensor::<1>::from_data(TensorData::new(values, [n]), &Device::flex().autodiff())
    };
    // sizes at which the matrix products are shared out too
    let (tokens, heads, dim, wide, rank) = (390, 4, 64, 1030, 16);
    let width = heads * dim;
    same_bits_with_any_threads_and_vectors(|| {
        let x = tensor(tokens * width, 0.37)
            .reshape([1, tokens, width])
            .require_grad();
        let scale = tensor(width, 0.11).reshape([1, 1, width]).require_grad();
        let y = layer_norm_modulate(x.clone(), scale.clone(), scale.clone(), 1e-6);
        let angle = tensor(tokens * dim / 2, 0.5).reshape([tokens, dim / 2]);
        let rotary = RotaryTable {
            cos: angle.clone().cos(),
            sin: angle.sin(),
        };
        let parts = || {
            let (txt, img) = (
                y.clone().narrow(1, 0, 70),
                y.clone().narrow(1, 70, tokens - 70),
            );
            [txt, img]
        };
        let streams = || {
            parts().map(|x| Stream {
                x,
                norm: tensor(dim, 0.9),
                eps: 1e-6,
            })
        };
        let q = norm_rotate(streams(), heads, &rotary);
        let k = norm_rotate(streams(), heads, &rotary);
        let attn = attention(q, k, to_heads(parts(), heads), 0.125, None);
        let a = tensor(rank * width, 0.3)
            .reshape([rank, width])
            .require_grad();
        let b = tensor(wide * rank, 0.7)
            .reshape([wide, rank])
            .require_grad();
        let adapter = LowRank {
            a: a.clone(),
            b: b.clone(),
            scale: 0.5,
            mask: Some(tensor(tokens * width, 0.2).reshape([1, tokens, width])),
        };
        let weight = tensor(width * wide, 0.013).reshape([width, wide]);
        let mlp = linear(y.clone(), weight.clone(), None, Some(adapter));
        let out = cat_gelu_tanh(attn, silu(mlp));
        let back = tensor((width + wide) * width, 0.017).reshape([width + wide, width]);
        let out = gelu_tanh(linear(out, back, Some(tensor(width, 0.4)), None));
        let out = gated_residual(x.clone(), scale.clone(), out);
        let gradients = out.clone().square().sum().backward();
        let mut all: Vec<f32> = out.into_data().iter::<f32>().collect();
        for x in [a, b] {
            all.extend(
                x.grad(&gradients)
                    .expect("a gradient")
                    .into_data()
                    .iter::<f32>(),
            );
        }
        for x in [x, scale] {
            all.extend(
                x.grad(&gradients)
                    .expect("a gradient")
                    .into_data()
                    .iter::<f32>(),
            );
        }
        assert!(all.iter().all(|x| x.is_finite()));
        all
    });
}
