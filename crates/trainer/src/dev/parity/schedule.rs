//! Cases of noise levels: the sampler's steps, and the levels that training draws.

use anyhow::{Context, bail};
use burn::tensor::Device;
use flux_model::pipeline::read_json;
use flux_model::scheduler::{SchedulerConfig, euler_step};
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;
use serde_json::Value;

use super::case::{Case, Tensors};
use super::report::Report;
use crate::config::{LossWeighting, TrainSection};
use crate::loss::{loss_weight, mode_density, sigmoid, table_index};

/// Values as a tensor of one dimension.
pub(super) fn vector(values: impl IntoIterator<Item = f32>) -> HostTensor {
    let values: Vec<f32> = values.into_iter().collect();
    HostTensor::from_f32([values.len()], &values)
}

fn scheduler_config(case: &Case) -> anyhow::Result<SchedulerConfig> {
    let folder = case.path("/scheduler/path")?;
    Ok(read_json(&folder.join("scheduler_config.json"))?)
}

/// `scheduler`, shifted by what `mu` gives for (image tokens, steps).
pub(super) fn scheduler(
    case: &Case,
    device: &Device,
    mu: impl Fn(&SchedulerConfig, usize, usize) -> f64,
) -> anyhow::Result<Report> {
    let config = scheduler_config(case)?;
    let timesteps = |sigmas: &[f32]| {
        let scale = config.num_train_timesteps as f32;
        vector(sigmas.iter().map(|sigma| sigma * scale))
    };
    let mut out = Tensors::new();
    let runs = case.value("/runs")?.as_array();
    let runs = runs.context("`/runs` of case.json is not a list")?.len();
    for i in 0..runs {
        let count = |key: &str| case.usize(&format!("/runs/{i}/{key}"));
        let (tokens, steps) = (count("image_seq_len")?, count("num_inference_steps")?);
        let mu = mu(&config, tokens, steps);
        out.insert(format!("run{i}.mu"), vector([mu as f32]));
        let sigmas = config.sigmas_shifted(steps, mu);
        let Some(steps @ 1..) = sigmas.len().checked_sub(1) else {
            bail!("`/runs/{i}/num_inference_steps` of case.json is 0")
        };
        let (sample, velocity) = (format!("run{i}.sample"), format!("run{i}.model_output"));
        for (name, k) in [("step0", 0), ("step_last", steps - 1)] {
            let stepped = euler_step::<3>(
                case.tensor(&sample, device)?,
                case.tensor(&velocity, device)?,
                sigmas[k],
                sigmas[k + 1],
            );
            out.insert(format!("run{i}.{name}"), host_tensor(stepped));
        }
        out.insert(format!("run{i}.timesteps"), timesteps(&sigmas[..steps]));
        out.insert(format!("run{i}.sigmas"), vector(sigmas));
    }
    let table = config.training_sigmas();
    out.insert("train.timesteps".into(), timesteps(&table));
    out.insert("train.sigmas".into(), vector(table));
    Report::by_tensor(case, out)
}

/// `timestep_sampling`: from raw draws to noise levels and weights.
pub(super) fn timestep_sampling(case: &Case) -> anyhow::Result<Report> {
    let config = match case.optional("/scheduler/path") {
        Some(_) => scheduler_config(case)?,
        None => SchedulerConfig {
            use_dynamic_shifting: true, // FLUX.1-dev's
            shift: 3.0,
            ..SchedulerConfig::default()
        },
    };
    let table = config.training_sigmas();
    let schemes = case.value("/schemes")?.as_object();
    let schemes = schemes.context("`/schemes` of case.json is not a table")?;
    let mut out = Tensors::new();
    for scheme in schemes.keys() {
        let setting = |key: &str| case.f64(&format!("/schemes/{scheme}/{key}"));
        let density: Box<dyn Fn(f32) -> f32> = match scheme.as_str() {
            "none" => Box::new(|raw| raw),
            "logit_normal" => {
                let (mean, std) = (setting("logit_mean")? as f32, setting("logit_std")? as f32);
                Box::new(move |raw| sigmoid(f64::from(mean + std * raw)) as f32)
            }
            "mode" => {
                let scale = setting("mode_scale")?;
                Box::new(move |raw| mode_density(f64::from(raw), scale) as f32)
            }
            other => bail!("unknown scheme `{other}` in `/schemes` of case.json"),
        };
        let raw = case.input(&format!("{scheme}.raw"))?;
        let u: Vec<f32> = raw.to_f32().into_iter().map(density).collect();
        let n = table.len();
        // As torch does, in f32.
        let indices = u
            .iter()
            .map(|&u| table_index(f64::from(u * n as f32) / n as f64, n));
        let indices: Vec<usize> = indices.collect();
        let sigmas: Vec<f32> = indices.iter().map(|&index| table[index]).collect();
        let mut put = |name: &str, values: &[f32]| {
            let tensor = HostTensor::from_f32(raw.shape.clone(), values);
            out.insert(format!("{scheme}.{name}"), tensor);
        };
        for (name, weighting) in [
            ("none", LossWeighting::None),
            ("sigma_sqrt", LossWeighting::SigmaSqrt),
            ("cosmap", LossWeighting::Cosmap),
        ] {
            let train = TrainSection {
                loss_weighting: weighting,
                ..TrainSection::default()
            };
            let weights = sigmas.iter().map(|&sigma| loss_weight(&train, sigma));
            put(&format!("weighting.{name}"), &weights.collect::<Vec<_>>());
        }
        let scale = config.num_train_timesteps as f32;
        let timesteps: Vec<f32> = sigmas.iter().map(|sigma| sigma * scale).collect();
        put("timesteps", &timesteps);
        put("sigmas", &sigmas);
        put("u", &u);
        let indices: Vec<i64> = indices.into_iter().map(|index| index as i64).collect();
        out.insert(
            format!("{scheme}.indices"),
            HostTensor::from_i64(raw.shape.clone(), &indices),
        );
    }
    Report::by_tensor(case, out)
}

/// The weighting that diffusers' `weighting_scheme` means; its sampling schemes weigh nothing.
pub(super) fn weighting(case: &Case, pointer: &str) -> anyhow::Result<LossWeighting> {
    match case.value(pointer)? {
        Value::String(name) => match name.as_str() {
            "none" | "logit_normal" | "mode" => Ok(LossWeighting::None),
            "sigma_sqrt" => Ok(LossWeighting::SigmaSqrt),
            "cosmap" => Ok(LossWeighting::Cosmap),
            other => bail!("unknown `{pointer}` of case.json: {other}"),
        },
        _ => bail!("`{pointer}` of case.json is not a string"),
    }
}
