//! `flux-lora merge`: LoRAs added to a pipeline on disk, tensor by tensor, never holding a model.
//!
//! Files keep their names, sharding, dtype and header; weights are changed in f32 and rounded once. Several LoRAs are merged one
//! after the other, as PEFT does. A result that is not finite is refused (PEFT's `safe_merge`).

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use flux_model::lora::{Bias, Component, LoraSet};
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::safetensors::{TensorFile, TensorSet, write_streaming};

use crate::adapters::LoadedLora;

/// Writes the pipeline `model` with `loras` merged to the new folder `out`; returns the number of changed tensors.
///
/// # Errors
/// An output folder that exists, a LoRA that does not fit, a result that is not finite, a full disk.
pub fn merge(model: &Path, loras: Vec<LoadedLora>, out: &Path) -> anyhow::Result<usize> {
    if out.exists() {
        bail!(
            "{} exists: choose a new folder for the merged model",
            out.display()
        );
    }
    let loras: Vec<LoraSet> = loras
        .into_iter()
        .map(|lora| scaled(lora.set, lora.strength))
        .collect();
    if let Some(channels) = loras.iter().find_map(|set| set.in_channels) {
        bail!("a LoRA needs a model with {channels} input channels (Canny or Depth)");
    }
    let parent = out
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let staging = tempfile::Builder::new()
        .prefix(".merge-")
        .tempdir_in(parent)
        .with_context(|| format!("create a folder in {}", parent.display()))?;
    let mut changed = 0;
    for entry in sorted(model)? {
        let (source, target) = (model.join(&entry), staging.path().join(&entry));
        let component = Component::ALL
            .into_iter()
            .find(|component| entry == Path::new(&component.to_string()));
        match component {
            Some(component) => changed += merge_component(&source, &target, component, &loras)?,
            None => copy(&source, &target)?,
        }
    }
    let expected: usize = loras.iter().map(LoraSet::len).sum();
    if changed == 0 && expected > 0 {
        bail!(
            "none of the {expected} layers of the LoRA is in {}",
            model.display()
        );
    }
    fs::rename(staging.path(), out).with_context(|| format!("rename to {}", out.display()))?;
    let _ = staging.keep(); // it has its final name
    Ok(changed)
}

/// The LoRA at another strength: PEFT scales the update, not its DoRA magnitude.
fn scaled(mut set: LoraSet, strength: f64) -> LoraSet {
    for component in Component::ALL {
        for update in set.modules_mut(component).values_mut() {
            update.scale *= strength;
        }
    }
    set
}

fn merge_component(
    source: &Path,
    target: &Path,
    component: Component,
    loras: &[LoraSet],
) -> anyhow::Result<usize> {
    let mut weights = None;
    let mut changed = 0;
    fs::create_dir_all(target).with_context(|| format!("create {}", target.display()))?;
    for name in sorted(source)? {
        let (from, to) = (source.join(&name), target.join(&name));
        if name
            .extension()
            .is_none_or(|extension| extension != "safetensors")
        {
            copy(&from, &to)?;
            continue;
        }
        if weights.is_none() {
            weights = Some(component_weights(source)?);
        }
        let weights = weights.as_ref().context("opened above")?;
        changed += merge_file(&from, &to, component, loras, weights)?;
    }
    Ok(changed)
}

fn component_weights(folder: &Path) -> anyhow::Result<TensorSet> {
    let index = sorted(folder)?
        .into_iter()
        .find(|name| name.to_string_lossy().ends_with(".safetensors.index.json"));
    let file = match index {
        Some(index) => index,
        None => sorted(folder)?
            .into_iter()
            .find(|name| name.extension().is_some_and(|e| e == "safetensors"))
            .with_context(|| format!("{} holds no weights", folder.display()))?,
    };
    Ok(TensorSet::open(&folder.join(file))?)
}

/// Streams one file: a tensor is read, changed if a LoRA says so, rounded to its own dtype, written.
fn merge_file(
    from: &Path,
    to: &Path,
    component: Component,
    loras: &[LoraSet],
    weights: &TensorSet,
) -> anyhow::Result<usize> {
    let file = TensorFile::open(from)?;
    let layout: Vec<(String, Dtype, Vec<usize>)> = file
        .names()
        .filter_map(|name| {
            let info = file.info(name)?;
            Some((name.to_string(), info.dtype, info.shape.clone()))
        })
        .collect();
    let mut changed = 0;
    let out = fs::File::create(to).with_context(|| format!("create {}", to.display()))?;
    let mut out = BufWriter::new(out);
    let write = |name: &str| -> Result<HostTensor, MergeError> {
        let tensor = file.read(name).map_err(|error| MergeError(error.into()))?;
        let merged = merged(name, &tensor, component, loras, weights).map_err(MergeError)?;
        changed += usize::from(merged.is_some());
        Ok(merged.unwrap_or(tensor))
    };
    write_streaming(&mut out, &layout, file.metadata(), write)
        .map_err(|error| error.0)
        .with_context(|| format!("merge into {}", to.display()))?;
    out.flush()
        .with_context(|| format!("write {}", to.display()))?;
    Ok(changed)
}

/// The tensor with every LoRA merged; `None` if none changes it.
fn merged(
    name: &str,
    tensor: &HostTensor,
    component: Component,
    loras: &[LoraSet],
    weights: &TensorSet,
) -> anyhow::Result<Option<HostTensor>> {
    let Some((module, parameter)) = name.rsplit_once('.') else {
        return Ok(None);
    };
    let mut values: Option<Vec<f32>> = None;
    for set in loras {
        let Some(update) = set.modules(component).get(module) else {
            continue;
        };
        let current = values.clone().unwrap_or_else(|| tensor.to_f32());
        let mut base = |path: &str| match path == module {
            true => Some(current.clone()),
            false => weights
                .read(&format!("{path}.weight"))
                .ok()
                .map(|tensor| tensor.to_f32()),
        };
        let (change, replace) = match parameter {
            "weight" => (set.weight_delta(component, module, &mut base)?, false),
            "bias" => (
                update.bias_values()?.map(|tensor| tensor.to_f32()),
                matches!(update.bias, Some(Bias::Replaced(_))),
            ),
            _ => continue,
        };
        let Some(change) = change else { continue };
        if change.len() != current.len() {
            bail!(
                "the LoRA changes {} values of `{name}`, which has {}",
                change.len(),
                current.len()
            );
        }
        values = Some(if replace {
            change
        } else {
            current.iter().zip(&change).map(|(w, d)| w + d).collect()
        });
    }
    let Some(values) = values else {
        return Ok(None);
    };
    let result = HostTensor::from_f32(tensor.shape.clone(), &values);
    if let Some(index) = result.first_non_finite() {
        bail!("merging `{name}` gives a value that is not finite at element {index}");
    }
    Ok(Some(match tensor.dtype {
        Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::Bf16 => result.cast(tensor.dtype),
        other => bail!("`{name}` is {other}: merge into a model of 16 or 32 bits"),
    }))
}

/// An error that may come from the writer or from the merge.
struct MergeError(anyhow::Error);

impl From<std::io::Error> for MergeError {
    fn from(error: std::io::Error) -> Self {
        Self(error.into())
    }
}

fn sorted(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names: Vec<PathBuf> = entries
        .map(|entry| Ok(PathBuf::from(entry?.file_name())))
        .collect::<std::io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if !from.is_dir() {
        fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
        return Ok(());
    }
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for name in sorted(from)? {
        copy(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}
