//! `[train]`: the loop and its loss.

use schemars::JsonSchema;
use serde::de::Deserializer;
use serde::{Deserialize, Serialize, Serializer};

use super::fields::is_default;
use super::number_or::{NumberOr, number_or_none};
use super::rules::{
    ABOVE_0, AT_LEAST_0, FINITE, Invalid, MAX_COUNT, MODE_SCALE, Rule, check_at_least_1,
    check_count, check_seed,
};
use super::schemas::{with_aliases, word_or};

/// The loop and its loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// Optimizer steps in the whole run. Default 1000.
    pub steps: u64,
    /// Images in one pass through the model. Default 1.
    pub batch_size: usize,
    /// Passes whose mean gradient makes one optimizer step; several devices (`--device cuda:0,cuda:1`) share them, see
    /// [resume.md](resume.md#several-devices). Default 1.
    pub gradient_accumulation_steps: usize,
    /// Where all randomness of the run comes from. Default 42.
    pub seed: u64,
    /// Guidance strength told to a guidance-distilled model; 1 is closest to plain flow matching. Default 1.
    pub guidance: f64,
    /// Density that sigma, the share of noise, is drawn from, from the table below. Default "none".
    pub timestep_sampling: TimestepSampling,
    /// Centre of "logit_normal". Default 0.
    pub logit_mean: f64,
    /// Width of "logit_normal", above 0. Default 1.
    pub logit_std: f64,
    /// Weight of the middle in "mode", -1 to 1.75. Default 1.29.
    pub mode_scale: f64,
    /// Width of "sigmoid", "shift" and "flux_shift", above 0. Default 1.
    pub sigmoid_scale: f64,
    /// Moves the drawn sigma towards noise: a number `s` gives `s * sigma / (1 + (s - 1) * sigma)`, "flux" the shift that
    /// sampling uses at the image's size; 1 is no shift. Default 1.
    #[schemars(schema_with = "word_or::<f64>")]
    pub shift: TimestepShift,
    /// How an error `e` counts: "mse" `e^2`, "mae" `abs(e)`, "huber" `2 c (sqrt(e^2 + c^2) - c)`, as in kohya's and diffusers'
    /// scripts. Default "mse".
    #[serde(skip_serializing_if = "is_default")]
    pub loss_type: LossType,
    /// The `c` of "huber", above 0. Default: 0.1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huber_c: Option<f64>,
    /// Weight of a sample in the loss as a function of sigma: "none", "sigma_sqrt" `1 / sigma^2`, "cosmap" `2 / (pi (1 - 2
    /// sigma + 2 sigma^2))`, as in diffusers, or "min_snr" `min((1 - sigma)^2, gamma sigma^2)`: the published `min(SNR,
    /// gamma)` for the error of the picture that a velocity means. Default "none".
    pub loss_weighting: LossWeighting,
    /// The `gamma` of "min_snr", above 0. Default: 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_snr_gamma: Option<f64>,
    /// The run is stopped as diverged when a loss exceeds this many times the loss of predicting 0 for the same samples, or every
    /// gradient is 0; "none" stops only where a number is not finite. An update is saved once the micro-batches of
    /// the next step have passed this; where no step follows, it is tried on its last one. Default 10.
    #[serde(with = "number_or_none")]
    #[schemars(schema_with = "word_or::<f64>")]
    pub divergence_factor: Option<f64>,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 1,
            gradient_accumulation_steps: 1,
            seed: 42,
            guidance: 1.0,
            timestep_sampling: TimestepSampling::default(),
            logit_mean: 0.0,
            logit_std: 1.0,
            mode_scale: 1.29,
            sigmoid_scale: 1.0,
            shift: TimestepShift::default(),
            loss_type: LossType::default(),
            huber_c: None,
            loss_weighting: LossWeighting::default(),
            min_snr_gamma: None,
            divergence_factor: Some(10.0),
        }
    }
}

impl TrainSection {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        check_at_least_1("train.steps", self.steps)?;
        check_count("train.batch_size", self.batch_size, MAX_COUNT)?;
        check_count(
            "train.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            MAX_COUNT,
        )?;
        check_seed("train.seed", self.seed)?;
        AT_LEAST_0.check("train.guidance", self.guidance)?;
        FINITE.check("train.logit_mean", self.logit_mean)?;
        ABOVE_0.check("train.logit_std", self.logit_std)?;
        MODE_SCALE.check("train.mode_scale", self.mode_scale)?;
        ABOVE_0.check("train.sigmoid_scale", self.sigmoid_scale)?;
        if let TimestepShift::Constant(shift) = self.shift {
            Rule("above 0, or \"flux\"", ABOVE_0.1).check("train.shift", shift)?;
        }
        let unshifted = self.shift == TimestepShift::Constant(1.0);
        match self.timestep_sampling {
            TimestepSampling::Shift if unshifted => {
                let problem = "must be another number than 1 with timestep_sampling = \"shift\": kohya's discrete_flow_shift, 3 there unless given";
                return Err(("train.shift", problem.into()));
            }
            TimestepSampling::FluxShift if !unshifted => {
                let problem = "has no effect with timestep_sampling = \"flux_shift\", which has the shift of the image's size";
                return Err(("train.shift", problem.into()));
            }
            _ => {}
        }
        for (key, value, used, with) in [
            (
                "train.huber_c",
                self.huber_c,
                self.loss_type == LossType::Huber,
                "loss_type = \"huber\"",
            ),
            (
                "train.min_snr_gamma",
                self.min_snr_gamma,
                self.loss_weighting == LossWeighting::MinSnr,
                "loss_weighting = \"min_snr\"",
            ),
        ] {
            let Some(value) = value else { continue };
            if !used {
                return Err((key, format!("has no effect but with {with}")));
            }
            ABOVE_0.check(key, value)?;
        }
        if let Some(factor) = self.divergence_factor {
            let rule = Rule(
                "above 1, or \"none\" to go on whatever the loss",
                |factor| factor > 1.0 && factor.is_finite(),
            );
            rule.check("train.divergence_factor", factor)?;
        }
        Ok(())
    }
}

/// Densities of sigma.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSampling {
    /// Uniform in [0, 1].
    #[default]
    None,
    /// `sigmoid(logit_mean + logit_std * n)` with `n` normal.
    LogitNormal,
    /// Heavy in the middle, arXiv:2403.03206 equation 20, by `mode_scale`.
    Mode,
    /// `sigmoid(sigmoid_scale * n)` with `n` normal.
    Sigmoid,
    /// Uniform in [0, 1], not rounded to one of 1000 levels; kohya's name.
    Uniform,
    /// "sigmoid", moved by `shift`; kohya's name.
    Shift,
    /// "sigmoid", moved as sampling is at the image's size; kohya's name.
    FluxShift,
}

/// How the drawn sigma is moved towards noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TimestepShift {
    /// By this factor at every image size; 1 leaves sigma alone.
    Constant(f64),
    /// By `exp(mu)`, where `mu` grows with the number of image tokens as in FLUX's sampler.
    Flux,
}

impl Default for TimestepShift {
    fn default() -> Self {
        Self::Constant(1.0)
    }
}

impl Serialize for TimestepShift {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Constant(shift) => serializer.serialize_f64(*shift),
            Self::Flux => serializer.serialize_str("flux"),
        }
    }
}

impl<'de> Deserialize<'de> for TimestepShift {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let shift = deserializer.deserialize_any(NumberOr("flux"))?;
        Ok(shift.map_or(Self::Flux, Self::Constant))
    }
}

/// Weights in the loss, named as in diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossWeighting {
    /// 1.
    #[default]
    None,
    /// `1 / sigma^2`.
    SigmaSqrt,
    /// `2 / (pi * (1 - 2 * sigma + 2 * sigma^2))`.
    Cosmap,
    /// `min((1 - sigma)^2, min_snr_gamma * sigma^2)`: arXiv:2303.09556's `min(SNR, gamma)` for the error of the picture that a
    /// velocity means, which is sigma times the velocity's.
    MinSnr,
}

/// Errors in the loss, named as in kohya's and diffusers' scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(transform = with_aliases::<Self>)]
pub enum LossType {
    /// `e^2`.
    #[default]
    #[serde(alias = "l2")]
    Mse,
    /// `|e|`.
    #[serde(alias = "l1")]
    Mae,
    /// `2 c (sqrt(e^2 + c^2) - c)` with `c` = `huber_c`.
    Huber,
}
