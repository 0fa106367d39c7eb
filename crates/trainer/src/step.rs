//! One step of a training: micro-batches, clipping, update, and what stops a run that goes wrong.
//!
//! Training, the `train` reference cases and the benchmark make their steps here.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::tensor::Device;
use flux_model::family::Velocity;
use lora_core::state::check_finite;
use lora_core::{Gradients, Training};

use crate::backward::{MicroBatch, loss_of};
use crate::rule::Rule;
use crate::run::checkpoint::Progress;
use crate::workers::{Work, Workers};

/// A micro-batch, and what is said of it if it goes wrong.
#[derive(Debug, Clone)]
pub struct Drawn<I> {
    /// The batch.
    pub batch: MicroBatch<I>,
    /// Its samples, for people.
    pub about: Vec<String>,
    /// See [`loss_of_zero`](crate::loss::loss_of_zero).
    pub loss_of_zero: f64,
}

/// The first part of a step, which changes nothing: the micro-batches.
#[derive(Debug)]
pub struct Computed {
    losses: Vec<f32>,
    gradients: Gradients,
    grad_norm: f64,
    /// Samples of the micro-batches, for people.
    drawn_from: Vec<String>,
    waited: Duration,
    took: Duration,
}

/// What a step did.
#[derive(Debug)]
pub struct Stepped {
    /// Loss of each micro-batch.
    pub losses: Vec<f32>,
    /// Their gradients, accumulated, before clipping.
    pub gradients: Gradients,
    /// Norm of those.
    pub grad_norm: f64,
    /// Time until the norm was known; the rest of the step is the optimizer's.
    pub backward: Duration,
    /// The part of it in which nothing was computed: micro-batches had to be drawn.
    pub waited: Duration,
}

/// One optimizer step: [`compute`], then [`update`].
///
/// # Errors
/// Those of both.
pub fn step<N: Velocity>(
    training: &mut Training<N, Progress>,
    rule: &Rule,
    workers: &mut Workers<N>,
    draw: impl FnMut(u64, &Device) -> anyhow::Result<Drawn<N::Input>>,
) -> anyhow::Result<Stepped> {
    let step = training.progress.step;
    let computed = compute(&training.model, step, rule, workers, draw)?;
    update(training, rule, computed)
}

/// Losses and gradients of the step after `step` steps; `draw` gives the micro-batch of a micro step on the autodiff device it is asked
/// for. The micro-batches are shared among `workers`, and added up in their order, so the bits do not depend on how many there are.
///
/// # Errors
/// A micro-batch that cannot be had, a loss or gradient that is not finite, a run that has diverged or collapsed.
pub fn compute<N: Velocity>(
    model: &N,
    step: u64,
    rule: &Rule,
    workers: &mut Workers<N>,
    mut draw: impl FnMut(u64, &Device) -> anyhow::Result<Drawn<N::Input>>,
) -> anyhow::Result<Computed> {
    let started = Instant::now();
    let mut waited = Duration::ZERO;
    let mut gradients = Gradients::default();
    let (mut losses, mut drawn_from) = (Vec::with_capacity(rule.accumulation), Vec::new());
    workers.follow(model);
    let first = step * rule.accumulation as u64;
    let micro_steps: Vec<u64> = (first..first + rule.accumulation as u64).collect();
    for round in micro_steps.chunks(workers.count()) {
        let (mut work, mut said) = (Vec::new(), Vec::new());
        for (&micro_step, device) in round.iter().zip(workers.devices()) {
            let asked = Instant::now();
            let drawn = draw(micro_step, device)?;
            waited += asked.elapsed();
            said.push((drawn.about, drawn.loss_of_zero));
            work.push(Work {
                micro_step,
                batch: drawn.batch,
            });
        }
        let computed = workers.compute(model, rule, work);
        for ((about, loss_of_zero), computed) in said.into_iter().zip(computed) {
            drawn_from.extend(about);
            let (loss, micro_gradients) = computed?;
            #[cfg(feature = "canary")]
            let loss = crate::canary::poison("loss", step + 1).map_or(loss, |v| v as f32);
            if let Some(fault) = fault_of(loss, loss_of_zero, rule.divergence_factor) {
                bail!("{fault} {}", place(step, &drawn_from));
            }
            losses.push(loss);
            gradients.accumulate(micro_gradients);
        }
    }
    #[cfg(feature = "canary")]
    let gradients = match crate::canary::poison("gradient", step + 1) {
        Some(factor) => gradients.clip(0.0, factor),
        None => gradients,
    };
    let grad_norm = (gradients.norm()).with_context(|| place(step, &drawn_from))?;
    if grad_norm == 0.0 && rule.divergence_factor.is_some() {
        bail!(
            "the run has collapsed (every gradient is 0, so nothing is learned; a lower `optimizer.learning_rate` may help) {}",
            place(step, &drawn_from)
        );
    }
    Ok(Computed {
        losses,
        gradients,
        grad_norm,
        drawn_from,
        waited,
        took: started.elapsed(),
    })
}

/// Clips, and updates what is trained.
///
/// # Errors
/// An update that is not finite. The model is updated then, and is not to be saved.
pub fn update<N: Velocity>(
    training: &mut Training<N, Progress>,
    rule: &Rule,
    computed: Computed,
) -> anyhow::Result<Stepped> {
    let Computed {
        losses,
        gradients,
        grad_norm,
        drawn_from,
        waited,
        took,
    } = computed;
    let step = training.progress.step;
    let clipped = match rule.max_grad_norm {
        Some(max_norm) => gradients.clone().clip(grad_norm, max_norm),
        None => gradients.clone(),
    };
    #[cfg(feature = "canary")]
    let lr = crate::canary::poison("update", step + 1).unwrap_or(rule.lr);
    #[cfg(not(feature = "canary"))]
    let lr = rule.lr;
    (training.optimizer)
        .step(lr, &mut training.model, clipped)
        .with_context(|| place(step, &drawn_from))?;
    check_finite(&training.model).with_context(|| place(step, &drawn_from))?;
    training.progress.step += 1;
    Ok(Stepped {
        losses,
        gradients,
        grad_norm,
        backward: took,
        waited,
    })
}

/// Where the step after `step` steps went wrong.
fn place(step: u64, drawn_from: &[String]) -> String {
    format!(
        "at step {}, for {}; the last checkpoint is untouched",
        step + 1,
        drawn_from.join(", ")
    )
}

/// Tries an update that is about to be saved on the last micro-batch it was made from, on the plain device: one too large
/// shows in a loss. Where a step follows, [`compute`] of that step tries it without a forward pass of its own.
///
/// # Errors
/// A loss that is not finite, or has diverged.
pub fn check_update<N: Velocity>(
    model: &N,
    step: u64,
    drawn: Drawn<N::Input>,
    divergence_factor: Option<f64>,
) -> anyhow::Result<()> {
    let loss = loss_of(&model.valid(), drawn.batch)?;
    if let Some(fault) = fault_of(loss, drawn.loss_of_zero, divergence_factor) {
        bail!(
            "{fault} after the update at step {step}, for {}; the last checkpoint is untouched",
            drawn.about.join(", ")
        );
    }
    Ok(())
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
