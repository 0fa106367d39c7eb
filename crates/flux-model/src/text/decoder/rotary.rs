//! Rotary positions in half-split form: a head's first half is turned against its second.

use burn::tensor::{Device, Tensor, TensorData};

use super::DecoderConfig;

/// Cosines and sines of positions 0, 1, 2 ..., `[1, 1, tokens, head_dim / 2]` each; frequency and angle rounded to f32, as
/// transformers has them.
#[derive(Clone)]
pub(super) struct HalfSplitRotary {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl HalfSplitRotary {
    pub(super) fn new(tokens: usize, config: &DecoderConfig, device: &Device) -> Self {
        let half = config.head_width() / 2;
        let theta = config.theta();
        let angles: Vec<f64> = (0..tokens)
            .flat_map(|position| {
                (0..half).map(move |pair| {
                    let frequency = theta.powf(-(pair as f64) / half as f64) as f32;
                    f64::from(position as f32 * frequency)
                })
            })
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Tensor::from_data(TensorData::new(values, [1, 1, tokens, half]), device)
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
        }
    }

    /// The positions from `first` on.
    pub(super) fn from(&self, first: usize) -> Self {
        let rest = |table: &Tensor<4>| {
            let tokens = table.dims()[2];
            table.clone().narrow(2, first, tokens - first)
        };
        Self {
            cos: rest(&self.cos),
            sin: rest(&self.sin),
        }
    }

    /// Rotates the pairs (k, k + head_dim / 2) of the last dimension.
    ///
    /// # Shapes
    /// - `x`: `[batch, heads, tokens, head_dim]`, unchanged
    pub(super) fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let (cos, sin) = (&self.cos, &self.sin);
        Tensor::cat(
            vec![
                first.clone() * cos.clone() - second.clone() * sin.clone(),
                second * cos.clone() + first * sin.clone(),
            ],
            3,
        )
    }
}
