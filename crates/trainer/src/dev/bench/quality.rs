//! `flux-lora bench quality`: what base weights in fewer bits do to what a model computes, and to what it learns.
//!
//! The model of `bench step`, with the same adapter, inputs and draws for every storage. Given are the error of the weights of
//! linear layers and of the velocity, both `|a - b| / |b|` with `b` in f32, and the loss of a training: its mean over the last
//! tenth of the steps, and how far it is from that of f32.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use burn::tensor::Device;
use flux_model::families::{self, Visitor};
use flux_model::family::{Family, Network, Velocity};
use flux_model::weights::{change_parameters, tensors_of};
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::quantised::Quantised;
use lora_core::frozen::hold;
use lora_core::state::host_tensor;
use lora_core::training::recompute::Recomputed;

use super::model;
use crate::cli::{QualityBenchArgs, Storage};
use crate::device::{self, NamedDevice};
use crate::output::say;
use crate::step::step;
use crate::workers::Workers;

/// Measures every storage that is asked for, each after f32.
///
/// # Errors
/// No device; a training that fails.
pub fn run(args: &QualityBenchArgs) -> anyhow::Result<()> {
    let device = device::open(args.device.as_deref().unwrap_or(device::default_name()))?;
    let mut storages = vec![Storage::F32];
    for storage in &args.dtypes {
        if !storages.contains(storage) {
            storages.push(*storage);
        }
    }
    let measure = Measure {
        device: &device,
        steps: args.steps.max(1),
        storages,
    };
    families::named("flux1", measure).context("no FLUX.1")?
}

struct Measure<'a> {
    device: &'a NamedDevice,
    steps: u64,
    storages: Vec<Storage>,
}

impl Visitor for Measure<'_> {
    type Output = anyhow::Result<()>;

    fn visit<F: Family>(self) -> Self::Output {
        let device = self.device.device.clone().autodiff();
        say!("{} steps on {}", self.steps, self.device.name)?;
        say!(
            "{:<12} {:>10} {:>12} {:>14} {:>12} {:>10}",
            "",
            "bits",
            "weights",
            "velocity",
            "loss",
            "gap"
        )?;
        let mut exact: Option<(Vec<f32>, f64)> = None;
        for storage in self.storages {
            let name = match storage {
                Storage::F32 => "f32",
                Storage::Bf16 => "bf16",
                Storage::Fp8 => "fp8, scaled",
                Storage::Q8 => "q8",
                Storage::Nf4 => "nf4",
            };
            let network = model::network::<F>(&device)?;
            let (network, bits, weights) = stored(network, storage)?;
            let input = model::draw::<F>(u64::MAX, &device).batch.input;
            let velocity = host_tensor(network.forward(input)?.inner()).to_f32();
            let mut training = model::training::<F>(network)?;
            let rule = model::rule(Recomputed::first(0), 1e-3);
            let mut workers = Workers::alone(&device);
            let mut losses = Vec::new();
            for _ in 0..self.steps {
                let draw = |nth, device: &Device| Ok(model::draw::<F>(nth, device));
                let stepped = step(&mut training, &rule, &mut workers, draw)?;
                losses.push(stepped.losses[0]);
            }
            let last = &losses[losses.len() - losses.len().div_ceil(10)..];
            let loss = last.iter().copied().map(f64::from).sum::<f64>() / last.len() as f64;
            let (expected, exact_loss) = exact.get_or_insert((velocity.clone(), loss));
            say!(
                "{name:<12} {bits:>10.2} {weights:>12.2e} {:>14.2e} {loss:>12.5} {:>9.2}%",
                distance(&velocity, expected),
                100.0 * (loss / *exact_loss - 1.0),
            )?;
        }
        Ok(())
    }
}

/// The network with the weights of its linear layers stored so; bits a weight, and their error.
fn stored<N: Network>(network: N, storage: Storage) -> anyhow::Result<(N, f64, f64)> {
    let tensors = tensors_of(&network, |key| key.ends_with(".weight"));
    let matrices: BTreeMap<String, HostTensor> = tensors
        .into_iter()
        .filter(|(_, tensor)| tensor.shape.len() == 2)
        .collect();
    let error = |of: &dyn Fn(&str) -> Vec<f32>| {
        let [difference, norm] = matrices
            .iter()
            .fold([0.0; 2], |[difference, norm], (key, b)| {
                let (a, b) = (of(key), b.to_f32());
                let pairs = a.iter().zip(&b).map(|(a, b)| square(a - b));
                let own: f64 = b.iter().map(|b| square(*b)).sum();
                [difference + pairs.sum::<f64>(), norm + own]
            });
        (difference / norm).sqrt()
    };
    let encode: fn(Vec<usize>, &[f32]) -> Quantised = match storage {
        Storage::Fp8 => Quantised::fp8,
        Storage::Q8 => Quantised::int8,
        Storage::Nf4 => Quantised::nf4,
        Storage::F32 => return Ok((network, 32.0, 0.0)),
        Storage::Bf16 => {
            // f32 of the same values: what is computed is the same
            let rounded = |tensor: &HostTensor| tensor.cast(Dtype::Bf16).cast(Dtype::F32);
            let error = error(&|key| rounded(&matrices[key]).to_f32());
            let changes = matrices.iter();
            let changes = changes.map(|(key, tensor)| (key.clone(), (true, rounded(tensor))));
            let (network, _) = change_parameters(network, changes.collect(), 1.0);
            return Ok((network, 16.0, error));
        }
    };
    let encode = |tensor: &HostTensor| encode(tensor.shape.clone(), &tensor.to_f32());
    let few = matrices.iter();
    let few = few.map(|(key, tensor)| (key.clone(), Arc::new(encode(tensor))));
    let few: BTreeMap<String, Arc<Quantised>> = few.collect();
    let error = error(&|key| few[key].to_f32());
    let [bytes, numel] = few.values().fold([0, 0], |[bytes, numel], weight| {
        [bytes + weight.bytes(), numel + weight.numel()]
    });
    let bits = 8.0 * bytes as f64 / numel as f64;
    Ok((hold(network, few)?, bits, error))
}

/// `|a - b| / |b|`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

fn square(x: f32) -> f64 {
    f64::from(x) * f64::from(x)
}
