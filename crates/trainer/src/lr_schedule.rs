//! The learning rate as a function of the step.
//!
//! Source: diffusers 0.38 `optimization.py` (`get_scheduler`).

use crate::config::{LrSchedulerName, RunConfig};

impl RunConfig {
    /// The learning rate of optimizer step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let schedule = &self.lr_scheduler;
        self.optimizer.learning_rate
            * factor(
                schedule.name,
                step,
                schedule.warmup_steps,
                self.train.steps,
                schedule.num_cycles,
            )
    }
}

/// Factor on the learning rate for optimizer step `step`, counted from 0.
///
/// `constant` has no warm-up, as in diffusers.
pub fn factor(
    schedule: LrSchedulerName,
    step: u64,
    warmup_steps: u64,
    total_steps: u64,
    num_cycles: f64,
) -> f64 {
    let ratio = |a: u64, b: u64| a as f64 / b.max(1) as f64;
    if schedule == LrSchedulerName::Constant {
        return 1.0;
    }
    if step < warmup_steps {
        return ratio(step, warmup_steps);
    }
    let remaining = total_steps.saturating_sub(warmup_steps);
    match schedule {
        LrSchedulerName::Constant | LrSchedulerName::ConstantWithWarmup => 1.0,
        LrSchedulerName::Linear => ratio(total_steps.saturating_sub(step), remaining),
        LrSchedulerName::Cosine => {
            let progress = ratio(step - warmup_steps, remaining);
            (0.5 * (1.0 + libm::cos(std::f64::consts::TAU * num_cycles * progress))).max(0.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_starts_at_zero_and_the_ends_are_zero() {
        let cosine = |step| factor(LrSchedulerName::Cosine, step, 4, 30, 0.5);
        assert_eq!([cosine(0), cosine(1), cosine(4)], [0.0, 0.25, 1.0]);
        assert!((cosine(17) - 0.5).abs() < 1e-12 && cosine(30) < 1e-12);
        assert_eq!(factor(LrSchedulerName::Linear, 16, 2, 30, 0.5), 0.5);
        assert_eq!(factor(LrSchedulerName::Constant, 0, 10, 30, 0.5), 1.0);
    }
}
