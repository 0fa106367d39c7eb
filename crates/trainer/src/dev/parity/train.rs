//! Cases of training: given micro-batches, from given factors, through the step that a run makes.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::family::{Family, Network, Velocity};
use flux_model::weights::BaseDtype;
use lora_core::files::host::HostTensor;
use lora_core::state::adapter_state;
use lora_core::training::recompute::Recomputed;
use lora_core::{PathOptimizer, Training, attach};

use super::case::{Case, Tensors};
use super::lora::adapter;
use super::pictures;
use super::report::{Line, Report, relative_error, tensor_error};
use super::schedule::weighting;
use crate::backward::MicroBatch;
use crate::config::{LrSchedulerName, LrSchedulerSection, TrainSection};
use crate::loss::{Penalty, loss_of_zero, loss_weight};
use crate::rule::Rule;
use crate::run::checkpoint::Progress;
use crate::step::{Drawn, step};
use crate::workers::Workers;

/// `train`.
pub(super) fn compute<F: Family>(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let autodiff = device.clone().autodiff();
    let model = F::network_at(
        &case.path("/model/path")?,
        None,
        BaseDtype::AsStored,
        &autodiff,
    )?;
    let file = adapter(case, &case.path("/lora/init")?, "/lora")?;
    let model = attach(model, file.stored().fast())?;
    let data = Data::<F>::read(case, &model)?;

    let setting = |key: &str| case.f64(&format!("/optimizer/{key}"));
    let count = |key: &str| case.usize(&format!("/optimizer/{key}"));
    if case.str("/optimizer/name")? != "AdamW" {
        bail!("`/optimizer/name` of case.json is not AdamW");
    }
    let adamw = AdamWConfig::new()
        .with_beta_1(setting("betas/0")? as f32)
        .with_beta_2(setting("betas/1")? as f32)
        .with_epsilon(setting("eps")? as f32)
        .with_weight_decay(setting("weight_decay")? as f32);
    let schedule: LrSchedulerName =
        serde_json::from_value(case.value("/optimizer/lr_scheduler")?.clone())
            .context("`/optimizer/lr_scheduler` of case.json")?;
    let (steps, warmup, peak) = (count("steps")?, count("warmup")?, setting("lr")?);
    let schedule = LrSchedulerSection {
        name: schedule,
        warmup_steps: warmup as u64,
        num_cycles: match case.optional("/optimizer/num_cycles") {
            None => None, // diffusers' default
            Some(_) => Some(setting("num_cycles")?),
        },
        power: None,
        lr_end: None,
    };
    let rule = Rule {
        accumulation: count("gradient_accumulation_steps")?,
        recomputed: Recomputed::first(usize::MAX),
        seed: 0, // cases have no dropout
        max_grad_norm: Some(setting("max_grad_norm")?),
        lr: 0.0,
        divergence_factor: None,
    };

    let mut training = Training {
        model,
        optimizer: PathOptimizer::new(adamw.build()),
        progress: Progress::default(),
    };
    let init = named(&adapter_state(&training.model), "");
    let mut out = Tensors::new();
    let mut workers = Workers::alone(&autodiff);
    let (mut losses, mut norms, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..steps as u64 {
        let factor = schedule.factor(index, steps as u64, peak);
        let rule = Rule {
            lr: peak * factor,
            ..rule
        };
        let before = (index == 0).then(|| adapter_state(&training.model));
        let draw = |micro, device: &Device| data.draw(micro, device);
        let stepped = step(&mut training, &rule, &mut workers, draw)?;
        for (path, gradient) in stepped.gradients.iter() {
            if let Some(like) = before.as_ref().and_then(|state| state.get(path))
                && let Some(name) = rename(path)
            {
                let values = lora_core::state::host_tensor(gradient.clone()).to_f32();
                let gradient = HostTensor::from_f32(like.shape.clone(), &values);
                out.insert(format!("grad_step1.{name}"), gradient);
            }
        }
        losses.extend(stepped.losses);
        norms.push(stepped.grad_norm as f32);
        rates.push(rule.lr as f32);
        let snapshot = format!("step{}.", index + 1);
        let mut expected = case.expected.names();
        if expected.any(|name| name.starts_with(&snapshot)) {
            out.extend(named(&adapter_state(&training.model), &snapshot));
        }
    }
    for (name, tensor) in training.optimizer.state().tensors {
        for (suffix, moment) in [
            (".momentum.moment_1", "exp_avg"),
            (".momentum.moment_2", "exp_avg_sq"),
        ] {
            if let Some(name) = name.strip_suffix(suffix).and_then(rename) {
                out.insert(format!("{moment}.{name}"), tensor.clone());
            }
        }
    }
    let rows = [steps, rule.accumulation];
    out.insert("loss".into(), HostTensor::from_f32(rows, &losses));
    out.insert("grad_norm".into(), HostTensor::from_f32([steps], &norms));
    out.insert("lr".into(), HostTensor::from_f32([steps], &rates));
    let lines = compare(case, &out, &init)?;
    Ok(Report { lines, actual: out })
}

/// Loss, norm and rate step by step; adapters by their change since the start, moments and gradients by their values, all
/// tensors of a group together.
fn compare(case: &Case, actual: &Tensors, init: &Tensors) -> anyhow::Result<Vec<Line>> {
    let bound = |key: &str| case.f64(&format!("/tolerance/{key}"));
    let mut lines = Vec::new();
    let mut groups: BTreeMap<String, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for name in case.expected.names() {
        let expected = case.expected.read(name)?;
        let Some(found) = actual.get(name) else {
            lines.push(Line {
                name: format!("{name} (not computed)"),
                error: f64::NAN,
                bound: 0.0,
            });
            continue;
        };
        if found.shape != expected.shape {
            lines.push(Line {
                name: format!(
                    "{name} (shape {:?}, expected {:?})",
                    found.shape, expected.shape
                ),
                error: f64::INFINITY,
                bound: 0.0,
            });
            continue;
        }
        match name {
            "loss" | "grad_norm" => {
                let (found, expected) = (found.to_f64(), expected.to_f64());
                let worst = found
                    .iter()
                    .zip(&expected)
                    .map(|(a, e)| ((a - e) / e).abs());
                let error = worst.fold(
                    0.0,
                    |worst, e| if e > worst || e.is_nan() { e } else { worst },
                );
                lines.push(Line {
                    name: format!("{name} (worst step)"),
                    error,
                    bound: bound(&format!("{name}_rel"))?,
                });
            }
            "lr" => lines.push(Line {
                name: name.into(),
                error: tensor_error(found, &expected),
                bound: bound("lr_rel")?,
            }),
            _ => {
                let (group, rest) = name
                    .split_once('.')
                    .context("an expected tensor belongs to no group")?;
                let start = group.starts_with("step").then(|| init.get(rest));
                let start = match start {
                    Some(start) => start
                        .with_context(|| format!("`{rest}` was not in the adapter"))?
                        .to_f64(),
                    None => vec![0.0; expected.numel()],
                };
                let (a, e) = groups.entry(group.to_string()).or_default();
                a.extend(found.to_f64().iter().zip(&start).map(|(a, s)| a - s));
                e.extend(expected.to_f64().iter().zip(&start).map(|(e, s)| e - s));
            }
        }
    }
    for (group, (found, expected)) in groups {
        let (what, bound) = match group.as_str() {
            "exp_avg" | "exp_avg_sq" => ("all tensors", bound("moments_rel")?),
            "grad_step1" => ("all tensors", bound("grad_step1_rel")?),
            _ => ("change since the start, all tensors", bound("rel")?),
        };
        lines.push(Line {
            name: format!("{group} ({what})"),
            error: relative_error(&found, &expected),
            bound,
        });
    }
    Ok(lines)
}

/// What a case calls the tensors of an encoded prompt, in the order of [`Family::TEXT`].
fn embeds<F: Family>() -> impl Iterator<Item = &'static str> {
    let names = ["prompt_embeds", "pooled_prompt_embeds"];
    names.into_iter().take(F::TEXT.len())
}

/// The case's micro-batches; the first axis of every tensor counts them.
struct Data<F> {
    family: std::marker::PhantomData<F>,
    tensors: Tensors,
    train: TrainSection,
    /// Which of the tensors are pictures.
    pictures: Vec<String>,
}

impl<F: Family> Data<F> {
    fn read(case: &Case, network: &F::Network) -> anyhow::Result<Self> {
        let pictures = pictures::names(case);
        let mut names = vec!["model_input", "noise", "timesteps", "sigmas"];
        names.extend(embeds::<F>());
        names.extend(network.reads_guidance().then_some("guidance"));
        let names = names.into_iter().map(String::from);
        let read = |name: String| Ok((name.clone(), case.input(&name)?));
        let tensors: anyhow::Result<Tensors> =
            names.chain(pictures.iter().cloned()).map(read).collect();
        Ok(Self {
            family: std::marker::PhantomData,
            tensors: tensors?,
            train: TrainSection {
                loss_weighting: weighting(case, "/optimizer/weighting_scheme")?,
                ..TrainSection::default()
            },
            pictures,
        })
    }

    /// The part of micro-batch `micro`, without the axis that counts them.
    fn row(&self, name: &str, micro: u64) -> anyhow::Result<HostTensor> {
        let tensor = &self.tensors[name];
        let micro = micro as usize;
        match tensor.shape.as_slice() {
            [count, shape @ ..] if micro < *count && !shape.is_empty() => {
                let row = tensor.rows(micro..micro + 1).to_f32();
                Ok(HostTensor::from_f32(shape.to_vec(), &row))
            }
            shape => bail!("input `{name}` has shape {shape:?}, which has no micro-batch {micro}"),
        }
    }

    fn draw(
        &self,
        micro: u64,
        device: &Device,
    ) -> anyhow::Result<Drawn<<F::Network as Velocity>::Input>> {
        let (latents, noise) = (self.row("model_input", micro)?, self.row("noise", micro)?);
        let shape = <[usize; 4]>::try_from(latents.shape.clone());
        let Some(shape @ [batch, _, height, width]) = shape.ok() else {
            bail!("`model_input` is not [micro, batch, channels, height, width]")
        };
        let sigmas = self.row("sigmas", micro)?.to_f32();
        let timesteps = self.row("timesteps", micro)?.to_f32();
        if noise.shape != latents.shape || sigmas.len() != batch || timesteps.len() != batch {
            bail!("`noise`, `sigmas` or `timesteps` does not fit `model_input`");
        }
        let (latents, noise) = (latents.to_f32(), noise.to_f32());
        let pairs = || latents.iter().zip(&noise);
        let per_sample = latents.len() / batch;
        let noisy = pairs().enumerate().map(|(i, (latent, noise))| {
            let sigma = sigmas[i / per_sample];
            (1.0 - sigma) * latent + sigma * noise
        });
        let target: Vec<f32> = pairs().map(|(latent, noise)| noise - latent).collect();
        let tokens =
            |values: Vec<f32>| F::pack(Tensor::from_data(TensorData::new(values, shape), device));
        let text = embeds::<F>().map(|name| self.row(name, micro));
        let weights = sigmas.iter().map(|&s| loss_weight(&self.train, s));
        let weights: Vec<f32> = weights.collect();
        let input = F::input(
            tokens(noisy.collect()),
            [height, width],
            F::text(text.collect::<anyhow::Result<_>>()?, device),
            timesteps.iter().map(|t| t / 1000.0).collect(),
            match self.tensors.contains_key("guidance") {
                true => self.row("guidance", micro)?.to_f32(),
                false => vec![0.0; batch], // not read
            },
            pictures::of_micro_batch::<F>(&self.pictures, |name| self.row(name, micro), device)?,
        );
        Ok(Drawn {
            loss_of_zero: loss_of_zero(&target, &weights, Penalty::Square),
            batch: MicroBatch {
                input,
                target: tokens(target),
                weights,
                penalty: Penalty::Square,
            },
            about: vec![format!("micro-batch {micro}")],
        })
    }
}

/// `to_q.weight.adapter.default.lora_A` to `transformer.to_q.lora_A.weight`.
fn rename(path: &str) -> Option<String> {
    let (layer, factor) = path.split_once(".weight.adapter.default.")?;
    let suffix = if factor.starts_with("lora_magnitude") {
        factor.into()
    } else {
        format!("{factor}.weight")
    };
    Some(format!("transformer.{layer}.{suffix}"))
}

fn named(state: &Tensors, prefix: &str) -> Tensors {
    state
        .iter()
        .filter_map(|(path, tensor)| Some((format!("{prefix}{}", rename(path)?), tensor.clone())))
        .collect()
}
