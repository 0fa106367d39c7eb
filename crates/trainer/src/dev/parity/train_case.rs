//! Replays a training case: given micro-batches, from given factors, through the same code as a real run.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::flux1::latent::{image_positions, pack, text_positions};
use flux_model::flux1::load_transformer;
use flux_model::flux1::transformer::FluxInput;
use lora_core::files::host::HostTensor;
use lora_core::{
    AdapterSource, DEFAULT_ADAPTER, ForwardPath, Gradients, PathOptimizer, Plan, adapter_state,
};
use serde_json::Value;

use super::kinds::adapter;
use super::{Case, Line, Tensors, relative_error, tensor_error};
use crate::backward::{MicroBatch, loss_and_gradients};
use crate::config::{LossWeighting, LrSchedulerName};
use crate::loss::loss_weight;
use crate::lr_schedule;

/// What the run gives, by the case's names, and the factors it started from.
pub(super) fn replay(case: &Case, device: &Device) -> anyhow::Result<(Tensors, Tensors)> {
    let model = load_transformer(&case.path("/model/path")?, None, &device.clone().autodiff())?;
    let file = adapter(&case.path("/lora/init")?, case.value("/lora")?)?;
    let mut model = Plan::new(
        &model,
        DEFAULT_ADAPTER,
        None,
        AdapterSource::File(file),
        ForwardPath::Fast,
    )?
    .apply(model);

    let setting = |key: &str| case.f64(&format!("/optimizer/{key}"));
    let adamw = AdamWConfig::new()
        .with_beta_1(setting("betas/0")? as f32)
        .with_beta_2(setting("betas/1")? as f32)
        .with_epsilon(setting("eps")? as f32)
        .with_weight_decay(setting("weight_decay")? as f32);
    let mut optimizer = PathOptimizer::new(adamw.build());
    let (steps, warmup) = (
        case.usize("/optimizer/steps")?,
        case.usize("/optimizer/warmup").unwrap_or(0),
    );
    let accumulation = case
        .usize("/optimizer/gradient_accumulation_steps")
        .unwrap_or(1);
    let schedule: LrSchedulerName =
        serde_json::from_value(case.value("/optimizer/lr_scheduler")?.clone())
            .context("`lr_scheduler` of case.json")?;
    let weighting: LossWeighting = match case.value("/optimizer/weighting_scheme") {
        // diffusers uses one setting for sampling and weighting; the sampling schemes weigh nothing.
        Ok(Value::String(name)) if matches!(name.as_str(), "sigma_sqrt" | "cosmap") => {
            serde_json::from_value(Value::String(name.clone()))?
        }
        _ => LossWeighting::None,
    };
    let data = Data::read(case)?;

    let init = named(&adapter_state(&model), "");
    let mut out = Tensors::new();
    let (mut losses, mut norms, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..steps {
        let mut gradients = Gradients::default();
        for micro in step * accumulation..(step + 1) * accumulation {
            let (loss, micro_gradients) = loss_and_gradients(
                &model,
                data.batch(micro, weighting, &device.clone().autodiff())?,
                accumulation,
                true,
            )?;
            losses.push(loss);
            gradients.accumulate(micro_gradients);
        }
        if step == 0 {
            let state = adapter_state(&model);
            for (path, gradient) in gradients.iter() {
                let shape = state
                    .get(path)
                    .context("a gradient without parameter")?
                    .shape
                    .clone();
                let values = gradient
                    .to_data()
                    .convert::<f32>()
                    .try_into_vec::<f32>()
                    .expect("converted to f32");
                out.extend(rename(path).map(|name| {
                    (
                        format!("grad_step1.{name}"),
                        HostTensor::from_f32(shape, &values),
                    )
                }));
            }
        }
        let norm = gradients.norm()?;
        norms.push(norm as f32);
        let gradients = match setting("max_grad_norm") {
            Ok(max) => gradients.clip(norm, max),
            Err(_) => gradients,
        };
        let factor = lr_schedule::factor(
            schedule,
            step as u64,
            warmup as u64,
            steps as u64,
            setting("num_cycles").unwrap_or(0.5),
        );
        let lr = setting("lr")? * factor;
        rates.push(lr as f32);
        model = optimizer.step(lr, model, gradients)?;
        let snapshot = format!("step{}.", step + 1);
        if case
            .expected
            .names()
            .any(|name| name.starts_with(&snapshot))
        {
            out.extend(named(&adapter_state(&model), &snapshot));
        }
    }
    for (name, tensor) in optimizer.state().tensors {
        for (suffix, moment) in [
            (".momentum.moment_1", "exp_avg"),
            (".momentum.moment_2", "exp_avg_sq"),
        ] {
            if let Some(name) = name.strip_suffix(suffix).and_then(rename) {
                out.insert(format!("{moment}.{name}"), tensor.clone());
            }
        }
    }
    out.insert(
        "loss".into(),
        HostTensor::from_f32([steps, accumulation], &losses),
    );
    out.insert("grad_norm".into(), HostTensor::from_f32([steps], &norms));
    out.insert("lr".into(), HostTensor::from_f32([steps], &rates));
    Ok((out, init))
}

/// Loss, norm and rate step by step; adapters by their change since the start, moments and gradients by their values, all
/// tensors of a group together.
pub(super) fn compare(case: &Case, actual: &Tensors, init: &Tensors) -> anyhow::Result<Vec<Line>> {
    let bound = |key: &str| case.f64(&format!("/tolerance/{key}"));
    let mut lines = Vec::new();
    let mut groups: BTreeMap<String, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for name in case.expected.names() {
        let expected = case.expected.read(name)?;
        let Some(found) = actual
            .get(name)
            .or_else(|| actual.get(name.strip_suffix(".weight")?))
        else {
            lines.push(Line {
                name: name.into(),
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
                let start = group.starts_with("step").then(|| {
                    init.get(rest)
                        .or_else(|| init.get(rest.strip_suffix(".weight")?))
                });
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

/// `to_q.weight.lora.default.lora_A` to `transformer.to_q.lora_A.weight`.
fn rename(path: &str) -> Option<String> {
    let (layer, factor) = path.split_once(".weight.lora.default.")?;
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

/// The case's micro-batches; the first axis of every tensor counts them.
struct Data {
    tensors: BTreeMap<&'static str, HostTensor>,
}

impl Data {
    fn read(case: &Case) -> anyhow::Result<Self> {
        let mut tensors = BTreeMap::new();
        for name in [
            "model_input",
            "noise",
            "prompt_embeds",
            "pooled_prompt_embeds",
            "timesteps",
            "sigmas",
        ] {
            tensors.insert(name, case.input(name)?);
        }
        if case.has_input("guidance") {
            tensors.insert("guidance", case.input("guidance")?);
        }
        Ok(Self { tensors })
    }

    fn row<const D: usize>(
        &self,
        name: &str,
        micro: usize,
        device: &Device,
    ) -> anyhow::Result<Tensor<D>> {
        let tensor = &self.tensors[name];
        if micro >= tensor.shape[0] || tensor.shape.len() != D + 1 {
            bail!(
                "input `{name}` has shape {:?}, which has no micro-batch {micro} of {D} dimensions",
                tensor.shape
            );
        }
        let row = tensor.rows(micro..micro + 1);
        Ok(Tensor::from_data(
            TensorData::new(row.to_f32(), row.shape[1..].to_vec()),
            device,
        ))
    }

    fn numbers(&self, name: &str, micro: usize) -> Vec<f32> {
        self.tensors
            .get(name)
            .map(|t| t.rows(micro..micro + 1).to_f32())
            .unwrap_or_default()
    }

    fn batch(
        &self,
        micro: usize,
        weighting: LossWeighting,
        device: &Device,
    ) -> anyhow::Result<MicroBatch<FluxInput>> {
        let latents: Tensor<4> = self.row("model_input", micro, device)?;
        let noise: Tensor<4> = self.row("noise", micro, device)?;
        let txt: Tensor<3> = self.row("prompt_embeds", micro, device)?;
        let [batch, _, height, width] = latents.dims();
        let sigmas = self.numbers("sigmas", micro);
        let sigma =
            Tensor::<4>::from_data(TensorData::new(sigmas.clone(), [batch, 1, 1, 1]), device);
        let noisy = (sigma.clone().neg() + 1.0) * latents.clone() + sigma * noise.clone();
        let mut positions = text_positions(txt.dims()[1]);
        positions.extend(image_positions(height, width));
        let guidance = self.numbers("guidance", micro);
        Ok(MicroBatch {
            input: FluxInput {
                img: pack(noisy),
                txt,
                pooled: self.row("pooled_prompt_embeds", micro, device)?,
                sigma: self
                    .numbers("timesteps", micro)
                    .iter()
                    .map(|t| t / 1000.0)
                    .collect(),
                guidance: if guidance.is_empty() {
                    vec![1.0; batch]
                } else {
                    guidance
                },
                positions,
            },
            target: pack(noise - latents),
            weights: sigmas.iter().map(|&s| loss_weight(weighting, s)).collect(),
        })
    }
}
