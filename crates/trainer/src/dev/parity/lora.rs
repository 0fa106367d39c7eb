//! Cases of LoRA: adapters of the project's own form, their weights and merging; files of every format.

use std::path::Path;

use anyhow::{Context, bail};
use burn::tensor::Device;
use flux_model::family::Family;
use flux_model::lora::Component;
use flux_model::pipeline::{PipelineFolder, load_clip};
use flux_model::weights::{BaseDtype, tensors_of};
use lora_core::files::safetensors::TensorFile;
use lora_core::peft::METADATA_KEY;
use lora_core::{AdapterFile, LoraConfig, attach, merge, set_adapters};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::case::{Case, Tensors};
use super::network;
use super::report::Report;
use super::text::{clip_tensors, id_rows};
use crate::adapters::{self, LoadedLora};

/// The adapter file of a case; what its header does not say comes from case.json at `pointer`. What may be absent there is
/// PEFT's default.
pub(super) fn adapter(case: &Case, file: &Path, pointer: &str) -> anyhow::Result<AdapterFile> {
    let adapter = AdapterFile::load(file, "transformer.")
        .with_context(|| format!("load {}", file.display()))?;
    if TensorFile::open(file)?
        .metadata()
        .contains_key(METADATA_KEY)
    {
        return Ok(adapter);
    }
    let key = |key: &str| format!("{pointer}/{key}");
    let config = LoraConfig {
        target_modules: adapter.config().target_modules,
        r: case.usize(&key("rank"))?,
        lora_alpha: case.f64(&key("alpha"))?,
        use_rslora: or_default(case, &key("use_rslora"))?,
        rank_pattern: or_default(case, &key("rank_pattern"))?,
        alpha_pattern: or_default(case, &key("alpha_pattern"))?,
        ..LoraConfig::default()
    };
    Ok(adapter.with_config(&config)?)
}

fn or_default<T: DeserializeOwned + Default>(case: &Case, pointer: &str) -> anyhow::Result<T> {
    match case.optional(pointer) {
        None => Ok(T::default()),
        Some(value) => serde_json::from_value(value.clone())
            .with_context(|| format!("`{pointer}` of case.json")),
    }
}

/// `lora_forward`.
pub(super) fn forward<F: Family>(case: &Case, device: &Device) -> anyhow::Result<Report> {
    // The case merges in f32, whatever its model is stored as.
    let model = case.path("/model/path")?;
    let mut model = F::network_at(&model, None, BaseDtype::F32, device)?;
    let forward = |model: &F::Network| network::forward(case, model, device);
    let mut out = Tensors::from([("sample_base".into(), forward(&model)?)]);
    for name in table(case, "/lora")?.keys() {
        let pointer = format!("/lora/{}", escaped(name));
        let file = case.path(&format!("{pointer}/file"))?;
        let file = adapter(case, &file, &pointer)?;
        model = attach(model, file.stored().named(name).fast())?;
    }
    // A weight set, every weight times `scale`.
    let with = |set: &str, scale: f64| -> anyhow::Result<F::Network> {
        let pointer = format!("/weight_sets/{}", escaped(set));
        let weight = |name: &String| -> anyhow::Result<(String, f64)> {
            let weight = case.f64(&format!("{pointer}/{}", escaped(name)))?;
            Ok((name.clone(), scale * weight))
        };
        let weights = table(case, &pointer)?.keys().map(weight);
        let weights: Vec<_> = weights.collect::<anyhow::Result<_>>()?;
        let weights: Vec<_> = weights.iter().map(|(n, w)| (n.as_str(), *w)).collect();
        Ok(set_adapters(model.clone(), &weights)?)
    };
    for set in table(case, "/weight_sets")?.keys() {
        out.insert(set.clone(), forward(&with(set, 1.0)?)?);
    }
    for name in case.expected.names() {
        let Some(scale) = scaled(name, "sample_fused")? else {
            continue;
        };
        let fused = merge(with("sample", scale)?)?;
        out.insert(name.into(), forward(&fused)?);
        if scale == 1.0 {
            let wanted = |key: &str| case.expected.info(&format!("fused.{key}")).is_some();
            let tensors = tensors_of(&fused, wanted).into_iter();
            out.extend(tensors.map(|(key, tensor)| (format!("fused.{key}"), tensor)));
        }
    }
    Report::by_tensor(case, out)
}

/// `lora_format`.
pub(super) fn format<F: Family>(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let folder = PipelineFolder::open(&case.path("/model/path")?)?;
    let shape = F::shape(&folder)?;
    let lora = |strength: f64| -> anyhow::Result<[LoadedLora; 1]> {
        Ok([LoadedLora {
            name: "default".into(),
            set: adapters::load(&case.path("/lora/file")?, &shape)?,
            strength,
        }])
    };
    let sample = |loras: &[LoadedLora]| {
        let model = F::network_at(folder.transformer_path(), None, BaseDtype::AsStored, device)?;
        let model = adapters::attach(model, Component::Transformer, loras)?;
        network::forward(case, &model, device)
    };
    let mut out = Tensors::new();
    for name in case.expected.names() {
        let computed = match name {
            "base" => sample(&[])?,
            "clip.last_hidden_state" | "clip_last_hidden_state" | "clip.pooled" | "clip_pooled" => {
                let clip = load_clip(&folder.root().join("text_encoder"), device)?;
                let clip = adapters::attach(clip, Component::ClipL, &lora(1.0)?)?;
                let [last, pooled] = clip_tensors(clip.forward(&id_rows(case)?, device));
                if name.ends_with("pooled") {
                    pooled
                } else {
                    last
                }
            }
            name => match scaled(name, "sample")? {
                Some(strength) => sample(&lora(strength)?)?,
                None => bail!("expects `{name}`, which is no output of a lora_format case"),
            },
        };
        out.insert(name.into(), computed);
    }
    Report::by_tensor(case, out)
}

/// The number after `<stem>_`, or 1 for the stem alone; `None` for another name.
fn scaled(name: &str, stem: &str) -> anyhow::Result<Option<f64>> {
    let Some(rest) = name.strip_prefix(stem) else {
        return Ok(None);
    };
    match rest.strip_prefix('_') {
        Some(number) => Ok(Some(
            number
                .parse()
                .with_context(|| format!("`{name}` ends in no number"))?,
        )),
        None => Ok(rest.is_empty().then_some(1.0)),
    }
}

fn table<'a>(case: &'a Case, pointer: &str) -> anyhow::Result<&'a serde_json::Map<String, Value>> {
    case.value(pointer)?
        .as_object()
        .with_context(|| format!("`{pointer}` of case.json is not a table"))
}

/// A key inside a JSON pointer.
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
