//! How every kind of reference case but `train` is computed.

use std::path::Path;

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use flux_model::autoencoder::AutoencoderConfig;
use flux_model::family::{Family, Network, TextEncoders};
use flux_model::flux1::config::FluxConfig;
use flux_model::flux1::latent::{Position, image_positions, text_positions};
use flux_model::flux1::transformer::{FluxInput, FluxTransformer};
use flux_model::flux1::{Flux1, load_transformer};
use flux_model::lora::Component;
use flux_model::pipeline::{PipelineFolder, load_autoencoder, load_clip, load_t5, read_json};
use flux_model::sampler::Denoise;
use flux_model::scheduler::{SchedulerConfig, euler_step};
use flux_model::text::clip::ClipOutput;
use flux_model::text::tokenizer::{ClipTokenizer, T5Tokenizer};
use flux_model::weights::tensors_of;
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::TensorFile;
use lora_core::{
    AdapterFile, AdapterSource, ForwardPath, LoraConfig, METADATA_KEY, Plan, host_tensor, merge,
    set_adapters,
};
use serde_json::Value;

use super::{Case, Line, Tensors};
use crate::adapters::{self, LoadedLora};
use crate::config::{LossWeighting, TimestepSampling, TrainSection};
use crate::loss::{loss_weight, mode_density, sigmoid, table_index};
use crate::run::checkpoint::TRANSFORMER_PREFIX;

/// Everything the case expects, and maybe more.
pub(super) fn compute(case: &Case, device: &Device) -> anyhow::Result<Tensors> {
    match case.kind.as_str() {
        "transformer_forward" => {
            let model = load_transformer(&case.path("/model/path")?, None, device)?;
            Ok(Tensors::from([(
                "sample".into(),
                forward(case, &model, device)?,
            )]))
        }
        "single_file_transformer" => {
            let config: FluxConfig = serde_json::from_value(case.value("/config")?.clone())
                .context("`config` of case.json")?;
            let model = load_transformer(&case.path("/checkpoint/file")?, Some(&config), device)?;
            let found = FluxConfig {
                out_channels: config.out_channels.map(|_| model.config().out_channels()),
                ..model.config().clone()
            };
            if found != config {
                bail!("the architecture in the tensors is {found:?}, case.json says {config:?}");
            }
            Ok(Tensors::from([(
                "sample".into(),
                forward(case, &model, device)?,
            )]))
        }
        "vae" | "single_file_vae" => autoencoder(case, device),
        "clip_text" => {
            let clip = load_clip(&case.path("/model/path")?, device)?;
            let ClipOutput {
                last_hidden_state,
                pooled,
            } = clip.forward(&id_rows(&case.input("input_ids")?)?, device);
            Ok(Tensors::from([
                ("last_hidden_state".into(), host_tensor(last_hidden_state)),
                ("pooled".into(), host_tensor(pooled)),
            ]))
        }
        "t5_encoder" => {
            let t5 = load_t5(&case.path("/model/path")?, device)?;
            let output = t5.forward(&id_rows(&case.input("input_ids")?)?, device);
            Ok(Tensors::from([(
                "last_hidden_state".into(),
                host_tensor(output),
            )]))
        }
        "tokenizer" => tokenizers(case),
        "scheduler" => scheduler(case, device),
        "timestep_sampling" => timestep_sampling(case),
        "pipeline" => pipeline(case, device),
        "lora_forward" => lora_forward(case, device),
        "lora_format" => lora_format(case, device),
        kind => bail!("unknown kind `{kind}`"),
    }
}

/// Rules of a kind that a relative error per tensor does not say.
pub(super) fn adjust(case: &Case, actual: &Tensors, lines: &mut Vec<Line>) -> anyhow::Result<()> {
    if case.kind == "tokenizer" {
        // Where transformers' two tokenizers differ, either's ids will do.
        let row = |name: &str, i: usize| -> anyhow::Result<Option<HostTensor>> {
            Ok(case
                .expected
                .info(name)
                .is_some()
                .then(|| case.expected.read_rows(name, i..i + 1))
                .transpose()?)
        };
        for (name, other, key) in [
            ("clip_ids", "clip_ids_fast", "/clip_slow_and_fast_differ_on"),
            ("clip_ids_fast", "clip_ids", "/clip_slow_and_fast_differ_on"),
        ] {
            let Some(line) = lines.iter_mut().find(|line| line.name == name) else {
                continue;
            };
            let Some(ids) = actual.get(name) else {
                continue;
            };
            let differ: Vec<u64> = case
                .json
                .pointer(key)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .collect();
            let mut matches = true;
            for i in 0..ids.shape[0] {
                let own = ids.rows(i..i + 1).to_i64();
                let same =
                    |expected: Option<HostTensor>| expected.is_some_and(|e| e.to_i64() == own);
                matches &=
                    same(row(name, i)?) || (differ.contains(&(i as u64)) && same(row(other, i)?));
            }
            line.error = if matches { 0.0 } else { f64::INFINITY };
        }
    }
    let bytes = case.dir.join("image_u8.safetensors");
    if case.kind == "pipeline" && bytes.is_file() {
        let file = TensorFile::open(&bytes)?;
        for name in file.names() {
            let expected = file.read(name)?.to_i64().context("image_u8 holds bytes")?;
            let image = actual.get("image").context("no image computed")?;
            let [_, channels, height, width] = image.shape[..] else {
                bail!("image is not [1, 3, h, w]")
            };
            let values = image.to_f32();
            let off = expected.iter().enumerate().map(|(i, &byte)| {
                let (pixel, channel) = (i / channels, i % channels);
                let value = values[channel * height * width + pixel];
                (f64::from(255.0 * value).round() - byte as f64).abs()
            });
            lines.push(Line {
                name: format!("image_u8.{name} (levels off)"),
                error: off.fold(0.0, f64::max),
                bound: 1.0,
            });
        }
    }
    Ok(())
}

/// The case's inputs for the transformer.
pub(super) fn flux_input(case: &Case, device: &Device) -> anyhow::Result<FluxInput> {
    let positions = |name: &str| -> anyhow::Result<Vec<Position>> {
        let host = case.input(name)?;
        Ok(host
            .to_f32()
            .chunks_exact(3)
            .map(|p| [p[0], p[1], p[2]])
            .collect())
    };
    let sigma = case.input("timestep")?.to_f32();
    let guidance = if case.has_input("guidance") {
        case.input("guidance")?.to_f32()
    } else {
        vec![1.0; sigma.len()]
    };
    let mut all = positions("txt_ids")?;
    all.extend(positions("img_ids")?);
    Ok(FluxInput {
        img: case.tensor("hidden_states", device)?,
        txt: case.tensor("encoder_hidden_states", device)?,
        pooled: case.tensor("pooled_projections", device)?,
        sigma,
        guidance,
        positions: all,
    })
}

fn forward(case: &Case, model: &FluxTransformer, device: &Device) -> anyhow::Result<HostTensor> {
    Ok(host_tensor(model.forward(flux_input(case, device)?)?))
}

fn autoencoder(case: &Case, device: &Device) -> anyhow::Result<Tensors> {
    let vae = if case.kind == "vae" {
        load_autoencoder(&case.path("/model/path")?, None, device)?
    } else {
        let config: AutoencoderConfig = serde_json::from_value(case.value("/config")?.clone())
            .context("`config` of case.json")?;
        load_autoencoder(&case.path("/checkpoint/file")?, Some(&config), device)?
    };
    let mut out = Tensors::new();
    let mut put = |name: &str, tensor: Tensor<4>| {
        out.insert(name.into(), host_tensor(tensor));
    };
    if case.has_input("image") {
        let image: Tensor<4> = case.tensor("image", device)?;
        put("moments", vae.moments(image.clone()));
        let latents = vae.encode(image);
        put("mean", latents.mean.clone());
        put("logvar", latents.logvar.clone());
        put("std", latents.std());
        let model_input = vae.to_model_space(latents.mean.clone());
        put("model_input_from_mean", model_input.clone());
        put("reconstruction", vae.decode(latents.mean));
    }
    if case.has_input("latent") {
        let latent: Tensor<4> = case.tensor("latent", device)?;
        put("decoded", vae.decode(latent.clone()));
        put(
            "decoded_from_model_space",
            vae.decode(vae.from_model_space(latent)),
        );
    }
    Ok(out)
}

fn id_rows(ids: &HostTensor) -> anyhow::Result<Vec<Vec<i64>>> {
    let &[_, tokens] = ids.shape.as_slice() else {
        bail!("input_ids are not [batch, tokens]")
    };
    Ok(ids
        .to_i64()
        .context("input_ids are not integers")?
        .chunks(tokens)
        .map(<[i64]>::to_vec)
        .collect())
}

fn tokenizers(case: &Case) -> anyhow::Result<Tensors> {
    let prompts: Vec<&str> = case
        .value("/prompts")?
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut out = Tensors::new();
    let mut put = |name: &str, rows: Vec<Vec<i64>>| {
        let shape = [rows.len(), rows.first().map_or(0, Vec::len)];
        out.insert(name.into(), HostTensor::from_i64(shape, &rows.concat()));
    };
    let clip = ClipTokenizer::load(&case.path("/tokenizers/clip")?)?;
    let length = case.usize("/clip/max_length")?;
    let ids: Vec<Vec<i64>> = prompts
        .iter()
        .map(|p| clip.encode(p, length))
        .collect::<Result<_, _>>()?;
    if let Ok(path) = case.path("/tokenizers/clip_tokenizer_json") {
        let fast = ClipTokenizer::load(&path)?;
        for (prompt, ids) in prompts.iter().zip(&ids) {
            if fast.encode(prompt, length)? != *ids {
                bail!("tokenizer.json and vocab.json give different ids for `{prompt}`");
            }
        }
    }
    put("clip_ids", ids.clone());
    put("clip_ids_fast", ids);
    let t5 = T5Tokenizer::load(&case.path("/tokenizers/t5")?)?;
    for name in case.expected.names() {
        if let Some(length) = name.strip_prefix("t5_ids_").and_then(|n| n.parse().ok()) {
            put(
                name,
                prompts
                    .iter()
                    .map(|p| t5.encode(p, length))
                    .collect::<Result<_, _>>()?,
            );
        }
    }
    Ok(out)
}

fn vector(values: &[f32]) -> HostTensor {
    HostTensor::from_f32([values.len()], values)
}

fn scheduler(case: &Case, device: &Device) -> anyhow::Result<Tensors> {
    let config: SchedulerConfig =
        read_json(&case.path("/scheduler/path")?.join("scheduler_config.json"))?;
    let mut out = Tensors::new();
    let runs = case
        .value("/runs")?
        .as_array()
        .context("`runs` is not a list")?;
    for (i, run) in runs.iter().enumerate() {
        let count = |key: &str| {
            run.get(key)
                .and_then(Value::as_u64)
                .map(|v| v as usize)
                .with_context(|| format!("run {i} has no `{key}`"))
        };
        let sigmas = config.sigmas(count("num_inference_steps")?, count("image_seq_len")?);
        let n = sigmas.len();
        let timesteps: Vec<f32> = sigmas[..n - 1]
            .iter()
            .map(|s| s * config.num_train_timesteps as f32)
            .collect();
        let (sample, velocity) = (format!("run{i}.sample"), format!("run{i}.model_output"));
        for (name, k) in [("step0", 0), ("step_last", n - 2)] {
            let stepped = euler_step::<3>(
                case.tensor(&sample, device)?,
                case.tensor(&velocity, device)?,
                sigmas[k],
                sigmas[k + 1],
            );
            out.insert(format!("run{i}.{name}"), host_tensor(stepped));
        }
        out.insert(format!("run{i}.sigmas"), vector(&sigmas));
        out.insert(format!("run{i}.timesteps"), vector(&timesteps));
    }
    let table = config.training_sigmas();
    out.insert(
        "train.timesteps".into(),
        vector(
            &table
                .iter()
                .map(|s| s * config.num_train_timesteps as f32)
                .collect::<Vec<_>>(),
        ),
    );
    out.insert("train.sigmas".into(), vector(&table));
    Ok(out)
}

fn timestep_sampling(case: &Case) -> anyhow::Result<Tensors> {
    let defaults = TrainSection::default();
    let mut out = Tensors::new();
    let config: SchedulerConfig = match case.path("/scheduler/path") {
        Ok(folder) => read_json(&folder.join("scheduler_config.json"))?,
        Err(_) => SchedulerConfig::default(),
    };
    let table = config.training_sigmas();
    let inputs = case
        .inputs
        .as_ref()
        .context("the case has no inputs.safetensors")?;
    for name in inputs.names() {
        let Some(scheme) = name.strip_suffix(".raw") else {
            continue;
        };
        let setting = |key: &str, default: f64| {
            let own = ["/schemes", "/parameters", "/params", ""];
            own.iter()
                .find_map(|at| find_number(case.json.pointer(&format!("{at}/{scheme}"))?, key))
                .or_else(|| find_number(&case.json, key))
                .unwrap_or(default)
        };
        let kind = match scheme {
            s if s.starts_with("logit_normal") => TimestepSampling::LogitNormal,
            s if s.starts_with("mode") => TimestepSampling::Mode,
            s if s.starts_with("none") => TimestepSampling::None,
            other => bail!("unknown scheme `{other}`"),
        };
        let raw = case.input(name)?;
        let shape = raw.shape.clone();
        let raw = raw.to_f32();
        let (mean, std) = (
            setting("logit_mean", defaults.logit_mean),
            setting("logit_std", defaults.logit_std),
        );
        let (mean, std) = if holds_moved_draws(&raw, mean, std) {
            (0.0, 1.0)
        } else {
            (mean, std)
        };
        let u: Vec<f32> = raw
            .iter()
            .map(|&raw| match kind {
                TimestepSampling::LogitNormal => {
                    sigmoid(f64::from(mean as f32 + std as f32 * raw)) as f32
                }
                TimestepSampling::Mode => {
                    mode_density(f64::from(raw), setting("mode_scale", defaults.mode_scale)) as f32
                }
                _ => raw,
            })
            .collect();
        let indices: Vec<usize> = u
            .iter()
            .map(|&u| {
                table_index(
                    f64::from(u * table.len() as f32) / table.len() as f64,
                    table.len(),
                )
            })
            .collect();
        let sigmas: Vec<f32> = indices.iter().map(|&i| table[i]).collect();
        let mut put = |suffix: &str, values: Vec<f32>| {
            out.insert(
                format!("{scheme}.{suffix}"),
                HostTensor::from_f32(shape.clone(), &values),
            );
        };
        put(
            "timesteps",
            sigmas
                .iter()
                .map(|s| s * config.num_train_timesteps as f32)
                .collect(),
        );
        // Weightings are any other name of the scheme, such as `mode.weighting.cosmap`.
        for suffix in case
            .expected
            .names()
            .filter_map(|name| name.strip_prefix(scheme)?.strip_prefix('.'))
        {
            if suffix.contains("weight") {
                let weighting = match suffix {
                    s if s.contains("sigma_sqrt") => LossWeighting::SigmaSqrt,
                    s if s.contains("cosmap") => LossWeighting::Cosmap,
                    _ => LossWeighting::None,
                };
                put(
                    suffix,
                    sigmas.iter().map(|&s| loss_weight(weighting, s)).collect(),
                );
            }
        }
        put("sigmas", sigmas);
        put("u", u);
        let indices: Vec<i64> = indices.into_iter().map(|i| i as i64).collect();
        out.insert(
            format!("{scheme}.indices"),
            HostTensor::from_i64(shape, &indices),
        );
    }
    Ok(out)
}

/// The first number called `key` at any depth.
fn find_number(json: &Value, key: &str) -> Option<f64> {
    match json {
        Value::Object(fields) => fields
            .get(key)
            .and_then(Value::as_f64)
            .or_else(|| fields.values().find_map(|value| find_number(value, key))),
        Value::Array(values) => values.iter().find_map(|value| find_number(value, key)),
        _ => None,
    }
}

/// Whether draws are `N(mean, std)` already, and not standard normals still to be moved: the likelier of the two.
fn holds_moved_draws(raw: &[f32], mean: f64, std: f64) -> bool {
    let cost = |mean: f64, std: f64| {
        raw.iter()
            .map(|&x| ((f64::from(x) - mean) / std).powi(2) / 2.0 + std.ln())
            .sum::<f64>()
    };
    cost(mean, std) < cost(0.0, 1.0)
}

fn pipeline(case: &Case, device: &Device) -> anyhow::Result<Tensors> {
    let family = Flux1::open(PipelineFolder::open(&case.path("/model/path")?)?)?;
    let [_, height, width] =
        family.latent_shape(case.usize("/call/height")?, case.usize("/call/width")?);
    let grid = [height, width];
    let mut text = family.text_encoders(device)?.encode(
        &[case.str("/call/prompt")?],
        case.usize("/call/max_sequence_length")?,
        device,
    )?;
    let text = Flux1::text(text.remove(0), device);
    let steps = case.usize("/call/num_inference_steps")?;
    let latents: Tensor<3> = case.tensor("latents_packed", device)?;
    let sigmas = family.sigmas(steps, latents.dims()[1]);
    let network = family.network(device)?;
    let denoise = Denoise {
        family: &family,
        network: &network,
        text: &text,
        negative: None,
        grid,
        steps,
        guidance_scale: case.f64("/call/guidance_scale").unwrap_or(1.0) as f32,
    };
    let mut out = Tensors::new();
    let latents = denoise.run(latents, |step| {
        let index = step.index;
        let velocity = host_tensor(step.velocity.clone());
        out.insert(format!("step{index}.velocity"), velocity);
        let latents = host_tensor(step.tokens.clone());
        out.insert(format!("step{index}.latents"), latents);
    })?;
    let positions = |p: Vec<Position>| HostTensor::from_f32([p.len(), 3], &p.concat());
    out.insert(
        "text_ids".into(),
        positions(text_positions(text.sequence.dims()[1])),
    );
    out.insert(
        "latent_image_ids".into(),
        positions(image_positions(height, width)),
    );
    out.insert("prompt_embeds".into(), host_tensor(text.sequence));
    out.insert("pooled_prompt_embeds".into(), host_tensor(text.pooled));
    out.insert(
        "timesteps".into(),
        vector(
            &sigmas[..steps]
                .iter()
                .map(|s| s * 1000.0)
                .collect::<Vec<_>>(),
        ),
    );
    out.insert("sigmas".into(), vector(&sigmas));
    out.insert("final_latents_packed".into(), host_tensor(latents.clone()));
    let unpacked = Flux1::unpack(latents, grid);
    out.insert(
        "final_latents_unpacked".into(),
        host_tensor(unpacked.clone()),
    );
    let decoded = Flux1::decode(&family.autoencoder(device)?, unpacked);
    out.insert("decoded".into(), host_tensor(decoded.clone()));
    out.insert(
        "image".into(),
        host_tensor((decoded / 2.0 + 0.5).clamp(0.0, 1.0)),
    );
    Ok(out)
}

/// The adapter file of a case; what its header does not say comes from `settings`, its entry in case.json.
pub(super) fn adapter(file: &Path, settings: &Value) -> anyhow::Result<AdapterFile> {
    let adapter = AdapterFile::load(file, TRANSFORMER_PREFIX)
        .with_context(|| format!("load {}", file.display()))?;
    if TensorFile::open(file)?
        .metadata()
        .contains_key(METADATA_KEY)
    {
        return Ok(adapter);
    }
    let mut config = LoraConfig {
        target_modules: adapter.config().target_modules,
        ..LoraConfig::default()
    };
    let number = |key: &str| settings.get(key).and_then(Value::as_f64);
    config.r = number("rank")
        .or(number("r"))
        .map_or(config.r, |r| r as usize);
    config.lora_alpha = number("alpha")
        .or(number("lora_alpha"))
        .unwrap_or(config.r as f64);
    config.use_rslora = settings
        .get("use_rslora")
        .and_then(Value::as_bool)
        .unwrap_or(false);
    for (key, patterns) in [("rank_pattern", true), ("alpha_pattern", false)] {
        let Some(value) = settings.get(key).filter(|value| value.is_object()) else {
            continue;
        };
        if patterns {
            config.rank_pattern =
                serde_json::from_value(value.clone()).context("`rank_pattern`")?;
        } else {
            config.alpha_pattern =
                serde_json::from_value(value.clone()).context("`alpha_pattern`")?;
        }
    }
    Ok(adapter.with_config(&config)?)
}

fn lora_forward(case: &Case, device: &Device) -> anyhow::Result<Tensors> {
    let mut model = load_transformer(&case.path("/model/path")?, None, device)?;
    let mut out = Tensors::from([("sample_base".into(), forward(case, &model, device)?)]);
    for (name, settings) in case
        .value("/lora")?
        .as_object()
        .context("`lora` is not a table")?
    {
        let file = case.dir.join(
            settings
                .get("file")
                .and_then(Value::as_str)
                .context("an adapter of the case has no `file`")?,
        );
        let plan = Plan::new(
            &model,
            name,
            None,
            AdapterSource::File(adapter(&file, settings)?),
            ForwardPath::Fast,
        )?;
        model = plan.apply(model);
    }
    let sets = case
        .value("/weight_sets")?
        .as_object()
        .context("`weight_sets` is not a table")?;
    let weights = |set: &Value, scale: f64| -> Vec<(String, f64)> {
        let entries = set.as_object().into_iter().flatten();
        entries
            .map(|(name, weight)| (name.clone(), scale * weight.as_f64().unwrap_or(f64::NAN)))
            .collect()
    };
    let with = |model: &FluxTransformer, set: Vec<(String, f64)>| {
        let set: Vec<(&str, f64)> = set
            .iter()
            .map(|(name, weight)| (name.as_str(), *weight))
            .collect();
        set_adapters(model.clone(), &set)
    };
    for (name, set) in sets {
        out.insert(
            name.clone(),
            forward(case, &with(&model, weights(set, 1.0))?, device)?,
        );
    }
    let first = sets.values().next().context("`weight_sets` is empty")?;
    for name in case
        .expected
        .names()
        .filter(|name| name.starts_with("sample_fused"))
    {
        let scale = match name.strip_prefix("sample_fused_") {
            Some(scale) => scale
                .parse()
                .with_context(|| format!("`{name}` ends in no number"))?,
            None => 1.0,
        };
        let fused = merge(with(&model, weights(first, scale))?)?;
        out.insert(name.into(), forward(case, &fused, device)?);
        if scale == 1.0 {
            let wanted = |key: &str| case.expected.info(&format!("fused.{key}")).is_some();
            out.extend(
                tensors_of(&fused, wanted)
                    .into_iter()
                    .map(|(key, tensor)| (format!("fused.{key}"), tensor)),
            );
        }
    }
    Ok(out)
}

fn lora_format(case: &Case, device: &Device) -> anyhow::Result<Tensors> {
    let folder = PipelineFolder::open(&case.path("/model/path")?)?;
    let lora = |strength: f64| -> anyhow::Result<[LoadedLora; 1]> {
        let set = adapters::load(&case.path("/lora/file")?, &Flux1::shape(&folder)?)?;
        Ok([LoadedLora {
            name: "default".into(),
            set,
            strength,
        }])
    };
    let mut out = Tensors::new();
    for name in case.expected.names() {
        let last = name.rsplit('.').next().unwrap_or(name);
        let strength = match name.contains("base") {
            true => None,
            false => Some(
                name.rsplit_once('_')
                    .and_then(|(_, s)| s.parse().ok())
                    .unwrap_or(1.0),
            ),
        };
        let loras = strength.map(lora).transpose()?;
        let loras = loras.as_ref().map_or(&[][..], |loras| loras);
        let computed = if name.contains("clip") || name.contains("text_encoder") {
            let clip = load_clip(&folder.root().join("text_encoder"), device)?;
            let clip = adapters::attach(clip, Component::ClipL, loras)?;
            let inputs = case
                .inputs
                .as_ref()
                .context("the case has no inputs.safetensors")?;
            let ids = inputs.names().find(|input| {
                input.contains("ids") && !input.starts_with("img_") && !input.starts_with("txt_")
            });
            let output = clip.forward(
                &id_rows(&case.input(ids.context("no token ids among the inputs")?)?)?,
                device,
            );
            if last.contains("pooled") {
                host_tensor(output.pooled)
            } else {
                host_tensor(output.last_hidden_state)
            }
        } else {
            let model = load_transformer(folder.transformer_path(), None, device)?;
            forward(
                case,
                &adapters::attach(model, Component::Transformer, loras)?,
                device,
            )?
        };
        out.insert(name.into(), computed);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::tensor_error;
    use super::*;

    #[test]
    fn integers_must_be_equal_and_floats_are_relative() {
        let a = HostTensor::from_i64([2], &[1, 2]);
        assert_eq!(
            tensor_error(&a, &HostTensor::from_i64([2], &[1, 3])),
            f64::INFINITY
        );
        let x = HostTensor::from_f32([2], &[3.0, 4.0]);
        assert!((tensor_error(&HostTensor::from_f32([2], &[3.0, 4.5]), &x) - 0.1).abs() < 1e-12);
        assert!(tensor_error(&HostTensor::from_f32([2], &[f32::NAN, 4.0]), &x).is_nan());
    }
}
