//! Data parallel: the micro-batches of a step computed at once, each by a worker with a copy of the model.
//!
//! A micro-batch is a function of its index, and what a worker makes of it depends on nothing else: its loss and gradients are
//! those that one worker alone finds. They are added up on the first worker's device in the order of the micro steps, by the very
//! additions that it makes alone. So a run ends in the same bits with any number of workers, and goes on with another.
//!
//! Workers are threads of one process. One on the device of another shares its base weights, unless they are read block by
//! block; on a device of its own it has its own. The optimizer, validation, previews and saves are the first one's.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::thread;

use anyhow::Context;
use burn::tensor::Device;
use flux_model::family::Velocity;
use lora_core::Gradients;
use lora_core::ops::in_pool;
use lora_core::state::with_trained_of;
use lora_core::training::DropoutScope;

use crate::backward::{MicroBatch, loss_and_gradients};
use crate::cli::UsageError;
use crate::config::RunConfig;
use crate::device::NamedDevice;
use crate::rule::Rule;

/// Those who compute micro-batches: the first with the model that is trained, the others with copies of it.
pub struct Workers<N> {
    /// One a worker, with autodiff.
    devices: Vec<Device>,
    /// One for each worker but the first.
    copies: Vec<N>,
}

/// A micro-batch to be computed.
pub struct Work<I> {
    /// Its index in the run.
    pub micro_step: u64,
    /// On the worker's device.
    pub batch: MicroBatch<I>,
}

impl<N: Velocity> Workers<N> {
    /// The first one alone, on an autodiff device.
    pub fn alone(device: &Device) -> Self {
        Self {
            devices: vec![device.clone()],
            copies: Vec::new(),
        }
    }

    /// One more, with a copy of the model on its autodiff device. Resident base weights may be shared with the model; a stream
    /// of blocks is one worker's.
    pub fn add(&mut self, device: &Device, copy: N) {
        self.devices.push(device.clone());
        self.copies.push(copy);
    }

    /// The copy of worker `rank`, 1 or more.
    pub fn copy(&self, rank: usize) -> &N {
        &self.copies[rank - 1]
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.devices.len()
    }

    /// Their devices, with autodiff.
    pub fn devices(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter()
    }

    /// Gives every copy what is trained of `model`, as leaves of its own: graphs that share one would wait for each other.
    pub fn follow(&mut self, model: &N) {
        for copy in &mut self.copies {
            *copy = with_trained_of(copy, model);
        }
    }

    /// Loss and gradients of one micro-batch for each worker, or for the first so many, in their order; the gradients are on
    /// the first one's device.
    pub(crate) fn compute(
        &self,
        model: &N,
        rule: &Rule,
        work: Vec<Work<N::Input>>,
    ) -> Vec<anyhow::Result<(f32, Gradients)>> {
        let mut work = work.into_iter();
        let Some(own) = work.next() else {
            return Vec::new();
        };
        let device = self.devices[0].clone().inner();
        thread::scope(|scope| {
            let others: Vec<_> = work
                .zip(&self.copies)
                .map(|(work, copy)| {
                    let (copy, device) = (copy.clone(), device.clone());
                    let name = format!("worker-{}", work.micro_step % self.count() as u64);
                    let compute = move || {
                        let (loss, gradients) = compute(&copy, rule, work)?;
                        Ok((loss, gradients.to_device(&device)))
                    };
                    thread::Builder::new()
                        .name(name)
                        .spawn_scoped(scope, compute)
                })
                .collect();
            let mut computed = vec![match others.is_empty() {
                true => {
                    let model = model.clone();
                    in_pool(&device, move || compute(&model, rule, own))
                }
                false => compute(model, rule, own),
            }];
            for thread in others {
                computed.push(match thread.context("start a worker's thread") {
                    Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
                    Err(error) => Err(error),
                });
            }
            computed
        })
    }
}

fn compute<N: Velocity>(
    model: &N,
    rule: &Rule,
    work: Work<N::Input>,
) -> anyhow::Result<(f32, Gradients)> {
    let scope = DropoutScope::enter(rule.seed, work.micro_step);
    let found = loss_and_gradients(model, work.batch, rule.accumulation, rule.recomputed)?;
    scope.finish()?;
    Ok(found)
}

/// Refuses more devices than a step has passes for, and a number that would leave some of them idle in some.
///
/// # Errors
/// The number of passes that is no multiple of theirs.
pub(crate) fn check_shares(config: &RunConfig, devices: &[NamedDevice]) -> Result<(), UsageError> {
    let (passes, count) = (config.train.gradient_accumulation_steps, devices.len());
    if passes.is_multiple_of(count) {
        return Ok(());
    }
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    Err(UsageError(format!(
        "--device {}: {count} devices share the passes of a step evenly, and `train.gradient_accumulation_steps` is {passes}; make it {} (it counts the passes of all devices together), or name fewer devices",
        names.join(","),
        passes.next_multiple_of(count)
    )))
}

/// How many workers the device with the most has.
pub(crate) fn most_on_one(devices: &[NamedDevice]) -> usize {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for device in devices {
        *counts.entry(&device.name).or_default() += 1;
    }
    counts.into_values().max().unwrap_or(1)
}
