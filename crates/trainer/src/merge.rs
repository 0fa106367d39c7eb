//! `flux-lora merge`: LoRAs added to a pipeline on disk, tensor by tensor, never holding a model.
//!
//! Files keep their names, sharding, dtype and header; weights are changed in f32 and rounded once. Several LoRAs are merged one
//! after the other, as PEFT does. A result that is not finite is refused (PEFT's `safe_merge`).

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use flux_model::lora::{Bias, Component, LoraSet};
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::quantised::Stored;
use lora_core::files::safetensors::{TensorFile, TensorSet, write_streaming};

use crate::adapters::LoadedLora;
use crate::convert::make_parent;

/// Writes the pipeline `model` with `loras` merged to the new folder `out`; returns the number of changed tensors.
///
/// # Errors
/// An output folder that exists or is inside the model, a LoRA that does not fit or of which something is left over, a result
/// that is not finite, a full disk.
pub fn merge(model: &Path, loras: Vec<LoadedLora>, out: &Path) -> anyhow::Result<usize> {
    if out.exists() {
        bail!(
            "{} exists: choose a new folder for the merged model",
            out.display()
        );
    }
    let places = [fs::canonicalize(model), std::path::absolute(out)];
    if let [Ok(model), Ok(out)] = &places
        && out.starts_with(model)
    {
        bail!(
            "{} is inside the model it is made of: choose a folder elsewhere",
            out.display()
        );
    }
    make_parent(out)?;
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
    let mut changed = Changed::default();
    for entry in sorted(model)? {
        let (source, target) = (model.join(&entry), staging.path().join(&entry));
        let component = Component::ALL
            .into_iter()
            .find(|component| entry == Path::new(&component.to_string()));
        match component {
            Some(component) => {
                merge_component(&source, &target, component, &loras, &mut changed)?;
            }
            None => copy(&source, &target)?,
        }
    }
    let modules = loras.iter().flat_map(LoraSet::iter);
    let mut left = modules
        .filter(|(component, path, _)| !changed.modules.contains(&(*component, path.to_string())));
    if let Some((component, path, _)) = left.next() {
        bail!(
            "`{path}` and {} other modules of the LoRA are not in {}",
            left.count(),
            model.join(component.to_string()).display()
        );
    }
    fs::rename(staging.path(), out).with_context(|| format!("rename to {}", out.display()))?;
    let _ = staging.keep(); // it has its final name
    Ok(changed.tensors)
}

/// What was merged so far.
#[derive(Default)]
struct Changed {
    tensors: usize,
    modules: BTreeSet<(Component, String)>,
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
    changed: &mut Changed,
) -> anyhow::Result<()> {
    let mut weights = None;
    fs::create_dir_all(target).with_context(|| copy_of(source))?;
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
        merge_file(&from, &to, component, loras, weights, changed)?;
    }
    Ok(())
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
    changed: &mut Changed,
) -> anyhow::Result<()> {
    let file = TensorFile::open(from)?;
    let quantised: BTreeSet<String> = Stored::all(weights)?.into_keys().collect();
    let layout: Vec<(String, Dtype, Vec<usize>)> = file
        .names()
        .filter_map(|name| {
            let info = file.info(name)?;
            Some((name.to_string(), info.dtype, info.shape.clone()))
        })
        .collect();
    let out = fs::File::create(to).with_context(|| copy_of(from))?;
    let mut out = BufWriter::new(out);
    let write = |name: &str| -> Result<HostTensor, MergeError> {
        let tensor = file.read(name).map_err(|error| MergeError(error.into()))?;
        let merged =
            merged(name, &tensor, component, loras, weights, &quantised).map_err(MergeError)?;
        if merged.is_some() {
            changed.tensors += 1;
            let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
            changed.modules.insert((component, module.into()));
        }
        Ok(merged.unwrap_or(tensor))
    };
    write_streaming(&mut out, &layout, file.metadata(), write)
        .map_err(|error| error.0)
        .with_context(|| copy_of(from))?;
    out.flush().with_context(|| copy_of(from))
}

/// What is being done; the copy has its place under a name that nobody knows until it is complete.
fn copy_of(from: &Path) -> String {
    format!("write the merged copy of {}", from.display())
}

/// The tensor with every LoRA merged; `None` if none changes it.
fn merged(
    name: &str,
    tensor: &HostTensor,
    component: Component,
    loras: &[LoraSet],
    weights: &TensorSet,
    quantised: &BTreeSet<String>,
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
        if quantised.contains(name) {
            bail!(
                "`{name}` is stored in few bits, and a change cannot be merged into it without most of it being rounded away: merge into the checkpoint of 16 or 32 bits that it was made from"
            );
        }
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
    fs::create_dir_all(to).with_context(|| copy_of(from))?;
    for name in sorted(from)? {
        copy(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}
