//! Putting an adapter on a model, in two steps: a [`Plan`] that can fail and changes nothing, and [`Plan::apply`], which
//! cannot fail.
//!
//! Factors are born from their [`AdapterSource`]. There is no way to attach first and load later, so what is about to be
//! loaded can never be initialised over.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleVisitor, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::adapter::{Adapter, AdapterSpec, Lora};
use crate::edit::{active_replacements, adapter_names, edit};
use crate::error::LoraError;
use crate::files::host::HostTensor;
use crate::kinds::factors::{
    Factors, INITIAL_A, INITIAL_B, LORA_A, LORA_B, LORA_BIAS, LoraFactors, MAGNITUDE, MapParts,
    Side,
};
use crate::kinds::lycoris;
use crate::kinds::split;
use crate::peft::config::{InitLoraWeights, LoraConfig, PeftType, Targets, TrainBias};
use crate::peft::file::{AdapterFile, ModuleAdapter};
use crate::peft::selection::{LayerFilter, is_saved, keeps_adapters_off};
use crate::random::{Stream, name_hash};
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

/// A parameter that is trained in full: its first values, as the model lays them out.
#[derive(Debug)]
struct Whole {
    site: Site,
    values: Vec<f32>,
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
        if plan
            .layers
            .values()
            .any(|layer| layer.module.use_dora && !layer.module.has_magnitude())
        {
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
        let new = |spec, site: &Site, factors| Adapter {
            name: self.name.clone(),
            spec,
            site: site.clone(),
            weight: 1.0,
            active: true,
            stream: name_hash(&format!("{path}.{}", self.name)),
            factors,
        };
        if let Some(Whole {
            site,
            values,
            device,
        }) = self.whole.get(path)
        {
            let spec = AdapterSpec {
                rank: 1,
                alpha: 1.0,
                use_rslora: false,
                dropout: 0.0,
            };
            let data = TensorData::new(values.clone(), [values.len()]);
            return Some(new(
                spec,
                site,
                Factors::Whole(Param::from_data(data, device)),
            ));
        }
        let Layer {
            site,
            module,
            device,
        } = self.layers.get(path)?;
        let mut factors = module.factors.as_ref();
        if let Factors::Lora(lora) = &mut factors {
            lora.magnitude = lora.magnitude.or_else(|| self.magnitudes.get(path));
        }
        Some(new(module.spec, site, factors.map(&mut ToModel(device))))
    }
}

/// Parts of a file's factors to what a model holds.
struct ToModel<'a>(&'a Device);

impl MapParts<&HostTensor, &HostTensor> for ToModel<'_> {
    type Matrix = Param<Tensor<2>>;
    type Vector = Param<Tensor<1>>;
    fn matrix(&mut self, name: &'static str, part: &HostTensor) -> Param<Tensor<2>> {
        let data = TensorData::new(part.to_f32(), matrix_size(part));
        let param = Param::from_data(data, self.0);
        match name {
            INITIAL_A | INITIAL_B => param.set_require_grad(false),
            _ => param,
        }
    }
    fn vector(&mut self, _: &'static str, part: &HostTensor) -> Param<Tensor<1>> {
        Param::from_data(TensorData::new(part.to_f32(), [part.numel()]), self.0)
    }
}

/// Rows and columns of a factor, whose kernel is flattened.
fn matrix_size(part: &HostTensor) -> [usize; 2] {
    let rows = part.shape.first().copied().unwrap_or(1);
    [rows, part.numel() / rows.max(1)]
}

impl Layer {
    /// Refuses what the way in which the model computes the layer cannot do.
    fn check_path(&self, layer: &str, path: ForwardPath) -> Result<(), LoraError> {
        let fast = path == ForwardPath::Fast && self.site.layout == WeightLayout::InOut;
        // PEFT's embeddings know no dropout.
        if self.module.spec.dropout > 0.0 && !fast && self.site.layout != WeightLayout::Table {
            return Err(LoraError::Config(format!(
                "`lora_dropout` needs a model that computes its layers with `lora_core::linear`, which `{layer}` is not; set it to 0"
            )));
        }
        let has_bias = self
            .module
            .as_lora()
            .is_some_and(|lora| lora.bias.is_some());
        if has_bias && !fast {
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
                let mut expected = site.shape.clone();
                if site.layout == WeightLayout::InOut {
                    expected.reverse();
                }
                check_tensor(key.clone(), tensor, expected)?;
                let values = tensor.to_f32();
                let values = match (site.layout, tensor.shape.as_slice()) {
                    (WeightLayout::InOut, &[rows, columns]) => (0..columns)
                        .flat_map(|c| (0..rows).map(move |r| r * columns + c))
                        .map(|at| values[at])
                        .collect(),
                    _ => values,
                };
                let device = parameter.device.clone();
                Ok((
                    path.clone(),
                    Whole {
                        site,
                        values,
                        device,
                    },
                ))
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
            key: format!("{path}.{}", module.factors.parts()[0].0),
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
        let expect = |name: &str, tensor: &HostTensor, dims: &[usize]| {
            let expected = site.file_shape(name, dims);
            check_tensor(format!("{path}.{name}"), tensor, expected)
        };
        match &module.factors {
            Factors::Lokr { w1, w2 } => {
                let size = |side: &Side<HostTensor>| match side {
                    Side::Full(full) => matrix_size(full),
                    Side::Product(left, right) => [matrix_size(left)[0], matrix_size(right)[1]],
                };
                let ([a, b], [c, d]) = (size(w1), size(w2));
                if (a.saturating_mul(c), b.saturating_mul(d)) != (outputs, inputs) {
                    return Err(LoraError::Shape {
                        key: format!("{path}.lokr_w1, lokr_w2 (their Kronecker product)"),
                        expected: vec![outputs, inputs],
                        found: vec![a.saturating_mul(c), b.saturating_mul(d)],
                    });
                }
                for (name, tensor) in module.factors.parts() {
                    let [rows, columns] = matrix_size(tensor);
                    let dims = match name {
                        "lokr_w1_a" | "lokr_w2_a" => [rows, rank],
                        "lokr_w1_b" | "lokr_w2_b" => [rank, columns],
                        _ => [rows, columns],
                    };
                    expect(name, tensor, &dims)?;
                }
            }
            factors => {
                for (name, tensor) in factors.parts() {
                    let dims: &[usize] = match name {
                        LORA_A | INITIAL_A | "hada_w1_b" | "hada_w2_b" => &[rank, inputs],
                        MAGNITUDE | LORA_BIAS => &[outputs],
                        _ => &[outputs, rank],
                    };
                    expect(name, tensor, dims)?;
                }
            }
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

/// Fresh factors for every target.
fn fresh<M: Module>(
    model: &M,
    scan: &Scan,
    config: &LoraConfig,
    seed: u64,
) -> Result<BTreeMap<String, ModuleAdapter>, LoraError> {
    let init = config.init_lora_weights;
    let targets = scan.targets(config)?;
    for site in targets
        .iter()
        .filter_map(|path| scan.weights[*path].site(path))
    {
        split::check(config, &site)?;
    }
    let mut initials = match init.splits_base() {
        true => split::split_off(model, config, &targets, seed)?,
        false => BTreeMap::new(),
    };
    let mut modules = BTreeMap::new();
    for path in targets {
        let (rank, alpha) = config.resolve(path)?;
        let Some(site) = scan.weights[path].site(path) else {
            continue;
        };
        let (inputs, outputs, embedding) = (
            site.inputs(),
            site.outputs(),
            site.layout == WeightLayout::Table,
        );
        let spec = AdapterSpec {
            rank,
            alpha,
            use_rslora: config.use_rslora,
            dropout: config.lora_dropout,
        };
        if config.peft_type != PeftType::Lora {
            if embedding {
                return Err(LoraError::Config(format!(
                    "`{path}` is an embedding, which `peft_type` {} does not adapt",
                    config.peft_type
                )));
            }
            let module = ModuleAdapter {
                spec,
                factors: lycoris::fresh(&site, rank, config, seed),
                use_dora: false,
                embedding,
            };
            modules.insert(path.to_string(), module);
            continue;
        }
        if embedding && config.lora_bias {
            return Err(LoraError::Config(format!(
                "`{path}` is an embedding, which `lora_bias` does not adapt"
            )));
        }
        let layer = name_hash(path);
        let uniform = |name: &str, n: usize, bound: f64| -> Vec<f32> {
            let mut stream = Stream::new(seed, name, 0, layer);
            (0..n)
                .map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32)
                .collect()
        };
        let normal = |name: &str, n: usize| Stream::new(seed, name, 0, layer).normals(n);
        let initial = initials.remove(path);
        let a = || match init {
            // PEFT starts embeddings the other way round: A zero, B standard normal.
            InitLoraWeights::Random if embedding => normal("init_lora_a", rank * inputs),
            _ if embedding => vec![0.0; rank * inputs],
            InitLoraWeights::Gaussian => {
                let mut stream = Stream::new(seed, "init_lora_a", 0, layer);
                stream
                    .normals(rank * inputs)
                    .into_iter()
                    .map(|v| v / rank as f32)
                    .collect()
            }
            _ => uniform("init_lora_a", rank * inputs, 1.0 / (inputs as f64).sqrt()),
        };
        let b = || match init {
            _ if embedding => normal("init_lora_b", outputs * rank),
            InitLoraWeights::Random => {
                uniform("init_lora_b", outputs * rank, 1.0 / (rank as f64).sqrt())
            }
            _ => vec![0.0; outputs * rank],
        };
        let (a, b) = match (init, &initial) {
            (_, Some(initial)) => (initial.lora_a.to_f32(), initial.lora_b.to_f32()),
            (InitLoraWeights::Orthogonal, _) => split::orthogonal(&site, rank, seed),
            _ => (a(), b()),
        };
        let lora_a = HostTensor::from_f32(site.file_shape(LORA_A, &[rank, inputs]), &a);
        let lora_b = HostTensor::from_f32(site.file_shape(LORA_B, &[outputs, rank]), &b);
        let module = ModuleAdapter {
            spec,
            factors: Factors::Lora(LoraFactors {
                lora_a,
                lora_b,
                magnitude: None,
                bias: config
                    .lora_bias
                    .then(|| HostTensor::from_f32([outputs], &vec![0.0; outputs])),
                initial,
            }),
            use_dora: config.use_dora,
            embedding,
        };
        modules.insert(path.to_string(), module);
    }
    Ok(modules)
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
            let Some(lora) = module.as_lora() else {
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
            let mut delta = factor(&lora.lora_b).matmul(factor(&lora.lora_a));
            if let Some(initial) = &lora.initial {
                delta = delta - factor(&initial.lora_b).matmul(factor(&initial.lora_a));
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
