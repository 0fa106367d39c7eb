//! The learning rate as a function of the step.
//!
//! Source: diffusers 0.38 `optimization.py` (`get_scheduler`); rex: arXiv:2107.04197.

use std::f64::consts::{PI, TAU};

use crate::config::{LrSchedulerName, LrSchedulerSection, RunConfig};

impl RunConfig {
    /// The learning rate of optimizer step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let peak = self.optimizer.learning_rate;
        peak * self.lr_scheduler.factor(step, self.train.steps, peak)
    }
}

impl LrSchedulerSection {
    /// Factor on the learning rate, which is `peak`, for optimizer step `step` of `total_steps`, counted from 0.
    ///
    /// `constant` has no warm-up, as in diffusers.
    pub fn factor(&self, step: u64, total_steps: u64, peak: f64) -> f64 {
        let ratio = |a: u64, b: u64| a as f64 / b.max(1) as f64;
        let warmup_steps = self.warmup_steps;
        if self.name == LrSchedulerName::Constant {
            return 1.0;
        }
        if step < warmup_steps {
            return ratio(step, warmup_steps);
        }
        let remaining = total_steps.saturating_sub(warmup_steps);
        let left = ratio(total_steps.saturating_sub(step), remaining);
        let progress = ratio(step - warmup_steps, remaining);
        let cycles = self.num_cycles.unwrap_or(self.name.num_cycles());
        match self.name {
            LrSchedulerName::Constant | LrSchedulerName::ConstantWithWarmup => 1.0,
            LrSchedulerName::Linear => left,
            LrSchedulerName::Cosine => (0.5 * (1.0 + libm::cos(TAU * cycles * progress))).max(0.0),
            LrSchedulerName::CosineWithRestarts if progress >= 1.0 => 0.0,
            LrSchedulerName::CosineWithRestarts => {
                (0.5 * (1.0 + libm::cos(PI * ((cycles * progress) % 1.0)))).max(0.0)
            }
            LrSchedulerName::Polynomial => {
                let (power, end) = (self.power.unwrap_or(1.0), self.lr_end.unwrap_or(1e-7));
                ((peak - end) * libm::pow(left, power) + end) / peak
            }
            LrSchedulerName::Rex => left / (0.5 + 0.5 * left),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What diffusers' `get_scheduler` gives for 30 steps, 4 of warm-up, a peak of 2e-3; rex by hand.
    #[test]
    fn the_curves_are_those_of_diffusers() {
        const STEPS: [u64; 7] = [0, 3, 4, 9, 17, 28, 30];
        let check = |name, num_cycles, power, expected: [f64; 7]| {
            let section = LrSchedulerSection {
                name,
                warmup_steps: 4,
                num_cycles,
                power,
                lr_end: None,
            };
            for (step, expected) in STEPS.into_iter().zip(expected) {
                let found = section.factor(step, 30, 2e-3);
                assert!((found - expected).abs() < 1e-12, "{name:?} {step}: {found}");
            }
        };
        use LrSchedulerName::*;
        check(Constant, None, None, [1.0; 7]);
        let warm = [0.0, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0];
        check(ConstantWithWarmup, None, None, warm);
        let linear = [
            0.0,
            0.75,
            1.0,
            0.8076923076923077,
            0.5,
            0.07692307692307693,
            0.0,
        ];
        check(Linear, None, None, linear);
        let cosine = [
            0.0,
            0.75,
            1.0,
            0.9114919329468282,
            0.5,
            0.014529091286973994,
            0.0,
        ];
        check(Cosine, None, None, cosine);
        let restarts = [
            0.0,
            0.75,
            1.0,
            0.38034216785622105,
            0.5,
            0.12574462591444957,
            0.0,
        ];
        check(CosineWithRestarts, Some(3.0), None, restarts);
        let quadratic = [
            0.0,
            0.75,
            1.0,
            0.6523842455621303,
            0.25003749999999997,
            0.005966863905325437,
            4.9999999999999996e-05,
        ];
        check(Polynomial, None, Some(2.0), quadratic);
        let rex = [0.0, 0.75, 1.0, 42.0 / 47.0, 2.0 / 3.0, 4.0 / 28.0, 0.0];
        check(Rex, None, None, rex);
    }
}
