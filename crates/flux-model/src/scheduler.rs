//! The flow-matching Euler scheduler: noise levels from 1 to 0, and the step between two of them.
//!
//! Source: diffusers 0.38 `scheduling_flow_match_euler_discrete.py`, `FluxPipeline` (`calculate_shift`).

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// `scheduler_config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// Entries of the training table.
    pub num_train_timesteps: usize,
    /// Static shift of the noise levels; unused with `use_dynamic_shifting`.
    pub shift: f64,
    /// Shift by the number of image tokens (dev, not schnell).
    pub use_dynamic_shifting: bool,
    /// Shift exponent at `base_image_seq_len`.
    pub base_shift: f64,
    /// Shift exponent at `max_image_seq_len`.
    pub max_shift: f64,
    /// Image tokens of a small image.
    pub base_image_seq_len: usize,
    /// Image tokens of a large image.
    pub max_image_seq_len: usize,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
        }
    }
}

impl SchedulerConfig {
    /// What is wrong with this configuration, if anything.
    pub fn problem(&self) -> Option<String> {
        if !(1..=1_000_000).contains(&self.num_train_timesteps) {
            return Some(format!(
                "`num_train_timesteps` is {}, not between 1 and 1000000",
                self.num_train_timesteps
            ));
        }
        // `static_shift` divides by 1 + (shift - 1) sigma, with sigma up to 1.
        if !(self.shift.is_finite() && self.shift > 0.0) {
            return Some(format!("`shift` is {}, not above 0", self.shift));
        }
        let shifts = [self.base_shift, self.max_shift];
        if !shifts.iter().all(|shift| shift.is_finite()) {
            return Some("`base_shift` or `max_shift` is not finite".into());
        }
        (self.base_image_seq_len >= self.max_image_seq_len).then(|| {
            format!(
                "`base_image_seq_len` is {}, not below `max_image_seq_len`, {}",
                self.base_image_seq_len, self.max_image_seq_len
            )
        })
    }

    /// Shift exponent for an image of `image_tokens` tokens: linear in their number.
    pub fn mu(&self, image_tokens: usize) -> f64 {
        let slope = (self.max_shift - self.base_shift)
            / (self.max_image_seq_len as f64 - self.base_image_seq_len as f64);
        self.base_shift + slope * (image_tokens as f64 - self.base_image_seq_len as f64)
    }

    /// Noise levels for `steps` steps, from 1 down, with a final 0.
    pub fn sigmas(&self, steps: usize, image_tokens: usize) -> Vec<f32> {
        self.sigmas_shifted(steps, self.mu(image_tokens))
    }

    /// As [`sigmas`](Self::sigmas), with the shift exponent `mu` where shifting is dynamic.
    pub fn sigmas_shifted(&self, steps: usize, mu: f64) -> Vec<f32> {
        let levels = (0..steps).map(|i| {
            // linspace(1, 1/steps, steps)
            let t = if steps == 1 {
                1.0
            } else {
                1.0 + i as f64 * ((1.0 / steps as f64 - 1.0) / (steps as f64 - 1.0))
            };
            let t = t as f32;
            if self.use_dynamic_shifting {
                let e = mu.exp() as f32;
                e / (e + (1.0 / t - 1.0))
            } else {
                static_shift(t, self.shift)
            }
        });
        levels.chain([0.0]).collect()
    }

    /// The training table: entry `i` is the noise level of index `i`, descending from 1; statically shifted only.
    pub fn training_sigmas(&self) -> Vec<f32> {
        let n = self.num_train_timesteps;
        (0..n)
            .map(|i| {
                let sigma = (n - i) as f32 / n as f32;
                if self.use_dynamic_shifting {
                    sigma
                } else {
                    static_shift(sigma, self.shift)
                }
            })
            .collect()
    }
}

fn static_shift(sigma: f32, shift: f64) -> f32 {
    let shift = shift as f32;
    shift * sigma / (1.0 + (shift - 1.0) * sigma)
}

/// Euler step from noise level `sigma` to `next` along the velocity.
pub fn euler_step<const D: usize>(
    sample: Tensor<D>,
    velocity: Tensor<D>,
    sigma: f32,
    next: f32,
) -> Tensor<D> {
    sample + velocity * (next - sigma)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dev_schedule_of_a_1024_pixel_image() {
        let config = SchedulerConfig {
            use_dynamic_shifting: true,
            shift: 3.0,
            ..SchedulerConfig::default()
        };
        let sigmas = config.sigmas(4, 4096);
        for (sigma, expected) in sigmas.iter().zip([1.0, 0.904531, 0.759511, 0.512844, 0.0]) {
            assert!((sigma - expected).abs() < 1e-6, "{sigmas:?}");
        }
        assert!((config.mu(1024) - 0.63).abs() < 1e-9);
    }
}
