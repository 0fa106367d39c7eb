//! A [`LoraSet`] as a file.
//!
//! Who reads what of it is in [`readers`](super::readers).
//!
//! A diffusers file has the scale folded into `lora_B` and says so in its header (alpha equal to the rank, module by
//! module), because ComfyUI ignores the header and diffusers before August 2026 guesses alpha without one.
//!
//! So every file has its scale in its tensors: folded, or as alpha. The exception is PEFT's folder, whose configuration is
//! part of the format; its factors keep their bits.
//!
//! Tensors are loaded, converted and written one at a time.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::Path;

use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::replace::replace_file;
use lora_core::files::safetensors::write_streaming;
use lora_core::kinds::parts::Kind;
use lora_core::peft::{METADATA_KEY, folder};
use serde_json::{Map, Value, json};

use super::emit::{Emitted, Output, Style, fused, without_whole};
use super::emit_peft::{Described, PeftStyle, peft};
use super::error::{KeyProblem, LoraFormatError};
use super::format::{LoraFormat, WriteOptions, WriteReport};
use super::readers::{Kept, readings};
use super::{Component, LoraSet};

/// Writes a set: a file at `path`, or a folder for [`LoraFormat::Peft`].
///
/// A file is complete or absent: it is written beside its place and renamed. `path` may be the file the set was read from.
///
/// # Errors
/// What the format cannot hold, unless [`WriteOptions::lossy`]; a tensor that cannot be read; values beyond the range of
/// the dtype; what the system says.
pub fn write(
    set: &LoraSet,
    format: LoraFormat,
    path: &Path,
    options: &WriteOptions,
) -> Result<WriteReport, LoraFormatError> {
    if let Some(dtype) = options
        .dtype
        .filter(|dtype| !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16))
    {
        return Err(LoraFormatError::OutputDtype { dtype });
    }
    let mut emitted = Emitted::default();
    let flux2 = set.shape.flux2.is_some();
    let mut folders = Vec::new(); // of a PEFT adapter: where, first output, configuration
    let mut scale_beside = false;
    let mut metadata = carried(&set.metadata);
    match format {
        LoraFormat::Diffusers => {
            let mut header = Map::new();
            // diffusers refuses a file for FLUX.2 with a key that is not of a LoRA.
            let held = flux2.then(|| without_whole(set, false, &mut emitted));
            let set = held.as_ref().unwrap_or(set);
            for component in Component::ALL {
                let prefix = format!("{component}.");
                let style = PeftStyle {
                    prefix: prefix.clone(),
                    fold: true,
                    norms: component == Component::Transformer,
                };
                let described = peft(set, component, &style, &mut emitted);
                if !described.layers.is_empty() {
                    header.extend(described.config().to_peft(&prefix));
                }
            }
            note_diffusers(set, options, &mut emitted);
            metadata.insert(METADATA_KEY.into(), Value::from(header).to_string());
        }
        LoraFormat::Peft => {
            let style = PeftStyle {
                prefix: folder::PREFIX.into(),
                fold: false,
                norms: false,
            };
            for component in Component::ALL {
                let first = emitted.outputs.len();
                let described = peft(set, component, &style, &mut emitted);
                let folder = match component {
                    Component::Transformer => path.to_path_buf(),
                    Component::ClipL | Component::T5 => path.join(component.to_string()),
                };
                let mut specs = described.layers.iter().map(|(_, spec)| spec);
                if specs.any(|spec| spec.alpha != spec.rank as f64) {
                    emitted.notes.insert("alpha is in `adapter_config.json`: what reads the weights without it plays them at another strength");
                    scale_beside = true;
                }
                if emitted.outputs.len() > first {
                    folders.push((folder, first, adapter_config(component, flux2, &described)));
                }
            }
        }
        LoraFormat::Kohya => {
            fused(set, Style::Kohya, &mut emitted)?;
            metadata.extend(kohya_metadata(set));
        }
        LoraFormat::ComfyUi => {
            let style = match set.shape.flux2 {
                Some(_) => Style::Portable,
                None => Style::ComfyUi,
            };
            fused(set, style, &mut emitted)?;
            let described = Described::unscaled(std::mem::take(&mut emitted.ranks));
            if !described.layers.is_empty() {
                let header = described
                    .config()
                    .to_peft(&format!("{}.", Component::Transformer));
                metadata.insert(METADATA_KEY.into(), Value::from(header).to_string());
            }
        }
    }
    let Emitted {
        mut outputs,
        losses,
        notes,
        modules,
        ..
    } = emitted;
    if !losses.is_empty() && (!options.lossy || outputs.is_empty()) {
        return Err(LoraFormatError::Unrepresentable { format, losses });
    }
    if outputs.is_empty() {
        return Err(LoraFormatError::Nothing { path: path.into() });
    }
    let keys: Vec<_> = outputs.iter().map(|output| output.key.clone()).collect();
    let readings = readings(Kept {
        keys: &keys,
        flux2,
        folder: format == LoraFormat::Peft,
        scale_beside,
    });
    let mut files = Vec::new();
    if format == LoraFormat::Peft {
        for (folder, first, config) in folders.into_iter().rev() {
            fs::create_dir_all(&folder).map_err(LoraFormatError::io(&folder))?;
            let weights = folder.join(folder::TENSORS);
            write_file(&weights, outputs.split_off(first), &metadata, options)?;
            let config_path = folder.join(folder::CONFIG);
            replace(&config_path, |file| {
                io::Write::write_all(file, config.as_bytes()).map_err(Failure::Io)
            })?;
            files.extend([config_path, weights]);
        }
        files.reverse();
    } else {
        write_file(path, outputs, &metadata, options)?;
        files.push(path.into());
    }
    Ok(WriteReport {
        files,
        modules,
        losses,
        notes: notes.into_iter().map(str::to_string).collect(),
        readings,
    })
}

fn note_diffusers(set: &LoraSet, options: &WriteOptions, emitted: &mut Emitted) {
    let mut scales = set.iter().map(|(_, _, update)| update.scale);
    let power_of_two = |scale: f64| scale == 0.0 || scale.abs().log2().fract() == 0.0;
    let rounds = |output: &Output| output_dtype(output, options) != Dtype::F32;
    if !scales.all(power_of_two) && emitted.outputs.iter().any(rounds) {
        emitted.notes.insert(
            "folding the scale rounds in half precision; F32 keeps it, and so do the other formats",
        );
    }
}

/// Header entries that stay true of a converted file: what it was trained on, its title, its triggers.
fn carried(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    const STALE: [&str; 6] = [
        METADATA_KEY,
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "modelspec.hash_sha256",
    ];
    let stays = |key: &String| !STALE.contains(&key.as_str()) && !key.starts_with("sshs_");
    let mut carried: BTreeMap<_, _> = metadata
        .iter()
        .filter(|(key, _)| stays(key))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    carried.insert("format".into(), "pt".into());
    carried
}

fn kohya_metadata(set: &LoraSet) -> BTreeMap<String, String> {
    let ranks: Vec<_> = set
        .iter()
        .filter_map(|(_, _, update)| Some((update.rank()?, update.scale)))
        .collect();
    let mut kinds = set.iter().filter_map(|(_, _, update)| update.kind());
    let lycoris = kinds.any(|kind| kind != Kind::Lora);
    let module = match (lycoris, &set.shape.flux2) {
        (true, _) => "lycoris.kohya",
        (false, Some(_)) => "networks.lora_flux_2",
        (false, None) => "networks.lora_flux",
    };
    let mut entries = vec![
        ("ss_network_module", module.to_string()),
        ("ss_network_args", "{}".into()),
        ("ss_v2", "False".into()),
        ("modelspec.sai_model_spec", "1.0.1".into()),
    ];
    let base = set.shape.header().into_iter();
    entries.extend(base.map(|(key, value)| (key, value.to_string())));
    if let Some((rank, scale)) = most_common(
        ranks
            .into_iter()
            .map(|(rank, scale)| (rank, scale.to_bits())),
    ) {
        entries.push(("ss_network_dim", rank.to_string()));
        entries.push((
            "ss_network_alpha",
            format!("{:?}", f64::from_bits(scale) * rank as f64),
        ));
    }
    entries
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect()
}

fn most_common<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_insert(0usize) += 1);
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(value, _)| value)
}

fn adapter_config(component: Component, flux2: bool, described: &Described) -> String {
    let (class, library) = match component {
        Component::Transformer if flux2 => (
            "Flux2Transformer2DModel",
            "diffusers.models.transformers.transformer_flux2",
        ),
        Component::Transformer => (
            "FluxTransformer2DModel",
            "diffusers.models.transformers.transformer_flux",
        ),
        Component::ClipL => ("CLIPTextModel", "transformers.models.clip.modeling_clip"),
        Component::T5 => ("T5EncoderModel", "transformers.models.t5.modeling_t5"),
    };
    let more = [
        (
            "auto_mapping",
            json!({"base_model_class": class, "parent_library": library}),
        ),
        ("base_model_name_or_path", Value::Null),
        ("task_type", Value::Null),
    ];
    folder::config_json(&described.config(), more)
}

/// Element type of an output in the file.
fn output_dtype(output: &Output, options: &WriteOptions) -> Dtype {
    let natural = match output.tensor.dtype() {
        Dtype::F8E4m3 | Dtype::F8E5m2 => Dtype::Bf16, // holds both exactly
        Dtype::F64 => Dtype::F32,
        dtype => dtype,
    };
    output.dtype.or(options.dtype).unwrap_or(natural)
}

/// Why writing stopped.
enum Failure {
    Io(io::Error),
    Format(LoraFormatError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn write_file(
    path: &Path,
    mut outputs: Vec<Output>,
    metadata: &BTreeMap<String, String>,
    options: &WriteOptions,
) -> Result<(), LoraFormatError> {
    // Wide elements first keeps all of them aligned.
    outputs.sort_by(|a, b| {
        let size = |output| output_dtype(output, options).size();
        size(b).cmp(&size(a)).then_with(|| a.key.cmp(&b.key))
    });
    let layout: Vec<_> = outputs
        .iter()
        .map(|o| (o.key.clone(), output_dtype(o, options), o.shape.clone()))
        .collect();
    let by_key: HashMap<&str, &Output> = outputs
        .iter()
        .map(|output| (output.key.as_str(), output))
        .collect();
    replace(path, |mut file| {
        write_streaming(&mut file, &layout, metadata, |key| {
            let output = by_key[key];
            convert(output, output_dtype(output, options)).map_err(Failure::Format)
        })
    })
}

fn convert(output: &Output, dtype: Dtype) -> Result<HostTensor, LoraFormatError> {
    let mut tensor = output.tensor.load()?;
    if tensor.dtype != dtype {
        tensor = tensor.cast(dtype);
        if tensor.first_non_finite().is_some() {
            let problem = KeyProblem::Overflow { dtype };
            return Err(LoraFormatError::key(
                &output.tensor.path(),
                output.tensor.key(),
                problem,
            ));
        }
    }
    tensor.shape.clone_from(&output.shape);
    Ok(tensor)
}

/// Replaces the file at `path` whole or not at all.
fn replace(
    path: &Path,
    write: impl FnOnce(&mut dyn io::Write) -> Result<(), Failure>,
) -> Result<(), LoraFormatError> {
    replace_file(path, write).map_err(|failure| match failure {
        Failure::Io(source) => LoraFormatError::io(path)(source),
        Failure::Format(error) => error,
    })
}
