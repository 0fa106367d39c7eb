//! Adapters outside a model: per-layer factors, and their safetensors file in PEFT's form.
//!
//! | kind | keys after `<prefix><layer>` |
//! |---|---|
//! | LoRA | `.lora_A.weight [r, in]`, `.lora_B.weight [out, r]`, `.lora_B.bias [out]`, `.lora_magnitude_vector [out]` |
//! | LoRA, convolution | `.lora_A.weight [r, in, kernel...]`, `.lora_B.weight [out, r, 1...]`, magnitude `[1, out, 1...]` |
//! | LoRA, embedding | `.lora_embedding_A [r, entries]`, `.lora_embedding_B [out, r]` |
//! | LoHa | `.hada_w1_a`, `.hada_w2_a [out, r]`, `.hada_w1_b`, `.hada_w2_b [r, in]` |
//! | LoKr | `.lokr_w1 [a, b]` or `.lokr_w1_a [a, r]` and `.lokr_w1_b [r, b]`; `.lokr_w2` likewise |
//! | `modules_to_save` | the parameter's own name and shape in PyTorch |
//! | `bias` | `.bias`, of an adapted layer `.base_layer.bias` |
//!
//! The prefix names the component (`transformer.` in a diffusers pipeline) or is empty. The configuration travels in the
//! header as `lora_adapter_metadata`, one JSON object with `<prefix>r`, `<prefix>lora_alpha` and so on, which diffusers
//! reads: every file we write says its alpha.
//!
//! Source: diffusers 0.38 `loaders/lora_base.py` (`_pack_dict_with_prefix`, `LORA_ADAPTER_METADATA_KEY`), PEFT 0.19
//! `save_and_load.py`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use burn::module::Module;
use serde_json::{Map, Value};

use crate::adapter::Adapter;
use crate::adapters::adapters_of;
use crate::edit::adapter_names;
use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::files::safetensors::{TensorFile, write_tensors};
use crate::files::strict_json::parse_json;
use crate::kinds::factors::Factors;
use crate::kinds::module::ModuleAdapter;
use crate::kinds::parts::{Kind, WHOLE};
use crate::kinds::spec::AdapterSpec;
use crate::kinds::{dense, split};
use crate::peft::config::{InitLoraWeights, LoraConfig};
use crate::peft::form::METADATA_KEY;
use crate::peft::selection::{PeftType, TrainBias};
use crate::site::WeightLayout;
use crate::state::host_tensor;

/// Header key of the configuration under which factors that were split off the base weight are trained: the second half of
/// each is what they started from.
pub(super) const SPLIT_KEY: &str = "lora_core_split_adapter";

/// One adapter outside a model: layer path to factors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterFile {
    modules: BTreeMap<String, ModuleAdapter>,
    /// Parameters that are trained in full, by PyTorch's name and in its layout.
    whole: BTreeMap<String, HostTensor>,
    /// What the configuration says that factors do not show, where known: the other fields have their defaults.
    selection: Option<Box<LoraConfig>>,
}

impl AdapterFile {
    /// An adapter from factors per layer.
    pub fn new(modules: BTreeMap<String, ModuleAdapter>) -> Self {
        Self {
            modules,
            ..Self::default()
        }
    }

    /// An adapter of `config` from factors per layer and parameters that are trained in full.
    pub(crate) fn of_parts(
        modules: BTreeMap<String, ModuleAdapter>,
        whole: BTreeMap<String, HostTensor>,
        config: Option<&LoraConfig>,
    ) -> Self {
        Self {
            modules,
            whole,
            selection: config.map(selection).map(Box::new),
        }
    }

    /// How many numbers it has.
    pub fn numel(&self) -> usize {
        let factors = self.modules.values().flat_map(|module| {
            let factors = module.factors.iter();
            factors.map(|(_, tensor)| tensor.numel())
        });
        factors.sum::<usize>() + self.whole.values().map(HostTensor::numel).sum::<usize>()
    }

    /// Layer path to factors.
    pub fn modules(&self) -> &BTreeMap<String, ModuleAdapter> {
        &self.modules
    }

    /// Layer path to factors, by value.
    pub fn into_modules(self) -> BTreeMap<String, ModuleAdapter> {
        self.modules
    }

    /// Parameters trained in full (`modules_to_save`, `bias`), by PyTorch's name and in its layout: a linear weight is
    /// `[out, in]`.
    pub fn whole(&self) -> &BTreeMap<String, HostTensor> {
        &self.whole
    }

    /// The state of adapter `name` on `model`; `config` is the one it was made with, where known.
    ///
    /// # Errors
    /// No adapter of that name.
    pub fn from_model<M: Module>(
        model: &M,
        name: &str,
        config: Option<&LoraConfig>,
    ) -> Result<Self, LoraError> {
        Self::from_part(model, |_| true, name, config)
    }

    /// As [`from_model`](Self::from_model), of the parameters whose paths `is_part` wants: those of one of several models in one
    /// module, which were given adapters one by one.
    ///
    /// # Errors
    /// No adapter of that name there.
    pub fn from_part<M: Module>(
        model: &M,
        is_part: impl Fn(&str) -> bool,
        name: &str,
        config: Option<&LoraConfig>,
    ) -> Result<Self, LoraError> {
        let mut file = Self::default();
        for (_, adapters) in adapters_of(model).iter().filter(|(path, _)| is_part(path)) {
            if let Some(adapter) = adapters.adapters().iter().find(|a| a.name() == name) {
                file.insert(adapter);
            }
        }
        if file.modules.is_empty() && file.whole.is_empty() {
            return Err(LoraError::UnknownAdapter {
                name: name.into(),
                attached: adapter_names(model),
            });
        }
        file.selection = config.map(selection).map(Box::new);
        Ok(file)
    }

    fn insert(&mut self, adapter: &Adapter) {
        let site = &adapter.site;
        if let Some(value) = adapter.factors.get(WHOLE) {
            let tensor = dense::to_file(site, &host_tensor(value.vector()));
            self.whole.insert(site.key.clone(), tensor);
            return;
        }
        let factors = adapter.factors.as_ref().map(|part, factor| {
            let tensor = match part.is_vector() {
                true => host_tensor(factor.vector()),
                false => host_tensor(factor.matrix()),
            };
            let shape = site.file_shape(part, &tensor.shape);
            HostTensor { shape, ..tensor }
        });
        let module = ModuleAdapter {
            embedding: site.layout == WeightLayout::Table,
            split: adapter.split,
            ..ModuleAdapter::new(adapter.spec, factors)
        };
        self.modules.insert(site.key.clone(), module);
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
        Self::from_keys(file, file.names(), prefix, SPLIT_KEY)
    }

    /// The adapter in these tensors of `file`, with the header's key for factors that were split off.
    pub(super) fn from_keys<'a>(
        file: &TensorFile,
        keys: impl Iterator<Item = &'a str>,
        prefix: &str,
        split_key: &str,
    ) -> Result<Self, LoraError> {
        let config = LoraConfig::from_header(file, prefix)?;
        let mut adapter = Self::parse(file, keys, prefix, config.as_ref())?;
        if let Some(text) = file.metadata().get(split_key) {
            let config: LoraConfig =
                parse_json(text.as_bytes()).map_err(|source| LoraError::Json {
                    what: format!("`{split_key}` of {}", file.path().display()),
                    source,
                })?;
            config.validate()?;
            for (layer, module) in &mut adapter.modules {
                *module = split::cut(layer, module, &config)?.ok_or_else(|| {
                    LoraError::Config(format!(
                        "`{split_key}` in the header of {} does not describe the factors of `{layer}`; without that entry the file is a plain LoRA",
                        file.path().display()
                    ))
                })?;
            }
        }
        Ok(adapter)
    }

    /// The adapter in these tensors of `file`, as `config` describes it.
    pub(crate) fn parse<'a>(
        file: &TensorFile,
        keys: impl Iterator<Item = &'a str>,
        prefix: &str,
        config: Option<&LoraConfig>,
    ) -> Result<Self, LoraError> {
        let saves = config.is_some_and(|config| {
            !config.modules_to_save.is_empty() || config.bias != TrainBias::None
        });
        let mut layers: BTreeMap<String, BTreeMap<&str, HostTensor>> = BTreeMap::new();
        let mut whole = BTreeMap::new();
        for key in keys {
            let leftover = |reason: &str| LoraError::Leftover {
                key: key.into(),
                reason: reason.into(),
            };
            let body = key
                .strip_prefix(prefix)
                .ok_or_else(|| leftover(&format!("its name does not start with `{prefix}`")))?;
            let part = suffixes()
                .find_map(|(_, suffix)| body.strip_suffix(suffix).map(|layer| (layer, suffix)));
            match part {
                Some((layer, suffix)) => {
                    let parts = layers.entry(layer.into()).or_default();
                    parts.insert(suffix, file.read(key)?);
                }
                None if saves => {
                    let name = body.replace(".base_layer.", ".");
                    whole.insert(name, file.read(key)?);
                }
                None => return Err(leftover("its name is not that of an adapter parameter")),
            }
        }
        let modules = layers
            .into_iter()
            .map(|(layer, parts)| {
                let module = module(prefix, &layer, parts, config)?;
                Ok((layer, module))
            })
            .collect::<Result<BTreeMap<_, _>, LoraError>>()?;
        if modules.is_empty() {
            return Err(LoraError::Config(format!(
                "{} holds no adapter",
                file.path().display()
            )));
        }
        Ok(Self {
            modules,
            whole,
            selection: config.map(selection).map(Box::new),
        })
    }

    /// Takes rank, alpha and scale of every layer from `config` instead of from the header, for files that do not say them.
    ///
    /// # Errors
    /// A rank that differs from the factors'.
    pub fn with_config(mut self, config: &LoraConfig) -> Result<Self, LoraError> {
        for (layer, module) in &mut self.modules {
            let spec = config.spec(layer)?;
            if spec.rank != module.spec.rank {
                return Err(LoraError::Disagrees {
                    key: format!("r ({layer})"),
                    configured: spec.rank.to_string(),
                    stored: module.spec.rank.to_string(),
                });
            }
            module.spec = spec;
        }
        self.selection = Some(Box::new(selection(config)));
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

    /// Multiplies the scale of LoHa and LoKr into their first factor, so that every reader means the same.
    ///
    /// PEFT scales by alpha over rank; LyCORIS, ComfyUI and ai-toolkit look for alpha in a tensor, and not at all where both
    /// sides of a LoKr are full. Other adapters stay as they are.
    #[must_use]
    pub fn fold_scale(mut self) -> Self {
        for module in self.modules.values_mut() {
            if !matches!(module.factors.kind(), Kind::Loha | Kind::Lokr) {
                continue;
            }
            let Some((_, first)) = module.factors.iter_mut().next() else {
                continue;
            };
            let scale = module.spec.scale();
            let values = first.to_f32();
            let scaled: Vec<f32> = values
                .iter()
                .map(|v| (f64::from(*v) * scale) as f32)
                .collect();
            *first = HostTensor::from_f32(first.shape.clone(), &scaled);
            module.spec.alpha = module.spec.rank as f64;
        }
        self
    }

    /// The same update as a plain LoRA for the original model: where factors were split off the base weight, what they
    /// started from is subtracted, which doubles the rank.
    #[must_use]
    pub fn to_plain(&self) -> Self {
        let modules = self.modules.iter();
        Self {
            modules: modules
                .map(|(layer, module)| (layer.clone(), split::plain(module)))
                .collect(),
            ..self.clone()
        }
    }

    /// Checks every factor for NaN and infinity.
    ///
    /// # Errors
    /// The first such factor, by name.
    pub fn check_finite(&self) -> Result<(), LoraError> {
        let factors = self.modules.iter().flat_map(|(layer, module)| {
            let parts = module.factors.iter();
            parts.map(move |(part, tensor)| (format!("{layer}.{}", part.name), tensor))
        });
        let whole = self.whole.iter().map(|(key, tensor)| (key.clone(), tensor));
        for (key, tensor) in factors.chain(whole) {
            if let Some(index) = tensor.first_non_finite() {
                return Err(LoraError::NotFinite { key, index });
            }
        }
        Ok(())
    }

    /// Bytes of the file: [`to_plain`](Self::to_plain), sorted keys, f32, alpha in the header.
    ///
    /// # Panics
    /// If the path of a layer is one that a file cannot hold.
    pub fn to_bytes(&self, prefix: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.write(prefix, &mut bytes) {
            Ok(()) => bytes,
            Err(error) => panic!("{error}"),
        }
    }

    /// Writes what [`to_bytes`](Self::to_bytes) gives, without a copy of the tensors, unless factors were split off the base.
    ///
    /// # Errors
    /// What `out` returns; the path of a layer that a file cannot hold.
    pub fn write(&self, prefix: &str, out: &mut dyn Write) -> io::Result<()> {
        let plain = self.plain();
        let mut metadata = header(plain.peft_config().to_peft(prefix));
        metadata.extend(self.split_entry().map(|split| (SPLIT_KEY.into(), split)));
        write_tensors(out, &plain.tensors(prefix), &metadata)
    }

    /// This, or a copy of it as a plain LoRA if factors were split off the base weight.
    pub(super) fn plain(&self) -> Cow<'_, Self> {
        match self.modules.values().any(|module| module.split.is_some()) {
            true => Cow::Owned(self.to_plain()),
            false => Cow::Borrowed(self),
        }
    }

    /// What the header says beside PEFT's fields: the configuration under which all factors were split off the base weight.
    pub(super) fn split_entry(&self) -> Option<String> {
        let split = self.modules.values().all(|module| module.split.is_some());
        (split && !self.modules.is_empty()).then(|| show(&self.config()))
    }

    /// Tensors by their names in a file.
    pub(crate) fn tensors(&self, prefix: &str) -> BTreeMap<String, &HostTensor> {
        let mut tensors = BTreeMap::new();
        for (layer, module) in &self.modules {
            for (part, tensor) in module.factors.iter() {
                if let Some(suffix) = part.key(module.embedding) {
                    tensors.insert(format!("{prefix}{layer}{suffix}"), tensor);
                }
            }
        }
        for (key, tensor) in &self.whole {
            let adapted = key.strip_suffix(".bias");
            let key = match adapted.filter(|layer| self.modules.contains_key(*layer)) {
                Some(layer) => format!("{layer}.base_layer.bias"),
                None => key.clone(),
            };
            tensors.insert(format!("{prefix}{key}"), tensor);
        }
        tensors
    }

    /// The configuration that describes these factors, with patterns where layers differ.
    pub fn config(&self) -> LoraConfig {
        let layers = self.modules.iter();
        let found = LoraConfig::of_layers(layers.map(|(layer, m)| (layer.as_str(), m.spec)));
        let first = self.modules.values().next();
        let known = match &self.selection {
            Some(known) => LoraConfig::clone(known),
            None => LoraConfig {
                target_modules: found.target_modules,
                ..LoraConfig::default()
            },
        };
        LoraConfig {
            peft_type: self.peft_type(),
            r: found.r,
            lora_alpha: found.lora_alpha,
            rank_pattern: found.rank_pattern,
            alpha_pattern: found.alpha_pattern,
            use_rslora: first.is_some_and(|m| m.spec.use_rslora),
            use_dora: first.is_some_and(|m| m.use_dora),
            lora_bias: first.is_some_and(ModuleAdapter::has_bias),
            lora_dropout: first.map_or(0.0, |m| m.spec.dropout),
            init_lora_weights: first.and_then(|m| m.split).unwrap_or_default(),
            ..known
        }
    }

    /// The kind of all factors.
    pub fn peft_type(&self) -> PeftType {
        let first = self.modules.values().next();
        first
            .and_then(|module| module.factors.kind().peft_type())
            .unwrap_or_default()
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
        if config.peft_type != self.peft_type() {
            return differ(
                "peft_type".into(),
                config.peft_type.to_string(),
                self.peft_type().to_string(),
            );
        }
        if let Some(stored) = &self.selection {
            if !stored.target_modules.same_as(&config.target_modules) {
                return differ(
                    "target_modules".into(),
                    show(&config.target_modules),
                    show(&stored.target_modules),
                );
            }
            let fields = |config: &LoraConfig| {
                [
                    ("layers_to_transform", show(&config.layers_to_transform)),
                    ("layers_pattern", show(&config.layers_pattern)),
                    ("modules_to_save", show(&config.modules_to_save)),
                    ("bias", show(&config.bias)),
                    ("decompose_both", show(&config.decompose_both)),
                    ("decompose_factor", show(&config.decompose_factor)),
                ]
            };
            for ((key, configured), (_, stored)) in fields(config).into_iter().zip(fields(stored)) {
                if configured != stored {
                    return differ(key.into(), configured, stored);
                }
            }
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
            if config.lora_bias != module.has_bias() {
                return differ(
                    "lora_bias".into(),
                    config.lora_bias.to_string(),
                    module.has_bias().to_string(),
                );
            }
            let wanted = Some(config.init_lora_weights).filter(|init| init.splits_base());
            if wanted != module.split {
                return differ(
                    format!("init_lora_weights ({layer})"),
                    config.init_lora_weights.to_string(),
                    match module.split {
                        Some(method) => method.to_string(),
                        None => "no part of the base weight".into(),
                    },
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

    /// The configuration that a file says: factors that are stored are not to be initialised.
    pub(crate) fn peft_config(&self) -> LoraConfig {
        LoraConfig {
            init_lora_weights: InitLoraWeights::Default,
            ..self.config()
        }
    }
}

/// The header of a file, with PEFT's fields.
pub(super) fn header(fields: Map<String, Value>) -> BTreeMap<String, String> {
    let fields = serde_json::to_string_pretty(&fields).unwrap_or_default();
    BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        (METADATA_KEY.to_string(), fields),
    ])
}

/// The fields of `config` that factors do not show; the others at their defaults.
fn selection(config: &LoraConfig) -> LoraConfig {
    LoraConfig {
        target_modules: config.target_modules.clone(),
        exclude_modules: config.exclude_modules.clone(),
        layers_to_transform: config.layers_to_transform.clone(),
        layers_pattern: config.layers_pattern.clone(),
        modules_to_save: config.modules_to_save.clone(),
        bias: config.bias,
        decompose_both: config.decompose_both,
        decompose_factor: config.decompose_factor,
        ..LoraConfig::default()
    }
}

fn show(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// What can follow a layer's name in a PEFT file, and the kind of adapter it belongs to.
fn suffixes() -> impl Iterator<Item = (Kind, &'static str)> {
    let kinds = Kind::ALL.into_iter();
    let kinds = kinds.filter(|kind| kind.peft_type().is_some());
    kinds.flat_map(|kind| {
        let parts = kind.parts().iter();
        parts.flat_map(move |part| {
            let keys = [part.key, part.embedding_key].into_iter().flatten();
            keys.map(move |key| (kind, key))
        })
    })
}

/// One layer's factors from its tensors.
fn module(
    prefix: &str,
    layer: &str,
    mut parts: BTreeMap<&str, HostTensor>,
    config: Option<&LoraConfig>,
) -> Result<ModuleAdapter, LoraError> {
    let key = |suffix: &str| format!("{prefix}{layer}{suffix}");
    let embedding = parts
        .keys()
        .any(|suffix| suffix.starts_with(".lora_embedding"));
    let is_there = |kind: &Kind| {
        let mut found = suffixes().filter(|(of, _)| of == kind);
        found.any(|(_, suffix)| parts.contains_key(suffix))
    };
    let kind = [Kind::Loha, Kind::Lokr].into_iter().find(is_there);
    let factors = Factors::collect(kind.unwrap_or(Kind::Lora), |part| {
        parts.remove(part.key(embedding)?)
    })
    .map_err(|part| LoraError::Missing {
        key: key(part.key(embedding).unwrap_or(part.name)),
        hint: Some("an adapted layer needs both factors".into()),
    })?;
    if let Some(suffix) = parts.keys().next() {
        return Err(LoraError::Leftover {
            key: key(suffix),
            reason: "the layer has factors of another kind".into(),
        });
    }
    for (part, tensor) in factors.iter() {
        if !part.is_vector() && (tensor.shape.len() < 2 || tensor.numel() == 0) {
            return Err(LoraError::Leftover {
                key: key(part.key(embedding).unwrap_or(part.name)),
                reason: format!("shape {:?} is no matrix", tensor.shape),
            });
        }
    }
    let (found, kind) = (
        factors.rank(),
        factors.kind().peft_type().unwrap_or_default(),
    );
    let spec = match config {
        None => {
            let rank = found.unwrap_or(1);
            AdapterSpec {
                rank,
                alpha: rank as f64,
                use_rslora: false,
                dropout: 0.0,
            }
        }
        Some(config) => {
            let differ = |what: &str, stated: String, found: String| {
                Err(LoraError::Disagrees {
                    key: format!("{what} of {layer}"),
                    configured: format!("{stated} (header)"),
                    stored: format!("{found} (tensor)"),
                })
            };
            if config.peft_type != kind {
                return differ("peft_type", config.peft_type.to_string(), kind.to_string());
            }
            let spec = config.spec(layer)?;
            if let Some(found) = found.filter(|found| *found != spec.rank) {
                return differ("r", spec.rank.to_string(), found.to_string());
            }
            spec
        }
    };
    Ok(ModuleAdapter {
        embedding,
        ..ModuleAdapter::new(spec, factors)
    })
}
