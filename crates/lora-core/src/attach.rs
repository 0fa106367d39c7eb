//! Putting an adapter on a model, in two steps: a [`Plan`] that can fail and changes nothing, and [`Plan::apply`], which
//! cannot fail.
//!
//! Factors are born from their [`AdapterSource`]. There is no way to attach first and load later, so what is about to be
//! loaded can never be initialised over.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleVisitor, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::adapter::{Adapter, Lora};
use crate::edit::{active_replacements, adapter_names, edit};
use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::dense::{self, Whole};
use crate::kinds::factors::{Factor, Factors};
use crate::kinds::module::{AdapterSpec, ModuleAdapter};
use crate::kinds::parts::{Dim, INITIAL_A, INITIAL_B, LORA_A, LORA_B, MAGNITUDE, Part};
use crate::kinds::{split, start};
use crate::peft::config::{LoraConfig, Targets, TrainBias};
use crate::peft::file::AdapterFile;
use crate::peft::selection::{LayerFilter, is_saved, keeps_adapters_off};
use crate::random::name_hash;
use crate::site::{Site, WeightLayout};
use crate::state::{each_parameter, host};

/// The name PEFT gives an adapter when none is asked for.
pub const DEFAULT_ADAPTER: &str = "default";

/// Where the factors come from.
#[derive(Debug, Clone)]
pub enum AdapterSource {
    /// Drawn from a seed, as `init_lora_weights` says.
    Fresh {
        /// Seed of the run.
        seed: u64,
    },
    /// Read from a file: rank, alpha and layers are the file's; the configuration must not disagree.
    File(AdapterFile),
}

/// How the model computes its adapted layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardPath {
    /// Through `Param::val()`, as every unedited Burn model does: dropout and `lora_bias` cannot exist there.
    Dense,
    /// Through [`linear`](crate::linear) in every adapted layer.
    Fast,
}

/// A checked decision which layers get which factors.
#[derive(Debug)]
pub struct Plan {
    name: String,
    layers: BTreeMap<String, Layer>,
    magnitudes: BTreeMap<String, HostTensor>,
    whole: BTreeMap<String, Whole>,
    occupied: BTreeSet<String>,
}

#[derive(Debug)]
struct Layer {
    site: Site,
    module: ModuleAdapter,
    device: Device,
}

impl Plan {
    /// Decides where adapter `name` goes on `model` and takes its factors from `source`.
    ///
    /// With a file, `config` may be `None`; if given, it must agree with the file.
    ///
    /// # Errors
    /// A pattern that matches nothing, an invalid configuration, a tensor of the file that is missing, left over or of the
    /// wrong shape, a file and configuration that disagree, a name that is taken.
    pub fn new<M: Module>(
        model: &M,
        name: &str,
        config: Option<&LoraConfig>,
        source: AdapterSource,
        path: ForwardPath,
    ) -> Result<Self, LoraError> {
        if name.is_empty() || name.contains('.') {
            return Err(LoraError::Config(format!(
                "adapter name `{name}` must be non-empty and without dots"
            )));
        }
        if adapter_names(model).iter().any(|attached| attached == name) {
            return Err(LoraError::Config(format!(
                "an adapter named `{name}` is already attached"
            )));
        }
        if let Some(config) = config {
            config.validate()?;
        }
        let mut scan = Scan::default();
        model.visit(&mut scan);
        let (modules, whole) = match source {
            AdapterSource::Fresh { seed } => {
                let config = config.ok_or_else(|| {
                    LoraError::Config("a fresh adapter needs a configuration".into())
                })?;
                let whole = scan.whole(config)?;
                let modules = fresh(model, &scan, config, seed)?;
                (modules, own_values(model, &whole))
            }
            AdapterSource::File(file) => {
                if let Some(config) = config {
                    file.agrees_with(config)?;
                    scan.selects_exactly(config, &file)?;
                }
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
        for (layer, placed) in &layers {
            placed.check_path(layer, path)?;
        }
        let replaced = active_replacements(model);
        if let Some((parameter, other)) = replaced.iter().find(|(p, _)| whole.contains_key(*p)) {
            return Err(LoraError::Config(format!(
                "adapter `{other}` trains `{parameter}` in full as well; switch it off with `set_adapters` or delete it first"
            )));
        }
        let mut plan = Self {
            name: name.into(),
            layers,
            magnitudes: BTreeMap::new(),
            whole,
            occupied: scan.occupied,
        };
        if plan.layers.values().any(|layer| layer.lacks_magnitude()) {
            plan.magnitudes = initial_magnitudes(model, &plan.layers);
        }
        Ok(plan)
    }

    /// Paths of the layers that get an adapter, sorted.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.layers
            .keys()
            .map(|path| path.strip_suffix(".weight").unwrap_or(path))
    }

    /// Attaches: the new adapter is active, with weight 1, and trained. Base weights stop requiring gradients; other adapters
    /// stay as they are, active ones too.
    pub fn apply<M: Module>(self, model: M) -> M {
        let model = model.apply_reparameterization(&self);
        if self.occupied.is_empty() {
            return model;
        }
        edit(model, move |path, mut lora: Lora| {
            if self.occupied.contains(path) {
                lora.adapters.extend(self.adapter(path));
            }
            lora
        })
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

/// Rows and columns of a factor, whose kernel is flattened.
fn matrix_size(part: &HostTensor) -> [usize; 2] {
    let rows = part.shape.first().copied().unwrap_or(1);
    [rows, part.numel() / rows.max(1)]
}

impl Layer {
    /// Whether its DoRA still has to look at the base weight.
    fn lacks_magnitude(&self) -> bool {
        self.module.use_dora && self.module.factors.get(MAGNITUDE).is_none()
    }

    /// Refuses what the way in which the model computes the layer cannot do.
    fn check_path(&self, layer: &str, path: ForwardPath) -> Result<(), LoraError> {
        let fast = path == ForwardPath::Fast && self.site.layout == WeightLayout::InOut;
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

impl Reparameterizer for &Plan {
    type Reparam = Lora;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Lora>) {
        if path.split('.').any(|part| part == Lora::NAME) {
            return (param, None); // a factor of an adapter that is already there
        }
        let param = param.set_require_grad(false);
        let adapter = match self.occupied.contains(path) {
            true => None,
            false => self.adapter(path),
        };
        let lora = adapter.map(|adapter| Lora {
            adapters: vec![adapter],
        });
        (param, lora)
    }
}

/// Paths, shapes and owners of a model's parameters, and where adapters already sit.
#[derive(Default)]
struct Scan {
    path: Vec<String>,
    owner: Vec<String>,
    /// By the path of the layer that has them as `weight`.
    weights: BTreeMap<String, Parameter>,
    /// By their own path.
    parameters: BTreeMap<String, Parameter>,
    occupied: BTreeSet<String>,
}

#[derive(Clone)]
struct Parameter {
    shape: Vec<usize>,
    owner: String,
    /// As PyTorch calls it: `norm.weight` where Burn says `norm.gamma`.
    key: String,
    device: Device,
    /// Where it has one yet; else it will be the device's default.
    dtype: Option<DType>,
}

impl Parameter {
    fn is_linear(&self) -> bool {
        self.owner == "Struct:Linear"
    }

    /// Where an adapter of the layer `path` would sit, if its weight can be adapted.
    fn site(&self, path: &str) -> Option<Site> {
        let layout = match (self.owner.as_str(), self.shape.len()) {
            ("Struct:Conv1d" | "Struct:Conv2d" | "Struct:Conv3d", 3..) => WeightLayout::OutIn,
            ("Struct:Embedding", 2) => WeightLayout::Table,
            (_, 2) => WeightLayout::InOut,
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

    /// The parameter itself, to be trained in full.
    fn whole_site(&self) -> Site {
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

impl ModuleVisitor for Scan {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == "Reparameterization" {
            self.occupied.insert(self.path.join("."));
        }
        self.path.push(name.into());
        self.owner.push(container.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
        self.owner.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.owner.iter().any(|owner| owner == "Reparameterization") {
            return;
        }
        let [module @ .., last] = self.path.as_slice() else {
            return;
        };
        let (layer, owner) = (
            module.join("."),
            self.owner.last().cloned().unwrap_or_default(),
        );
        let name = match (owner.ends_with("Norm"), last.as_str()) {
            (true, "gamma") => "weight",
            (true, "beta") => "bias",
            (_, name) => name,
        };
        let parameter = Parameter {
            shape: param.lazy_shape().to_vec(),
            key: [module.to_vec(), vec![name.into()]].concat().join("."),
            device: param.lazy_device(),
            dtype: param.is_initialized().then(|| param.base().dtype()),
            owner,
        };
        if last == "weight" {
            self.weights.insert(layer, parameter.clone());
        }
        self.parameters.insert(self.path.join("."), parameter);
    }
}

impl Scan {
    /// Layers that `config` selects.
    fn targets(&self, config: &LoraConfig) -> Result<Vec<&str>, LoraError> {
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
                if !self.weights.iter().any(|(path, w)| {
                    w.is_adaptable() && crate::peft::config::is_suffix(path, entry)
                }) {
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
    fn whole(&self, config: &LoraConfig) -> Result<BTreeMap<&str, &Parameter>, LoraError> {
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
    fn selects_exactly(&self, config: &LoraConfig, file: &AdapterFile) -> Result<(), LoraError> {
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
    fn place_whole(&self, file: &AdapterFile) -> Result<BTreeMap<String, Whole>, LoraError> {
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
    fn place(&self, path: &str, module: ModuleAdapter) -> Result<Layer, LoraError> {
        let leftover = |reason: &str| LoraError::Leftover {
            key: format!("{path}.{}", module.factors.kind().parts()[0].name),
            reason: reason.into(),
        };
        let weight = self
            .weights
            .get(path)
            .ok_or_else(|| leftover("the model has no such layer"))?;
        if let Some(dtype) = weight.dtype.filter(|dtype| *dtype != DType::F32) {
            return Err(leftover(&format!(
                "the layer's weight is {dtype:?}, and adapters need F32: load the model as f32"
            )));
        }
        let site = weight.site(path).ok_or_else(|| {
            leftover(&format!(
                "a weight of shape {:?} cannot be adapted",
                weight.shape
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
                    Dim::Any => own[axis],
                })
                .collect();
            let expected = site.file_shape(part, &dims);
            check_tensor(format!("{path}.{}", part.name), tensor, expected)?;
        }
        Ok(Layer {
            site,
            module,
            device: weight.device.clone(),
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
    let mut scan = Scan::default();
    model.visit(&mut scan);
    let mut layers = BTreeMap::new();
    for path in scan.targets(config)? {
        if let Some(site) = scan.weights[path].site(path) {
            start::check(config, &site)?;
            layers.insert(path.to_string(), [site.inputs(), site.outputs()]);
        }
    }
    Ok(layers)
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
    layers: &BTreeMap<String, Layer>,
) -> BTreeMap<String, HostTensor> {
    struct Norms<'a> {
        path: Vec<String>,
        layers: &'a BTreeMap<String, Layer>,
        norms: BTreeMap<String, HostTensor>,
    }
    impl ModuleVisitor for Norms<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.path.join(".");
            let Some(Layer { site, module, .. }) = self.layers.get(&path) else {
                return;
            };
            let factors = &module.factors;
            let (Some(a), Some(b)) = (factors.get(LORA_A), factors.get(LORA_B)) else {
                return;
            };
            let base = param.base();
            let rows = base.dims()[0] as i32;
            let weight: Tensor<2> = match site.layout {
                WeightLayout::InOut | WeightLayout::Table => base.reshape([rows, -1]),
                WeightLayout::OutIn => base.reshape([rows, -1]).transpose(),
            };
            let device = weight.device();
            let factor = |t: &HostTensor| {
                Tensor::<2>::from_data(TensorData::new(t.to_f32(), matrix_size(t)), &device)
            };
            let mut delta = factor(b).matmul(factor(a));
            if let (Some(a), Some(b)) = (factors.get(INITIAL_A), factors.get(INITIAL_B)) {
                delta = delta - factor(b).matmul(factor(a));
            }
            let delta = delta.mul_scalar(module.spec.scale());
            let norm = (weight + delta.transpose()).square().sum_dim(0).sqrt();
            self.norms.insert(path, host(norm.flatten::<1>(0, 1)));
        }
    }
    let mut norms = Norms {
        path: Vec::new(),
        layers,
        norms: BTreeMap::new(),
    };
    model.visit(&mut norms);
    norms.norms
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
