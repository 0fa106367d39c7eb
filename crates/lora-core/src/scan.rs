//! What a model has: paths, shapes and owners of its parameters, and which of them a configuration or a file means.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;
use burn::tensor::{DType, Device};

use crate::adapters::adapters_of;
use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::dense::{self, Whole};
use crate::kinds::module::ModuleAdapter;
use crate::kinds::parts::{Dim, MAGNITUDE};
use crate::peft::config::LoraConfig;
use crate::peft::file::AdapterFile;
use crate::peft::pattern::{Targets, is_suffix};
use crate::peft::selection::TrainBias;
use crate::peft::selection::{LayerFilter, is_saved, keeps_adapters_off};
use crate::site::{Site, WeightLayout};
use crate::walk::{Found, walk};

/// A layer that gets an adapter, checked.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) site: Site,
    pub(crate) module: ModuleAdapter,
    pub(crate) device: Device,
    /// Of the weight, as [`Parameter::dtype`].
    dtype: Option<DType>,
}

impl Layer {
    /// Whether its DoRA still has to look at the base weight.
    pub(crate) fn lacks_magnitude(&self) -> bool {
        self.module.use_dora && self.module.factors.get(MAGNITUDE).is_none()
    }

    /// Refuses what the way in which the model computes the layer cannot do.
    pub(crate) fn check_path(&self, layer: &str, fast: bool) -> Result<(), LoraError> {
        let fast = fast && self.site.layout == WeightLayout::InOut;
        let is_half = matches!(self.dtype, Some(DType::BF16 | DType::F16));
        if let Some(dtype) = self.dtype.filter(|dtype| *dtype != DType::F32)
            && !(fast && is_half)
        {
            return Err(LoraError::Leftover {
                key: format!(
                    "{}.{}",
                    self.site.key,
                    self.module.factors.kind().parts()[0].name
                ),
                reason: format!(
                    "the layer's weight is {dtype:?}, and adapters need F32: load the model as f32"
                ),
            });
        }
        // PEFT's embeddings know no dropout.
        if self.module.spec.dropout > 0.0 && !fast && self.site.layout != WeightLayout::Table {
            return Err(LoraError::Config(format!(
                "`lora_dropout` needs a model that computes its layers with `lora_core::linear`, which `{layer}` is not; set it to 0"
            )));
        }
        if self.module.has_bias() && !fast {
            return Err(LoraError::Config(format!(
                "`{layer}` has a `lora_bias`, which needs a model that computes its layers with `lora_core::linear`"
            )));
        }
        Ok(())
    }
}

/// Paths, shapes and owners of a model's parameters, and where adapters already sit.
#[derive(Default)]
pub(crate) struct Scan {
    /// By the path of the layer that has them as `weight`.
    pub(crate) weights: BTreeMap<String, Parameter>,
    /// By their own path.
    parameters: BTreeMap<String, Parameter>,
    /// What sits on parameters and is not ours, by the parameter's path.
    foreign: BTreeMap<String, String>,
}

#[derive(Clone)]
pub(crate) struct Parameter {
    shape: Vec<usize>,
    /// The type of the module that has it.
    owner: String,
    /// As PyTorch calls it: `norm.weight` where Burn says `norm.gamma`.
    key: String,
    pub(crate) device: Device,
    /// Where it has one yet; else it will be the device's default.
    dtype: Option<DType>,
}

impl Parameter {
    fn is_linear(&self) -> bool {
        self.owner == "Struct:Linear"
    }

    /// Where an adapter of the layer `path` would sit, if its weight can be adapted: only of a layer whose type says how
    /// its weight is to be read.
    pub(crate) fn site(&self, path: &str) -> Option<Site> {
        let layout = match (self.owner.as_str(), self.shape.len()) {
            ("Struct:Conv1d" | "Struct:Conv2d" | "Struct:Conv3d", 3..) => WeightLayout::OutIn,
            ("Struct:Embedding", 2) => WeightLayout::Table,
            ("Struct:Linear", 2) => WeightLayout::InOut,
            _ => return None,
        };
        Some(Site {
            key: path.into(),
            layout,
            shape: self.shape.clone(),
        })
    }

    fn is_adaptable(&self) -> bool {
        self.site("").is_some()
    }

    /// Why it is not.
    fn refusal(&self) -> String {
        let owner = self.owner.trim_start_matches("Struct:");
        format!(
            "it belongs to a `{owner}` and has shape {:?}; only a Linear, an Embedding or a convolution of burn-nn can be adapted",
            self.shape
        )
    }

    /// The parameter itself, to be trained in full.
    pub(crate) fn whole_site(&self) -> Site {
        let is_transposed = self.is_linear() && self.shape.len() == 2;
        Site {
            key: self.key.clone(),
            layout: if is_transposed {
                WeightLayout::InOut
            } else {
                WeightLayout::OutIn
            },
            shape: self.shape.clone(),
        }
    }
}

impl Scan {
    /// Of a model as it is; nothing lazy is made.
    pub(crate) fn of<M: Module>(model: &M) -> Self {
        let mut scan = Self::default();
        walk(model, |found| scan.note(found));
        let ours: BTreeSet<String> = adapters_of(model)
            .into_iter()
            .map(|(path, _)| path)
            .collect();
        scan.foreign.retain(|path, _| !ours.contains(path));
        scan
    }

    fn note(&mut self, found: &Found<'_>) {
        if let Some((parameter, name)) = found.sits_on() {
            self.foreign.insert(parameter, name.into());
            return;
        }
        let [module @ .., last] = found.names() else {
            return;
        };
        let name = match (found.owner().ends_with("Norm"), last.as_str()) {
            (true, "gamma") => "weight",
            (true, "beta") => "bias",
            (_, name) => name,
        };
        let parameter = Parameter {
            shape: found.param().lazy_shape(),
            key: [module, &[name.to_string()]].concat().join("."),
            device: found.param().device(),
            dtype: found.param().dtype(),
            owner: found.owner().into(),
        };
        if last == "weight" {
            self.weights.insert(module.join("."), parameter.clone());
        }
        self.parameters.insert(found.path(), parameter);
    }

    /// Takes the shapes of `wanted` parameters from their values: a lazy weight of a `Linear` with `LinearLayout::Col` says
    /// its shape the other way round until it is made.
    pub(crate) fn settle<M: Module>(&mut self, model: &M, wanted: impl Fn(&str) -> bool) {
        walk(model, |found| {
            let path = found.path();
            let Some(parameter) = self.parameters.get_mut(&path).filter(|_| wanted(&path)) else {
                return;
            };
            if parameter.is_linear() && parameter.dtype.is_none() {
                parameter.shape = found.values().1;
                parameter.dtype = found.param().dtype();
                if let Some(layer) = path.strip_suffix(".weight") {
                    self.weights.insert(layer.into(), parameter.clone());
                }
            }
        });
    }

    /// Refuses a parameter that carries what another library has put there: Burn discards a second reparameterization.
    pub(crate) fn check_free(&self, parameter: &str) -> Result<(), LoraError> {
        match self.foreign.get(parameter) {
            None => Ok(()),
            Some(name) => Err(LoraError::Config(format!(
                "`{parameter}` carries a reparameterization named `{name}` that is not lora-core's; remove or materialize it first"
            ))),
        }
    }

    /// Whether the model has this parameter, in the shape of `site`.
    pub(crate) fn has(&self, parameter: &str, site: &Site) -> bool {
        let own = self.parameters.get(parameter);
        own.is_some_and(|own| own.shape == site.shape)
    }

    /// Layers that `config` selects.
    pub(crate) fn targets(&self, config: &LoraConfig) -> Result<Vec<&str>, LoraError> {
        let target = config.target_modules.matcher()?;
        let exclude = config
            .exclude_modules
            .as_ref()
            .map(|e| e.matcher())
            .transpose()?;
        let layers = LayerFilter::new(
            config.layers_to_transform.as_ref(),
            config.layers_pattern.as_ref(),
        )?;
        let is_listed = |path: &str| match &config.target_modules {
            Targets::List(entries) => entries.iter().any(|entry| entry == path),
            Targets::Pattern(_) => false,
        };
        let is_target = |path: &str, weight: &Parameter| {
            !exclude
                .as_ref()
                .is_some_and(|e| e.matches(path, weight.is_linear()))
                && target.matches(path, weight.is_linear())
                && layers
                    .as_ref()
                    .is_none_or(|layers| is_listed(path) || layers.matches(path))
        };
        // A list entry that selects nothing is a typing error, even where other entries match.
        if let Targets::List(entries) = &config.target_modules {
            if entries.is_empty() {
                return Err(LoraError::Config(
                    "`target_modules` is empty: name the layers to adapt".into(),
                ));
            }
            for entry in entries {
                let mut matched = false;
                for (path, weight) in &self.weights {
                    if !is_suffix(path, entry) {
                        continue;
                    }
                    matched = true;
                    if !weight.is_adaptable() && is_target(path, weight) {
                        return Err(LoraError::Config(format!(
                            "`{path}`, named by `{entry}` of `target_modules`, cannot be adapted: {}",
                            weight.refusal()
                        )));
                    }
                }
                if !matched {
                    return Err(self.no_match(entry));
                }
            }
        }
        let mut targets = Vec::new();
        for (path, weight) in &self.weights {
            let mut saved = config.modules_to_save.iter();
            if weight.is_adaptable()
                && is_target(path, weight)
                && !saved.try_fold(false, |off, entry| {
                    keeps_adapters_off(path, entry).map(|this| off || this)
                })?
            {
                targets.push(path.as_str());
            }
        }
        if targets.is_empty() {
            let pattern = match &config.target_modules {
                Targets::Pattern(pattern) => pattern.clone(),
                Targets::List(entries) => entries.join(", "),
            };
            return Err(self.no_match(&pattern));
        }
        Ok(targets)
    }

    /// Parameters that `config` trains in full.
    pub(crate) fn whole(
        &self,
        config: &LoraConfig,
    ) -> Result<BTreeMap<&str, &Parameter>, LoraError> {
        let targets = self.targets(config)?;
        let mut whole = BTreeMap::new();
        for entry in &config.modules_to_save {
            let saved: Vec<_> = self
                .parameters
                .iter()
                .filter(|(_, parameter)| is_saved(&parameter.key, entry))
                .map(|(path, parameter)| (path.as_str(), parameter))
                .collect();
            if saved.is_empty() {
                return Err(LoraError::Config(format!(
                    "`{entry}` of `modules_to_save` names no module of this model"
                )));
            }
            whole.extend(saved);
        }
        let layers = whole.keys().filter_map(|path| path.strip_suffix(".weight"));
        if let Some(layer) = layers.into_iter().find(|layer| targets.contains(layer)) {
            return Err(LoraError::Config(format!(
                "`{layer}` is named by both `target_modules` and `modules_to_save`"
            )));
        }
        if let Some((path, _)) = whole.iter().find(|(_, p)| p.owner == "Struct:BatchNorm") {
            return Err(LoraError::Config(format!(
                "`{path}` of `modules_to_save` is a batch norm, whose running statistics an adapter cannot hold"
            )));
        }
        whole.extend(
            self.parameters
                .iter()
                .filter(|(_, parameter)| match config.bias {
                    TrainBias::None => false,
                    TrainBias::All => parameter.key.contains("bias"),
                    TrainBias::LoraOnly => parameter
                        .key
                        .strip_suffix(".bias")
                        .is_some_and(|layer| targets.contains(&layer)),
                })
                .map(|(path, parameter)| (path.as_str(), parameter)),
        );
        Ok(whole)
    }

    /// Checks that `config` selects the layers and parameters a file holds, no more and no fewer.
    pub(crate) fn selects_exactly(
        &self,
        config: &LoraConfig,
        file: &AdapterFile,
    ) -> Result<(), LoraError> {
        let differ = |key: &str, selected: BTreeSet<&str>, stored: BTreeSet<&str>, is: &str| {
            let Some(name) = selected.symmetric_difference(&stored).next() else {
                return Ok(());
            };
            let is = |there: bool| {
                if there {
                    is.into()
                } else {
                    format!("not {is}")
                }
            };
            Err(LoraError::Disagrees {
                key: format!("{key} ({name})"),
                configured: is(selected.contains(name)),
                stored: is(stored.contains(name)),
            })
        };
        differ(
            "target_modules",
            self.targets(config)?.into_iter().collect(),
            file.modules().keys().map(String::as_str).collect(),
            "adapted",
        )?;
        let whole = self.whole(config)?;
        differ(
            "modules_to_save",
            whole.values().map(|p| p.key.as_str()).collect(),
            file.whole().keys().map(String::as_str).collect(),
            "saved",
        )
    }

    /// The parameters that a file holds in full, as the model lays them out.
    pub(crate) fn place_whole(
        &self,
        file: &AdapterFile,
    ) -> Result<BTreeMap<String, Whole>, LoraError> {
        let mut by_key: BTreeMap<&str, (&String, &Parameter)> = self
            .parameters
            .iter()
            .map(|(path, parameter)| (parameter.key.as_str(), (path, parameter)))
            .collect();
        file.whole()
            .iter()
            .map(|(key, tensor)| {
                let (path, parameter) =
                    by_key
                        .remove(key.as_str())
                        .ok_or_else(|| LoraError::Leftover {
                            key: key.clone(),
                            reason: "the model has no such parameter".into(),
                        })?;
                let site = parameter.whole_site();
                check_tensor(key.clone(), tensor, dense::file_shape(&site))?;
                let whole = Whole {
                    values: dense::from_file(&site, tensor),
                    site,
                    device: parameter.device.clone(),
                };
                Ok((path.clone(), whole))
            })
            .collect()
    }

    fn no_match(&self, pattern: &str) -> LoraError {
        let nearest = self
            .weights
            .keys()
            .max_by_key(|path| similarity(path, pattern))
            .filter(|path| similarity(path, pattern) > 0)
            .cloned();
        LoraError::NoMatch {
            pattern: pattern.into(),
            nearest,
        }
    }

    /// Checks one layer's factors against the weight they go to.
    pub(crate) fn place(&self, path: &str, module: ModuleAdapter) -> Result<Layer, LoraError> {
        let leftover = |reason: &str| LoraError::Leftover {
            key: format!("{path}.{}", module.factors.kind().parts()[0].name),
            reason: reason.into(),
        };
        let weight = self
            .weights
            .get(path)
            .ok_or_else(|| leftover("the model has no such layer"))?;
        let site = weight.site(path).ok_or_else(|| {
            leftover(&format!(
                "its layer cannot be adapted: {}",
                weight.refusal()
            ))
        })?;
        if module.embedding != (site.layout == WeightLayout::Table) {
            return Err(leftover(if module.embedding {
                "the layer is no embedding"
            } else {
                "an embedding needs `lora_embedding_A` and `lora_embedding_B`"
            }));
        }
        let (rank, inputs, outputs) = (module.spec.rank, site.inputs(), site.outputs());
        if module.factors.kind().peft_type().is_none() {
            return Err(leftover(
                "it is no product of smaller factors: add it to the base weight",
            ));
        }
        let found = module.factors.size(matrix_size);
        if module.factors.sides().is_some() && found != [outputs, inputs] {
            return Err(LoraError::Shape {
                key: format!("{path}.lokr_w1, lokr_w2 (their Kronecker product)"),
                expected: vec![outputs, inputs],
                found: found.to_vec(),
            });
        }
        for (part, tensor) in module.factors.iter() {
            let own = matrix_size(tensor);
            let axes = part.dims.iter().enumerate();
            let dims: Vec<usize> = axes
                .map(|(axis, dim)| match dim {
                    Dim::In => inputs,
                    Dim::Out => outputs,
                    Dim::Rank => rank,
                    Dim::Any | Dim::Outer => own[axis],
                })
                .collect();
            let expected = site.file_shape(part, &dims);
            check_tensor(format!("{path}.{}", part.name), tensor, expected)?;
        }
        Ok(Layer {
            site,
            module,
            device: weight.device.clone(),
            dtype: weight.dtype,
        })
    }
}

/// Checks shape and values of a tensor of a file.
fn check_tensor(key: String, tensor: &HostTensor, expected: Vec<usize>) -> Result<(), LoraError> {
    if tensor.shape != expected {
        return Err(LoraError::Shape {
            key,
            expected,
            found: tensor.shape.clone(),
        });
    }
    match tensor.first_non_finite() {
        Some(index) => Err(LoraError::NotFinite { key, index }),
        None => Ok(()),
    }
}

/// Length of the longest common suffix and prefix, in characters: enough to find a mistyped layer.
fn similarity(path: &str, pattern: &str) -> usize {
    let suffix = path
        .bytes()
        .rev()
        .zip(pattern.bytes().rev())
        .take_while(|(a, b)| a == b)
        .count();
    let last = |s: &str| s.rsplit('.').next().unwrap_or_default().to_string();
    let prefix = last(path)
        .bytes()
        .zip(last(pattern).bytes())
        .take_while(|(a, b)| a == b)
        .count();
    suffix + prefix
}

/// Rows and columns of a factor, whose kernel is flattened.
pub(crate) fn matrix_size(part: &HostTensor) -> [usize; 2] {
    let rows = part.shape.first().copied().unwrap_or(1);
    [rows, part.numel() / rows.max(1)]
}
