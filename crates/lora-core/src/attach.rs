//! Putting an adapter on a model: everything is checked first, then attached, then counted.
//!
//! Factors are born from their source, a seed or a file. There is no way to attach first and load later, so what is about to
//! be loaded can never be initialised over.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param, Reparameterizer};
use burn::tensor::{Device, Tensor, TensorData};

use crate::adapter::Adapter;
use crate::adapters::{Adapters, edit};
use crate::edit::{active_replacements, adapter_names};
use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::dense::{self, Whole};
use crate::kinds::factors::{Factor, Factors};
use crate::kinds::module::ModuleAdapter;
use crate::kinds::parts::{INITIAL_A, INITIAL_B, LORA_A, LORA_B, MAGNITUDE, Part};
use crate::kinds::spec::AdapterSpec;
use crate::kinds::{split, start};
use crate::ops::matmul;
use crate::peft::config::LoraConfig;
use crate::peft::file::AdapterFile;
use crate::random::name_hash;
use crate::scan::{Layer, Parameter, Scan, matrix_size};
use crate::site::{Site, WeightLayout};
use crate::state::{each_parameter, host_tensor};
use crate::walk::walk;

/// The name PEFT gives an adapter when none is asked for.
pub const DEFAULT_ADAPTER: &str = "default";

/// An adapter that is to be attached: [`LoraConfig::fresh`] or [`AdapterFile::stored`], and how.
#[derive(Debug, Clone)]
pub struct NewAdapter {
    name: String,
    source: Source,
    is_fast: bool,
}

#[derive(Debug, Clone)]
enum Source {
    Fresh(Box<LoraConfig>, u64),
    Stored(AdapterFile, Option<Box<LoraConfig>>),
}

impl LoraConfig {
    /// A new adapter whose factors are drawn from a seed, as `init_lora_weights` says.
    pub fn fresh(self, seed: u64) -> NewAdapter {
        NewAdapter::from(Source::Fresh(Box::new(self), seed))
    }
}

impl AdapterFile {
    /// This adapter: rank, alpha and layers are the file's.
    pub fn stored(self) -> NewAdapter {
        NewAdapter::from(Source::Stored(self, None))
    }
}

impl From<Source> for NewAdapter {
    fn from(source: Source) -> Self {
        Self {
            name: DEFAULT_ADAPTER.into(),
            source,
            is_fast: false,
        }
    }
}

impl NewAdapter {
    /// Under another name than [`DEFAULT_ADAPTER`].
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// For a model that computes its layers through [`linear`](crate::linear): then dropout and `lora_bias` can be.
    ///
    /// Every other model reads its weights through `Param::val()`, where they cannot exist.
    #[must_use]
    pub fn fast(mut self) -> Self {
        self.is_fast = true;
        self
    }

    /// Refuses a stored adapter that `config` does not describe; a fresh one has its own configuration.
    #[must_use]
    pub fn agreeing_with(mut self, config: &LoraConfig) -> Self {
        if let Source::Stored(_, expected) = &mut self.source {
            *expected = Some(Box::new(config.clone()));
        }
        self
    }
}

/// Attaches an adapter: it is active, with weight 1, and trained. Base weights stop requiring gradients; other adapters stay
/// as they are, active ones too.
///
/// # Errors
/// A pattern that matches nothing, an invalid configuration, a tensor of the file that is missing, left over or of the
/// wrong shape, a file and configuration that disagree, a name that is taken, a parameter that carries another library's
/// reparameterization.
pub fn attach<M: Module>(model: M, adapter: NewAdapter) -> Result<M, LoraError> {
    Plan::decide(&model, adapter, true)?.apply(model)
}

/// The layers that `config` adapts on `model`, each with its inputs and outputs. No weight is read, so a model that is not
/// loaded will do.
///
/// # Errors
/// A pattern that matches nothing, a layer that cannot be adapted in this way or whose size does not allow the rank.
pub fn targeted<M: Module>(
    model: &M,
    config: &LoraConfig,
) -> Result<BTreeMap<String, [usize; 2]>, LoraError> {
    config.validate()?;
    let scan = Scan::of(model);
    let mut layers = BTreeMap::new();
    for path in scan.targets(config)? {
        if let Some(site) = scan.weights[path].site(path) {
            start::check(config, &site)?;
            layers.insert(path.to_string(), [site.inputs(), site.outputs()]);
        }
    }
    Ok(layers)
}

/// The parameters that `config` trains in full on `model` (`modules_to_save`, `bias`), by path, each with how many numbers it has.
/// No weight is read.
///
/// # Errors
/// As [`targeted`]; an entry of `modules_to_save` that names no module, or a layer that is adapted as well.
pub fn trained_in_full<M: Module>(
    model: &M,
    config: &LoraConfig,
) -> Result<BTreeMap<String, usize>, LoraError> {
    config.validate()?;
    let scan = Scan::of(model);
    let whole = scan.whole(config)?.into_iter();
    let count = |parameter: &Parameter| parameter.whole_site().shape.iter().product();
    Ok(whole
        .map(|(path, parameter)| (path.to_string(), count(parameter)))
        .collect())
}

/// A checked decision which layers of a model get which factors: [`attach`] in two steps.
#[derive(Debug)]
pub struct Plan {
    name: String,
    layers: BTreeMap<String, Layer>,
    magnitudes: BTreeMap<String, HostTensor>,
    whole: BTreeMap<String, Whole>,
}

impl Plan {
    /// Decides where `adapter` goes on `model`, which stays as it is: nothing lazy is made, unless factors start from the
    /// weights (`pissa`, `olora`, DoRA).
    ///
    /// # Errors
    /// As [`attach`].
    pub fn new<M: Module>(model: &M, adapter: NewAdapter) -> Result<Self, LoraError> {
        Self::decide(model, adapter, false)
    }

    /// `settles`: shapes are those of the values, also where that makes a lazy weight.
    fn decide<M: Module>(model: &M, adapter: NewAdapter, settles: bool) -> Result<Self, LoraError> {
        let NewAdapter {
            name,
            source,
            is_fast,
        } = adapter;
        if name.is_empty() || name.contains('.') {
            return Err(LoraError::Config(format!(
                "adapter name `{name}` must be non-empty and without dots"
            )));
        }
        check_name(model, &name)?;
        let mut scan = Scan::of(model);
        let (modules, whole) = match source {
            Source::Fresh(config, seed) => {
                config.validate()?;
                let targets = scan.targets(&config)?.into_iter();
                let mut wanted: BTreeSet<String> = targets.map(|t| format!("{t}.weight")).collect();
                wanted.extend(scan.whole(&config)?.into_keys().map(String::from));
                scan.settle(model, |path| settles && wanted.contains(path));
                let whole = scan.whole(&config)?;
                let modules = fresh(model, &scan, &config, seed)?;
                (modules, own_values(model, &whole))
            }
            Source::Stored(file, config) => {
                if let Some(config) = config {
                    config.validate()?;
                    file.agrees_with(&config)?;
                    scan.selects_exactly(&config, &file)?;
                }
                scan.settle(model, |path| {
                    let layer = path.strip_suffix(".weight").unwrap_or(path);
                    settles
                        && (file.modules().contains_key(layer) || file.whole().contains_key(path))
                });
                let whole = scan.place_whole(&file)?;
                (file.into_modules(), whole)
            }
        };
        let layers = modules
            .into_iter()
            .map(|(layer, module)| {
                scan.place(&layer, module)
                    .map(|placed| (format!("{layer}.weight"), placed))
            })
            .collect::<Result<BTreeMap<_, _>, _>>()?;
        if layers.is_empty() {
            return Err(LoraError::Config("the adapter file holds no layer".into()));
        }
        for (parameter, placed) in &layers {
            placed.check_path(parameter, is_fast)?;
        }
        for parameter in layers.keys().chain(whole.keys()) {
            scan.check_free(parameter)?;
        }
        let replaced = active_replacements(model);
        if let Some((parameter, other)) = replaced.iter().find(|(p, _)| whole.contains_key(*p)) {
            return Err(LoraError::Config(format!(
                "adapter `{other}` trains `{parameter}` in full as well; switch it off with `set_adapters` or delete it first"
            )));
        }
        let lacking = layers.iter().filter(|(_, layer)| layer.lacks_magnitude());
        let lacking: BTreeMap<&str, &Layer> = lacking.map(|(p, l)| (p.as_str(), l)).collect();
        let magnitudes = match lacking.is_empty() {
            true => BTreeMap::new(),
            false => initial_magnitudes(model, &lacking),
        };
        Ok(Self {
            name,
            layers,
            magnitudes,
            whole,
        })
    }

    /// Paths of the layers that get an adapter, sorted.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.layers
            .keys()
            .map(|path| path.strip_suffix(".weight").unwrap_or(path))
    }

    /// The adapter as a file has it right after it was attached; `config` is the one it was made with, where known.
    pub fn file(&self, config: Option<&LoraConfig>) -> AdapterFile {
        let modules = self.layers.iter().map(|(path, layer)| {
            let mut module = layer.module.clone();
            if let Some(magnitude) = self.magnitudes.get(path) {
                let shape = layer.site.file_shape(MAGNITUDE, &magnitude.shape);
                let magnitude = HostTensor {
                    shape,
                    ..magnitude.clone()
                };
                module.factors = module.factors.with(MAGNITUDE, magnitude);
            }
            (layer.site.key.clone(), module)
        });
        let whole = self.whole.values().map(|whole| {
            let values = HostTensor::from_f32([whole.values.len()], &whole.values);
            (whole.site.key.clone(), dense::to_file(&whole.site, &values))
        });
        AdapterFile::of_parts(modules.collect(), whole.collect(), config)
    }

    /// Attaches what was decided; `model` is the one that it was decided for.
    ///
    /// # Errors
    /// Another model: one without a planned parameter, or with one of another shape, or with an adapter of this name.
    pub fn apply<M: Module>(self, model: M) -> Result<M, LoraError> {
        let another = |parameter: &str, problem: &str| {
            Err(LoraError::Config(format!(
                "adapter `{}` was planned for another model: `{parameter}` {problem}",
                self.name
            )))
        };
        check_name(&model, &self.name)?;
        let mut scan = Scan::of(&model);
        scan.settle(&model, |path| {
            self.layers.contains_key(path) || self.whole.contains_key(path)
        });
        let layers = self.layers.iter().map(|(path, layer)| (path, &layer.site));
        let whole = self.whole.iter().map(|(path, whole)| (path, &whole.site));
        for (path, site) in layers.chain(whole) {
            if !scan.has(path, site) {
                return another(path, "is not there in the shape that was planned for");
            }
            scan.check_free(path)?;
        }
        let (mut occupied, mut attached) = (BTreeSet::new(), BTreeSet::new());
        let model = edit(model, |path, mut adapters| {
            occupied.insert(path.to_string());
            if let Some(adapter) = self.adapter(path) {
                attached.insert(path.to_string());
                adapters.adapters.push(adapter);
            }
            adapters
        });
        let model = model.apply_reparameterization(Apply {
            plan: &self,
            occupied: &occupied,
            attached: &mut attached,
        });
        let planned = self.layers.keys().chain(self.whole.keys());
        match planned.into_iter().find(|path| !attached.contains(*path)) {
            None => Ok(model),
            Some(path) => another(path, "was not reached"),
        }
    }

    /// What goes onto the parameter at `path`.
    fn adapter(&self, path: &str) -> Option<Adapter> {
        let new = |spec, site: &Site, split, factors| Adapter {
            name: self.name.clone(),
            spec,
            site: site.clone(),
            split,
            weight: 1.0,
            active: true,
            stream: name_hash(&format!("{path}.{}", self.name)),
            factors,
        };
        if let Some(whole) = self.whole.get(path) {
            let spec = AdapterSpec {
                rank: 1,
                alpha: 1.0,
                use_rslora: false,
                dropout: 0.0,
            };
            let data = TensorData::new(whole.values.clone(), [whole.values.len()]);
            let value = Factor::Vector(Param::from_data(data, &whole.device));
            return Some(new(spec, &whole.site, None, Factors::whole(value)));
        }
        let layer = self.layers.get(path)?;
        let mut factors = layer.module.factors.as_ref();
        if let Some(magnitude) = self.magnitudes.get(path) {
            factors = factors.with(MAGNITUDE, magnitude);
        }
        let factors = factors.map(|part, tensor| to_model(part, tensor, &layer.device));
        Some(new(
            layer.module.spec,
            &layer.site,
            layer.module.split,
            factors,
        ))
    }
}

/// A part of a file's factors as a model holds it.
fn to_model(part: Part, tensor: &HostTensor, device: &Device) -> Factor {
    let factor = match part.is_vector() {
        true => {
            let data = TensorData::new(tensor.to_f32(), [tensor.numel()]);
            Factor::Vector(Param::from_data(data, device))
        }
        false => {
            let data = TensorData::new(tensor.to_f32(), matrix_size(tensor));
            Factor::Matrix(Param::from_data(data, device))
        }
    };
    match part.trained {
        true => factor,
        false => factor.set_require_grad(false),
    }
}

/// Refuses a second adapter of the same name.
fn check_name<M: Module>(model: &M, name: &str) -> Result<(), LoraError> {
    match adapter_names(model).iter().any(|attached| attached == name) {
        false => Ok(()),
        true => Err(LoraError::Config(format!(
            "an adapter named `{name}` is already attached"
        ))),
    }
}

/// Puts adapters on parameters that have none yet, and freezes everything that is not a factor of ours.
struct Apply<'a> {
    plan: &'a Plan,
    /// Paths of parameters that have adapters already: Burn would discard a second reparameterization.
    occupied: &'a BTreeSet<String>,
    attached: &'a mut BTreeSet<String>,
}

impl Reparameterizer for Apply<'_> {
    type Reparam = Adapters;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Adapters>) {
        // Nothing but its adapters is below a parameter.
        let mut above = path.match_indices('.').map(|(end, _)| &path[..end]);
        if above.any(|above| self.occupied.contains(above)) {
            return (param, None);
        }
        let param = param.set_require_grad(false);
        if self.occupied.contains(path) {
            return (param, None);
        }
        let adapter = self.plan.adapter(path);
        if adapter.is_some() {
            self.attached.insert(path.into());
        }
        let adapters = adapter.map(|adapter| Adapters {
            adapters: vec![adapter],
            frozen: None,
        });
        (param, adapters)
    }
}

/// Fresh factors for every target.
fn fresh<M: Module>(
    model: &M,
    scan: &Scan,
    config: &LoraConfig,
    seed: u64,
) -> Result<BTreeMap<String, ModuleAdapter>, LoraError> {
    let targets = scan.targets(config)?;
    let sites: Vec<Site> = targets
        .iter()
        .filter_map(|path| scan.weights[*path].site(path))
        .collect();
    for site in &sites {
        start::check(config, site)?;
    }
    let mut split = match config.init_lora_weights.splits_base() {
        true => split::split_off(model, config, &targets, seed)?,
        false => BTreeMap::new(),
    };
    let fresh = |site: &Site| {
        let split = split.remove(&site.key);
        let module = start::fresh(site, config, seed, split)?;
        Ok((site.key.clone(), module))
    };
    sites.iter().map(fresh).collect()
}

/// DoRA starts from the norms of the weight as it is: `‖W + scale B A‖` over the inputs, with B zero `‖W‖`.
fn initial_magnitudes<M: Module>(
    model: &M,
    layers: &BTreeMap<&str, &Layer>,
) -> BTreeMap<String, HostTensor> {
    let mut norms = BTreeMap::new();
    walk(model, |found| {
        let path = found.path();
        let Some(Layer { site, module, .. }) = layers.get(path.as_str()) else {
            return;
        };
        let factors = &module.factors;
        let (Some(a), Some(b)) = (factors.get(LORA_A), factors.get(LORA_B)) else {
            return;
        };
        let (values, shape) = found.values();
        let weight: Tensor<2> = values.reshape([shape[0] as i32, -1]);
        let weight = match site.layout {
            WeightLayout::InOut | WeightLayout::Table => weight,
            WeightLayout::OutIn => weight.transpose(),
        };
        let device = weight.device();
        let factor = |t: &HostTensor| {
            Tensor::<2>::from_data(TensorData::new(t.to_f32(), matrix_size(t)), &device)
        };
        let mut delta = matmul(factor(b), factor(a));
        if let (Some(a), Some(b)) = (factors.get(INITIAL_A), factors.get(INITIAL_B)) {
            delta = delta - matmul(factor(b), factor(a));
        }
        let delta = delta.mul_scalar(module.spec.scale());
        let norm = (weight.cast(delta.dtype()) + delta.transpose())
            .square()
            .sum_dim(0)
            .sqrt();
        norms.insert(path, host_tensor(norm.flatten::<1>(0, 1)));
    });
    norms
}

/// The values that parameters have now.
fn own_values<M: Module>(
    model: &M,
    wanted: &BTreeMap<&str, &Parameter>,
) -> BTreeMap<String, Whole> {
    let mut found = BTreeMap::new();
    each_parameter(
        model,
        |path| wanted.contains_key(path),
        |path, values| {
            if let Some(parameter) = wanted.get(path.as_str()) {
                let whole = Whole {
                    site: parameter.whole_site(),
                    values: values.to_f32(),
                    device: parameter.device.clone(),
                };
                found.insert(path, whole);
            }
        },
    );
    found
}
