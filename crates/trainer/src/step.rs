//! One step of the training: micro-batches, clipping, update, and what stops a run that goes wrong.

use anyhow::{Context, bail};
use burn::module::Module;
use flux_model::family::Family;
use lora_core::{DropoutScope, Gradients};
use serde::Serialize;

use crate::backward::{loss_and_gradients, loss_of};
use crate::config::RunConfig;
use crate::data::batch::{Data, Drawn};
use crate::device::NamedDevice;
use crate::run::checkpoint::{RunTraining, adapter_file};

/// One line of `metrics.jsonl`: only what a resumed run would write again in the same bits, so no times.
#[derive(Debug, Serialize)]
pub(crate) struct StepMetrics {
    pub(crate) step: u64,
    epoch: u64,
    pub(crate) loss: f64,
    grad_norm: f64,
    pub(crate) lr: f64,
}

/// One optimizer step: micro-batches, clipping, update.
pub(crate) fn step<F: Family>(
    training: &mut RunTraining<F::Network>,
    config: &RunConfig,
    data: &Data<'_, F>,
    names: &[&str],
    device: &NamedDevice,
) -> anyhow::Result<StepMetrics> {
    let step = training.progress.step;
    let accumulation = config.train.gradient_accumulation_steps;
    let first = step * accumulation as u64;
    let guard = config.train.divergence_factor;
    let mut gradients = Gradients::default();
    let (mut loss, mut drawn_from) = (0.0, Vec::new());
    for micro_step in first..first + accumulation as u64 {
        let drawn = data.draw(config, micro_step, &device.device.clone().autodiff())?;
        drawn_from.extend(describe(&drawn, names));
        let scope = DropoutScope::enter(config.train.seed, micro_step);
        let (micro_loss, micro_gradients) = loss_and_gradients(
            &training.model,
            drawn.batch,
            accumulation,
            config.train.recompute,
        )?;
        scope.finish()?;
        #[cfg(feature = "canary")]
        let micro_loss = crate::canary::poison("loss", step + 1).map_or(micro_loss, |v| v as f32);
        if let Some(fault) = fault_of(micro_loss, drawn.loss_of_zero, guard) {
            bail!(
                "{fault} at step {}, for {}; the last checkpoint is untouched",
                step + 1,
                drawn_from.join(", ")
            );
        }
        loss += f64::from(micro_loss) / accumulation as f64;
        gradients.accumulate(micro_gradients);
    }
    let place = || {
        format!(
            "at step {}, for {}; the last checkpoint is untouched",
            step + 1,
            drawn_from.join(", ")
        )
    };
    #[cfg(feature = "canary")]
    let gradients = match crate::canary::poison("gradient", step + 1) {
        Some(factor) => gradients.clip(0.0, factor),
        None => gradients,
    };
    let grad_norm = gradients.norm().with_context(place)?;
    if grad_norm == 0.0 && guard.is_some() {
        bail!(
            "the run has collapsed (every gradient is 0, so nothing is learned; a lower `optimizer.learning_rate` may help) {}",
            place()
        );
    }
    let gradients = match config.optimizer.max_grad_norm {
        Some(max_norm) => gradients.clip(grad_norm, max_norm),
        None => gradients,
    };
    let lr = config.learning_rate(step);
    #[cfg(feature = "canary")]
    let lr = crate::canary::poison("update", step + 1).unwrap_or(lr);
    // The model is taken out for the step: a failed step leaves no half-updated model behind that could be saved.
    training.model = training
        .optimizer
        .step(lr, training.model.clone(), gradients)
        .with_context(place)?;
    adapter_file(&training.model, &config.lora.config()).with_context(place)?;
    training.progress.step += 1;
    Ok(StepMetrics {
        step: step + 1,
        epoch: data.order.epoch(first),
        loss,
        grad_norm,
        lr,
    })
}

/// The samples of a micro-batch, for people.
fn describe<I>(drawn: &Drawn<I>, names: &[&str]) -> Vec<String> {
    let samples = drawn.samples.iter().zip(&drawn.sigmas);
    samples
        .map(|(&sample, sigma)| format!("{} (sigma {sigma})", names[sample]))
        .collect()
}

/// What is wrong with a loss, if anything: it is no number, or more than `factor` times the loss of predicting 0.
///
/// That loss is of the same samples and noise, so the verdict depends on nothing that came before: a resumed run stops
/// where the uninterrupted one would.
fn fault_of(loss: f32, loss_of_zero: f64, factor: Option<f64>) -> Option<String> {
    if !loss.is_finite() {
        return Some(format!("the loss is {loss}"));
    }
    let factor = factor?;
    (f64::from(loss) > factor * loss_of_zero).then(|| {
        format!(
            "the run has diverged (the loss is {loss}; `train.divergence_factor` allows {factor} times the {loss_of_zero:.3} of predicting 0; a lower `optimizer.learning_rate` may help)"
        )
    })
}

/// Tries an update that is about to be saved on the last micro-batch it was made from: one too large shows in a loss, and
/// that of the next step would come after the save.
pub(crate) fn check_update<F: Family>(
    training: &RunTraining<F::Network>,
    config: &RunConfig,
    data: &Data<'_, F>,
    names: &[&str],
    device: &NamedDevice,
) -> anyhow::Result<()> {
    let step = training.progress.step;
    let last = step * config.train.gradient_accumulation_steps as u64 - 1;
    let drawn = data.draw(config, last, &device.device)?;
    let drawn_from = describe(&drawn, names);
    let loss = loss_of(&training.model.valid(), drawn.batch)?;
    if let Some(fault) = fault_of(loss, drawn.loss_of_zero, config.train.divergence_factor) {
        bail!(
            "{fault} after the update at step {step}, for {}; the last checkpoint is untouched",
            drawn_from.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_judged_by_the_loss_of_predicting_0() {
        assert_eq!(fault_of(20.0, 2.0, Some(10.0)), None);
        let fault = fault_of(20.1, 2.0, Some(10.0)).unwrap_or_default();
        assert!(
            fault.contains(
                "diverged (the loss is 20.1; `train.divergence_factor` allows 10 times the 2.000"
            ),
            "{fault}"
        );
        assert_eq!(fault_of(f32::MAX, 2.0, None), None);
        // A loss that is no number stops every run.
        let said = |loss, factor| fault_of(loss, 2.0, factor).unwrap_or_default();
        assert_eq!(said(f32::INFINITY, None), "the loss is inf");
        assert_eq!(said(f32::NAN, Some(10.0)), "the loss is NaN");
    }
}
