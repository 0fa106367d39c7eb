//! Adapters outside a model: per-layer factors, and their safetensors file in PEFT's form.
//!
//! Keys are `<prefix><layer>.lora_A.weight [r, in]`, `.lora_B.weight [out, r]`, `.lora_B.bias [out]` and
//! `.lora_magnitude_vector [out]`. The prefix names the component (`transformer.` in a diffusers pipeline) or is empty. The
//! configuration travels in the header as `lora_adapter_metadata`, one JSON object with `<prefix>r`, `<prefix>lora_alpha`
//! and so on, which diffusers reads: every file we write says its alpha.
//!
//! Source: diffusers 0.38 `loaders/lora_base.py` (`_pack_dict_with_prefix`, `LORA_ADAPTER_METADATA_KEY`), PEFT 0.19
//! `save_and_load.py`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use serde_json::{Map, Value};

use crate::adapter::{Adapter, AdapterSpec, LORA_A, LORA_B, LORA_BIAS, Lora, MAGNITUDE};
use crate::config::{InitLoraWeights, LoraConfig, Targets};
use crate::error::LoraError;
use crate::host::HostTensor;
use crate::state::host;
use crate::tensor_file::{TensorFile, serialize};

/// Header key under which diffusers keeps the PEFT configuration.
pub const METADATA_KEY: &str = "lora_adapter_metadata";

/// Factors of one layer, as files store them.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleAdapter {
    /// Rank, alpha and the rest that is not trained.
    pub spec: AdapterSpec,
    /// Down projection, `[r, in]`.
    pub lora_a: HostTensor,
    /// Up projection, `[out, r]`.
    pub lora_b: HostTensor,
    /// DoRA magnitude, `[out]`.
    pub magnitude: Option<HostTensor>,
    /// Bias of the up projection, `[out]`.
    pub bias: Option<HostTensor>,
    /// DoRA, even if the magnitude is still to be computed from the base weight.
    pub use_dora: bool,
}

/// One adapter outside a model: layer path to factors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterFile {
    modules: BTreeMap<String, ModuleAdapter>,
    /// The targets as configured, where known.
    target_modules: Option<Targets>,
}

impl AdapterFile {
    /// An adapter from factors per layer.
    pub fn new(modules: BTreeMap<String, ModuleAdapter>, target_modules: Option<Targets>) -> Self {
        Self {
            modules,
            target_modules,
        }
    }

    /// Layer path to factors.
    pub fn modules(&self) -> &BTreeMap<String, ModuleAdapter> {
        &self.modules
    }

    /// Layer path to factors, by value.
    pub fn into_modules(self) -> BTreeMap<String, ModuleAdapter> {
        self.modules
    }

    /// The state of adapter `name` on `model`.
    ///
    /// # Errors
    /// No adapter of that name.
    pub fn from_model<M: Module>(
        model: &M,
        name: &str,
        target_modules: Option<Targets>,
    ) -> Result<Self, LoraError> {
        // A visitor sees parameters, not the adapter they belong to; a mapper's edit hook does.
        let found = std::rc::Rc::new(std::cell::RefCell::new(BTreeMap::new()));
        let (sink, wanted) = (found.clone(), name.to_string());
        let _ = crate::edit::edit(model.clone(), move |path, lora: Lora| {
            if let Some(adapter) = lora.adapters().iter().find(|a| a.name() == wanted) {
                let layer = path.strip_suffix(".weight").unwrap_or(path).to_string();
                sink.borrow_mut().insert(layer, module_adapter(adapter));
            }
            lora
        });
        let modules = found.take();
        if modules.is_empty() {
            return Err(LoraError::UnknownAdapter {
                name: name.into(),
                attached: crate::edit::adapter_names(model),
            });
        }
        Ok(Self {
            modules,
            target_modules,
        })
    }

    /// Reads a file whose keys start with `prefix`.
    ///
    /// # Errors
    /// A malformed file; a factor without its partner; a key that is no adapter parameter or has another prefix.
    pub fn load(path: &Path, prefix: &str) -> Result<Self, LoraError> {
        Self::from_tensors(&TensorFile::open(path)?, prefix)
    }

    /// As [`load`](Self::load), from bytes; `name` stands for the path in messages.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_bytes(name: &Path, bytes: Vec<u8>, prefix: &str) -> Result<Self, LoraError> {
        Self::from_tensors(&TensorFile::from_bytes(name, bytes)?, prefix)
    }

    fn from_tensors(file: &TensorFile, prefix: &str) -> Result<Self, LoraError> {
        let metadata = metadata_config(file, prefix)?;
        let mut layers: BTreeMap<String, BTreeMap<&str, HostTensor>> = BTreeMap::new();
        for key in file.names() {
            let leftover = |reason: &str| LoraError::Leftover {
                key: key.into(),
                reason: reason.into(),
            };
            let body = key
                .strip_prefix(prefix)
                .ok_or_else(|| leftover(&format!("its name does not start with `{prefix}`")))?;
            let (layer, part) = [
                ".lora_A.weight",
                ".lora_B.weight",
                ".lora_B.bias",
                ".lora_magnitude_vector",
            ]
            .into_iter()
            .find_map(|suffix| body.strip_suffix(suffix).map(|layer| (layer, suffix)))
            .ok_or_else(|| leftover("its name is not that of an adapter parameter"))?;
            layers
                .entry(layer.into())
                .or_default()
                .insert(part, file.read(key)?);
        }
        let mut modules = BTreeMap::new();
        for (layer, mut parts) in layers {
            let mut take = |suffix: &str| {
                parts.remove(suffix).ok_or_else(|| LoraError::Missing {
                    key: format!("{prefix}{layer}{suffix}"),
                    hint: Some("an adapted layer needs both factors".into()),
                })
            };
            let (lora_a, lora_b) = (take(".lora_A.weight")?, take(".lora_B.weight")?);
            let rank = match lora_a.shape.as_slice() {
                &[rank, _] if rank > 0 => rank,
                _ => {
                    let key = format!("{prefix}{layer}.lora_A.weight");
                    return Err(LoraError::Leftover {
                        key,
                        reason: format!("shape {:?} is no [r, in] matrix", lora_a.shape),
                    });
                }
            };
            let magnitude = parts.remove(".lora_magnitude_vector");
            let bias = parts.remove(".lora_B.bias");
            let spec = match &metadata {
                None => AdapterSpec {
                    rank,
                    alpha: rank as f64,
                    use_rslora: false,
                    dropout: 0.0,
                },
                Some(config) => {
                    let (stated, alpha) = config.resolve(&layer)?;
                    if stated != rank {
                        return Err(LoraError::Disagrees {
                            key: format!("r of {layer}"),
                            configured: format!("{stated} (header)"),
                            stored: format!("{rank} (tensor)"),
                        });
                    }
                    AdapterSpec {
                        rank,
                        alpha,
                        use_rslora: config.use_rslora,
                        dropout: config.lora_dropout,
                    }
                }
            };
            let use_dora = magnitude.is_some();
            modules.insert(
                layer,
                ModuleAdapter {
                    spec,
                    lora_a,
                    lora_b,
                    magnitude,
                    bias,
                    use_dora,
                },
            );
        }
        if modules.is_empty() {
            return Err(LoraError::Config(format!(
                "{} holds no adapter",
                file.path().display()
            )));
        }
        Ok(Self {
            modules,
            target_modules: metadata.map(|config| config.target_modules),
        })
    }

    /// Takes rank, alpha and scale of every layer from `config` instead of from the header, for files that do not say them.
    ///
    /// # Errors
    /// A rank that differs from the factors'.
    pub fn with_config(mut self, config: &LoraConfig) -> Result<Self, LoraError> {
        for (layer, module) in &mut self.modules {
            let (rank, alpha) = config.resolve(layer)?;
            if rank != module.spec.rank {
                return Err(LoraError::Disagrees {
                    key: format!("r ({layer})"),
                    configured: rank.to_string(),
                    stored: module.spec.rank.to_string(),
                });
            }
            module.spec = AdapterSpec {
                rank,
                alpha,
                use_rslora: config.use_rslora,
                dropout: config.lora_dropout,
            };
        }
        self.target_modules = Some(config.target_modules.clone());
        Ok(self)
    }

    /// Sets the dropout, which belongs to the training and not to the factors.
    #[must_use]
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.modules
            .values_mut()
            .for_each(|module| module.spec.dropout = dropout);
        self
    }

    /// Checks every factor for NaN and infinity.
    ///
    /// # Errors
    /// The first such factor, by name.
    pub fn check_finite(&self) -> Result<(), LoraError> {
        for (layer, module) in &self.modules {
            let tensors = [
                Some(&module.lora_a),
                Some(&module.lora_b),
                module.magnitude.as_ref(),
                module.bias.as_ref(),
            ];
            for (tensor, name) in tensors
                .into_iter()
                .zip([LORA_A, LORA_B, MAGNITUDE, LORA_BIAS])
            {
                if let Some(index) = tensor.and_then(HostTensor::first_non_finite) {
                    return Err(LoraError::NotFinite {
                        key: format!("{layer}.{name}"),
                        index,
                    });
                }
            }
        }
        Ok(())
    }

    /// Bytes of the file: sorted keys, f32, alpha in the header.
    pub fn to_bytes(&self, prefix: &str) -> Vec<u8> {
        let mut tensors = BTreeMap::new();
        for (layer, module) in &self.modules {
            let mut put = |suffix: &str, tensor: &HostTensor| {
                tensors.insert(format!("{prefix}{layer}{suffix}"), tensor.clone());
            };
            put(".lora_A.weight", &module.lora_a);
            put(".lora_B.weight", &module.lora_b);
            module.bias.iter().for_each(|t| put(".lora_B.bias", t));
            module
                .magnitude
                .iter()
                .for_each(|t| put(".lora_magnitude_vector", t));
        }
        let metadata = BTreeMap::from([
            ("format".to_string(), "pt".to_string()),
            (METADATA_KEY.to_string(), self.metadata_json(prefix)),
        ]);
        serialize(&tensors, &metadata)
    }

    /// The configuration that describes these factors, with patterns where layers differ.
    pub fn config(&self) -> LoraConfig {
        let most_common = |f: &dyn Fn(&AdapterSpec) -> u64| {
            let mut counts = BTreeMap::new();
            self.modules
                .values()
                .for_each(|m| *counts.entry(f(&m.spec)).or_insert(0usize) += 1);
            counts
                .into_iter()
                .max_by_key(|(_, n)| *n)
                .map(|(value, _)| value)
                .unwrap_or_default()
        };
        let r = most_common(&|s| s.rank as u64) as usize;
        let lora_alpha = f64::from_bits(most_common(&|s| s.alpha.to_bits()));
        let rooted = |layer: &str| format!("^{}", layer.replace('.', r"\."));
        let others = |differs: &dyn Fn(&AdapterSpec) -> bool| -> Vec<(&String, AdapterSpec)> {
            self.modules
                .iter()
                .filter(|(_, m)| differs(&m.spec))
                .map(|(layer, m)| (layer, m.spec))
                .collect()
        };
        let first = self.modules.values().next();
        LoraConfig {
            r,
            lora_alpha,
            target_modules: self
                .target_modules
                .clone()
                .unwrap_or_else(|| Targets::List(self.modules.keys().cloned().collect())),
            rank_pattern: others(&|s| s.rank != r)
                .into_iter()
                .map(|(l, s)| (rooted(l), s.rank))
                .collect(),
            alpha_pattern: others(&|s| s.alpha != lora_alpha)
                .into_iter()
                .map(|(l, s)| (rooted(l), s.alpha))
                .collect(),
            use_rslora: first.is_some_and(|m| m.spec.use_rslora),
            use_dora: first.is_some_and(|m| m.use_dora),
            lora_bias: first.is_some_and(|m| m.bias.is_some()),
            lora_dropout: first.map_or(0.0, |m| m.spec.dropout),
            ..LoraConfig::default()
        }
    }

    /// Checks that `config` would give the layers, ranks and scales stored here.
    ///
    /// # Errors
    /// The first value that differs, with both values.
    pub(crate) fn agrees_with(&self, config: &LoraConfig) -> Result<(), LoraError> {
        let differ = |key: String, configured: String, stored: String| {
            Err(LoraError::Disagrees {
                key,
                configured,
                stored,
            })
        };
        if let Some(stored) = &self.target_modules
            && !stored.same_as(&config.target_modules)
        {
            return differ(
                "target_modules".into(),
                show(&config.target_modules),
                show(stored),
            );
        }
        for (layer, module) in &self.modules {
            let (rank, alpha) = config.resolve(layer)?;
            let spec = &module.spec;
            if rank != spec.rank {
                return differ(
                    format!("r ({layer})"),
                    rank.to_string(),
                    spec.rank.to_string(),
                );
            }
            if alpha != spec.alpha {
                return differ(
                    format!("lora_alpha ({layer})"),
                    alpha.to_string(),
                    spec.alpha.to_string(),
                );
            }
            if config.use_rslora != spec.use_rslora {
                return differ(
                    "use_rslora".into(),
                    config.use_rslora.to_string(),
                    spec.use_rslora.to_string(),
                );
            }
            if config.use_dora != module.use_dora {
                return differ(
                    "use_dora".into(),
                    config.use_dora.to_string(),
                    module.use_dora.to_string(),
                );
            }
            if config.lora_bias != module.bias.is_some() {
                return differ(
                    "lora_bias".into(),
                    config.lora_bias.to_string(),
                    module.bias.is_some().to_string(),
                );
            }
            if config.lora_dropout != spec.dropout {
                return differ(
                    "lora_dropout".into(),
                    config.lora_dropout.to_string(),
                    spec.dropout.to_string(),
                );
            }
        }
        Ok(())
    }

    /// PEFT's fields, each key with the prefix; only names that PEFT's `LoraConfig` takes.
    fn metadata_json(&self, prefix: &str) -> String {
        let config = LoraConfig {
            init_lora_weights: InitLoraWeights::Default,
            ..self.config()
        };
        let Ok(Value::Object(fields)) = serde_json::to_value(&config) else {
            return String::new();
        };
        let extra = [
            ("bias", Value::from("none")),
            ("peft_type", Value::from("LORA")),
        ];
        let fields: BTreeMap<String, Value> = fields
            .into_iter()
            .chain(extra.map(|(key, value)| (key.to_string(), value)))
            .map(|(key, value)| (format!("{prefix}{key}"), value))
            .collect();
        serde_json::to_string_pretty(&fields).unwrap_or_default()
    }
}

fn show(targets: &Targets) -> String {
    serde_json::to_string(targets).unwrap_or_default()
}

fn module_adapter(adapter: &Adapter) -> ModuleAdapter {
    let vector = |p: &Param<Tensor<1>>| host(p.val());
    ModuleAdapter {
        spec: adapter.spec,
        lora_a: host(adapter.lora_a.val()),
        lora_b: host(adapter.lora_b.val()),
        magnitude: adapter.magnitude.as_ref().map(vector),
        bias: adapter.bias.as_ref().map(vector),
        use_dora: adapter.magnitude.is_some(),
    }
}

/// The configuration in the header, if there is one for `prefix`.
fn metadata_config(file: &TensorFile, prefix: &str) -> Result<Option<LoraConfig>, LoraError> {
    let Some(text) = file.metadata().get(METADATA_KEY) else {
        return Ok(None);
    };
    let json = |source| LoraError::Json {
        what: format!("`{METADATA_KEY}` of {}", file.path().display()),
        source,
    };
    let all: Map<String, Value> = serde_json::from_str(text).map_err(json)?;
    let known: BTreeSet<String> = match serde_json::to_value(LoraConfig {
        exclude_modules: Some(Targets::List(Vec::new())),
        ..LoraConfig::default()
    }) {
        Ok(Value::Object(fields)) => fields.into_iter().map(|(key, _)| key).collect(),
        _ => BTreeSet::new(),
    };
    let fields: Map<String, Value> = all
        .into_iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.to_string(), value)))
        .filter(|(key, value)| {
            known.contains(key) && !value.is_null() && key != "init_lora_weights"
        })
        .collect();
    if fields.is_empty() {
        return Ok(None);
    }
    let config: LoraConfig = serde_json::from_value(Value::Object(fields)).map_err(json)?;
    config.validate()?;
    Ok(Some(config))
}
