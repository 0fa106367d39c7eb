//! Flow matching: noise levels, their weights, and the velocity the network should predict.
//!
//! `noisy = (1 - sigma) * latents + sigma * noise`, target `noise - latents`, loss the mean squared error.
//!
//! Source: diffusers 0.38 `training_utils.py` (`compute_density_for_timestep_sampling`, `compute_loss_weighting_for_sd3`),
//! `train_dreambooth_lora_flux.py`; sigmoid and shift: kohya sd-scripts `flux_train_utils.py`.

use lora_core::random::Stream;

use crate::config::{LossWeighting, TimestepSampling, TimestepShift, TrainSection};

/// Weight of a sample's loss at noise level `sigma`.
pub fn loss_weight(weighting: LossWeighting, sigma: f32) -> f32 {
    match weighting {
        LossWeighting::None => 1.0,
        LossWeighting::SigmaSqrt => 1.0 / (sigma * sigma),
        LossWeighting::Cosmap => {
            2.0 / (std::f32::consts::PI * (1.0 - 2.0 * sigma + 2.0 * sigma * sigma))
        }
    }
}

/// The loss of a network that predicts 0 everywhere: the scale that losses of these samples are measured by.
///
/// `target` holds the samples of a batch one after the other, `weights` a weight for each.
pub fn loss_of_zero(target: &[f32], weights: &[f32]) -> f64 {
    let squares = target.chunks(target.len() / weights.len()).zip(weights);
    let squares = squares.map(|(target, &weight)| {
        let sum: f64 = target.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        f64::from(weight) * sum
    });
    squares.sum::<f64>() / target.len() as f64
}

/// The scheme's density in `(0, 1)` from one raw draw: a standard normal for `logit_normal` and `sigmoid`, uniform for the
/// others.
pub fn density(train: &TrainSection, raw: f64) -> f64 {
    match train.timestep_sampling {
        TimestepSampling::None => raw,
        TimestepSampling::LogitNormal => sigmoid(train.logit_mean + train.logit_std * raw),
        TimestepSampling::Mode => mode_density(raw, train.mode_scale),
        TimestepSampling::Sigmoid => sigmoid(train.sigmoid_scale * raw),
    }
}

/// The noise level of one sample; `mu` is the family's shift exponent for its size.
///
/// All schemes but `sigmoid` go through the scheduler's table of 1000 levels, as in diffusers: density `u` picks index
/// `floor(1000 u)`, so a large `u` is a low noise level.
pub fn draw_sigma(train: &TrainSection, mu: f64, table: &[f32], stream: &mut Stream) -> f32 {
    let raw = match train.timestep_sampling {
        TimestepSampling::None | TimestepSampling::Mode => stream.uniform(),
        TimestepSampling::LogitNormal | TimestepSampling::Sigmoid => stream.normal(),
    };
    let density = density(train, raw);
    let sigma = match train.timestep_sampling {
        TimestepSampling::Sigmoid => density,
        _ => f64::from(table[table_index(density, table.len())]),
    };
    let shift = match train.shift {
        TimestepShift::Constant(shift) => shift,
        TimestepShift::Flux => libm::exp(mu),
    };
    (shift * sigma / (1.0 + (shift - 1.0) * sigma)) as f32
}

/// Index of density `u` in a table of `n` levels.
pub fn table_index(u: f64, n: usize) -> usize {
    ((u * n as f64) as usize).min(n - 1)
}

/// Density of the `mode` scheme at the uniform draw `u`.
pub fn mode_density(u: f64, scale: f64) -> f64 {
    let cos = libm::cos(std::f64::consts::FRAC_PI_2 * u);
    1.0 - u - scale * (cos * cos - 1.0 + u)
}

/// `1 / (1 + e⁻ˣ)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

#[cfg(test)]
mod tests {
    use flux_model::scheduler::SchedulerConfig;

    use super::*;

    #[test]
    fn every_scheme_stays_inside_the_table_and_shift_moves_to_more_noise() {
        let scheduler = SchedulerConfig::default();
        let table = scheduler.training_sigmas();
        for timestep_sampling in [
            TimestepSampling::None,
            TimestepSampling::LogitNormal,
            TimestepSampling::Mode,
            TimestepSampling::Sigmoid,
        ] {
            let mean = |shift| {
                let train = TrainSection {
                    timestep_sampling,
                    shift,
                    ..TrainSection::default()
                };
                let levels = (0..2000).map(|i| {
                    draw_sigma(
                        &train,
                        scheduler.mu(1024),
                        &table,
                        &mut Stream::new(1, "sigma", i, 0),
                    )
                });
                levels
                    .inspect(|s| assert!((0.0..=1.0).contains(s), "{timestep_sampling:?}: {s}"))
                    .sum::<f32>()
                    / 2000.0
            };
            let (plain, shifted) = (
                mean(TimestepShift::Constant(1.0)),
                mean(TimestepShift::Constant(3.0)),
            );
            assert!((plain - 0.5).abs() < 0.03, "{timestep_sampling:?}: {plain}");
            assert!(shifted > 0.6, "{timestep_sampling:?}: {shifted}");
            assert!((mean(TimestepShift::Flux) - plain) > 0.05);
        }
    }
}
