//! Flow matching: noise levels, their weights, and the velocity the network should predict.
//!
//! `noisy = (1 - sigma) * latents + sigma * noise`, target `noise - latents`, loss the mean squared error, or another mean of the
//! errors.
//!
//! Source: diffusers 0.38 `training_utils.py` (`compute_density_for_timestep_sampling`, `compute_loss_weighting_for_sd3`),
//! `train_dreambooth_lora_flux.py`; sigmoid, shift and flux_shift: kohya sd-scripts
//! `flux_train_utils.py`; huber: its `train_util.py` (`conditional_loss`), diffusers' `train_text_to_image.py`.

use burn::tensor::Tensor;
use lora_core::random::Stream;

use crate::config::{LossType, LossWeighting, TimestepSampling, TimestepShift, TrainSection};

/// Weight of a sample's loss at noise level `sigma`.
pub fn loss_weight(train: &TrainSection, sigma: f32) -> f32 {
    match train.loss_weighting {
        LossWeighting::None => 1.0,
        LossWeighting::SigmaSqrt => 1.0 / (sigma * sigma),
        LossWeighting::Cosmap => {
            2.0 / (std::f32::consts::PI * (1.0 - 2.0 * sigma + 2.0 * sigma * sigma))
        }
        LossWeighting::MinSnr => {
            let gamma = train.min_snr_gamma.unwrap_or(5.0) as f32;
            ((1.0 - sigma) * (1.0 - sigma)).min(gamma * sigma * sigma)
        }
    }
}

/// How an error counts in the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Penalty {
    /// Its square.
    Square,
    /// Its size.
    Size,
    /// `2 c (sqrt(e^2 + c^2) - c)`: about its square where it is small against `c`, about `2 c` times its size where it is large.
    Huber {
        /// Where one becomes the other.
        c: f64,
    },
}

impl Penalty {
    /// That of a configuration.
    pub fn of(train: &TrainSection) -> Self {
        match train.loss_type {
            LossType::Mse => Self::Square,
            LossType::Mae => Self::Size,
            LossType::Huber => Self::Huber {
                c: train.huber_c.unwrap_or(0.1),
            },
        }
    }

    /// Of every element of a tensor of errors.
    pub fn of_all<const D: usize>(self, errors: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Square => errors.square(),
            Self::Size => errors.abs(),
            Self::Huber { c } => ((errors.square() + c * c).sqrt() - c) * (2.0 * c),
        }
    }

    /// Of one error.
    fn of_one(self, error: f64) -> f64 {
        match self {
            Self::Square => error * error,
            Self::Size => error.abs(),
            Self::Huber { c } => 2.0 * c * ((error * error + c * c).sqrt() - c),
        }
    }
}

/// The loss of a network that predicts 0 everywhere: the scale that losses of these samples are measured by.
///
/// `target` holds the samples of a batch one after the other, `weights` a weight for each.
pub fn loss_of_zero(target: &[f32], weights: &[f32], penalty: Penalty) -> f64 {
    let errors = target.chunks(target.len() / weights.len()).zip(weights);
    let errors = errors.map(|(target, &weight)| {
        let sum: f64 = target.iter().map(|&v| penalty.of_one(v.into())).sum();
        f64::from(weight) * sum
    });
    errors.sum::<f64>() / target.len() as f64
}

/// The scheme's density in `(0, 1)` from one raw draw: a standard normal for `logit_normal` and `sigmoid`, uniform for the
/// others.
pub fn density(train: &TrainSection, raw: f64) -> f64 {
    match train.timestep_sampling {
        TimestepSampling::None | TimestepSampling::Uniform => raw,
        TimestepSampling::LogitNormal => sigmoid(train.logit_mean + train.logit_std * raw),
        TimestepSampling::Mode => mode_density(raw, train.mode_scale),
        TimestepSampling::Sigmoid | TimestepSampling::Shift | TimestepSampling::FluxShift => {
            sigmoid(train.sigmoid_scale * raw)
        }
    }
}

/// The noise level of one sample; `mu` is the family's shift exponent for its size.
///
/// All schemes of diffusers (`none`, `logit_normal`, `mode`) go through the scheduler's table of 1000 levels, as there: density `u` picks index
/// `floor(1000 u)`, so a large `u` is a low noise level.
pub fn draw_sigma(train: &TrainSection, mu: f64, table: &[f32], stream: &mut Stream) -> f32 {
    let raw = match train.timestep_sampling {
        TimestepSampling::None | TimestepSampling::Mode | TimestepSampling::Uniform => {
            stream.uniform()
        }
        TimestepSampling::LogitNormal
        | TimestepSampling::Sigmoid
        | TimestepSampling::Shift
        | TimestepSampling::FluxShift => stream.normal(),
    };
    let density = density(train, raw);
    let sigma = match train.timestep_sampling {
        TimestepSampling::None | TimestepSampling::LogitNormal | TimestepSampling::Mode => {
            f64::from(table[table_index(density, table.len())])
        }
        _ => density,
    };
    let shift = match train.shift {
        _ if train.timestep_sampling == TimestepSampling::FluxShift => libm::exp(mu),
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
            TimestepSampling::Uniform,
            TimestepSampling::Shift,
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

    #[test]
    fn flux_shift_is_sigmoid_with_the_shift_of_the_size() {
        let scheduler = SchedulerConfig::default();
        let table = scheduler.training_sigmas();
        let draw = |timestep_sampling, shift| {
            let train = TrainSection {
                timestep_sampling,
                shift,
                ..TrainSection::default()
            };
            let mut stream = Stream::new(1, "sigma", 3, 0);
            draw_sigma(&train, scheduler.mu(1024), &table, &mut stream)
        };
        let plain = draw(TimestepSampling::Sigmoid, TimestepShift::Constant(1.0));
        let shifted = draw(TimestepSampling::Sigmoid, TimestepShift::Flux);
        let flux_shift = draw(TimestepSampling::FluxShift, TimestepShift::Constant(1.0));
        assert_eq!(flux_shift, shifted);
        assert_ne!(flux_shift, plain);
    }

    #[test]
    fn min_snr_bounds_the_weight_of_what_is_nearly_clean() {
        let train = TrainSection {
            loss_weighting: LossWeighting::MinSnr,
            ..TrainSection::default()
        };
        // SNR ((1 - s) / s)^2 is below 5 from s = 1 / (1 + sqrt 5) on; there the weight is that of the picture's error.
        let by_hand = |sigma: f32| sigma * sigma * ((1.0 - sigma) / sigma).powi(2).min(5.0);
        for sigma in [0.01, 0.2, 0.3, 0.31, 0.5, 0.9, 1.0] {
            let (found, expected) = (loss_weight(&train, sigma), by_hand(sigma));
            assert!(
                (found - expected).abs() < 1e-6,
                "{sigma}: {found}, {expected}"
            );
        }
        let looser = TrainSection {
            min_snr_gamma: Some(20.0),
            ..train
        };
        assert!((loss_weight(&looser, 0.1) - 0.2).abs() < 1e-6);
    }

    #[test]
    fn huber_is_a_square_near_0_and_a_size_far_from_it() {
        let huber = Penalty::Huber { c: 0.1 };
        let near = huber.of_one(1e-3) / Penalty::Square.of_one(1e-3);
        let far = huber.of_one(100.0) / (0.2 * Penalty::Size.of_one(100.0));
        assert!(
            (near - 1.0).abs() < 1e-3 && (far - 1.0).abs() < 2e-3,
            "{near} {far}"
        );
    }
}
