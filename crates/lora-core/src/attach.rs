//! Putting an adapter on a model, in two steps: a [`Plan`] that can fail and changes nothing, and [`Plan::apply`], which
//! cannot fail.
//!
//! Factors are born from their [`AdapterSource`]. There is no way to attach first and load later, so what is about to be
//! loaded can never be initialised over.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleVisitor, Param, Reparameterization, Reparameterizer};
use burn::tensor::{Device, Tensor, TensorData};

use crate::adapter::{
    Adapter, AdapterSpec, LORA_A, LORA_B, LORA_BIAS, Lora, MAGNITUDE, WeightLayout,
};
use crate::adapter_file::{AdapterFile, ModuleAdapter};
use crate::config::{InitLoraWeights, LoraConfig};
use crate::edit::{adapter_names, edit};
use crate::error::LoraError;
use crate::host::HostTensor;
use crate::random::{Stream, name_hash};

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
    occupied: BTreeSet<String>,
}

#[derive(Debug)]
struct Layer {
    layout: WeightLayout,
    module: ModuleAdapter,
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
        let modules = match source {
            AdapterSource::Fresh { seed } => {
                let config = config.ok_or_else(|| {
                    LoraError::Config("a fresh adapter needs a configuration".into())
                })?;
                fresh(&scan, config, seed)?
            }
            AdapterSource::File(file) => {
                if let Some(config) = config {
                    file.agrees_with(config)?;
                    scan.selects_exactly(config, file.modules().keys())?;
                }
                file.into_modules()
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
        if path == ForwardPath::Dense {
            for (layer, Layer { module, .. }) in &layers {
                if module.spec.dropout > 0.0 {
                    return Err(LoraError::Config("`lora_dropout` needs a model that computes its layers with `lora_core::linear`; set it to 0".into()));
                }
                if module.bias.is_some() {
                    return Err(LoraError::Config(format!(
                        "`{layer}` has a `lora_bias`, which needs a model that computes its layers with `lora_core::linear`"
                    )));
                }
            }
        }
        let mut plan = Self {
            name: name.into(),
            layers,
            magnitudes: BTreeMap::new(),
            occupied: scan.occupied,
        };
        if plan
            .layers
            .values()
            .any(|layer| layer.module.magnitude.is_none() && layer.module.use_dora)
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

    /// Attaches. Base weights stop requiring gradients; other adapters stay as they are.
    pub fn apply<M: Module>(self, model: M) -> M {
        let model = model.apply_reparameterization(&self);
        if self.occupied.is_empty() {
            return model;
        }
        edit(model, move |path, mut lora: Lora| {
            if self.occupied.contains(path)
                && let Some(layer) = self.layers.get(path)
            {
                let device = lora.adapters.first().map(|a| a.lora_a.lazy_device());
                if let Some(device) = device {
                    lora.adapters.push(self.adapter(path, layer, &device));
                }
            }
            lora
        })
    }

    fn adapter(&self, path: &str, layer: &Layer, device: &Device) -> Adapter {
        let matrix = |t: &HostTensor| {
            Param::from_data(
                TensorData::new(t.to_f32(), [t.shape[0], t.shape[1]]),
                device,
            )
        };
        let vector =
            |t: &HostTensor| Param::from_data(TensorData::new(t.to_f32(), [t.numel()]), device);
        let module = &layer.module;
        Adapter {
            name: self.name.clone(),
            spec: module.spec,
            layout: layer.layout,
            weight: 1.0,
            active: true,
            stream: name_hash(&format!("{path}.{}", self.name)),
            lora_a: matrix(&module.lora_a),
            lora_b: matrix(&module.lora_b),
            magnitude: module
                .magnitude
                .as_ref()
                .or_else(|| self.magnitudes.get(path))
                .map(vector),
            bias: module.bias.as_ref().map(vector),
        }
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
        let device = param.lazy_device();
        let param = param.set_require_grad(false);
        match self.layers.get(path) {
            Some(layer) if !self.occupied.contains(path) => {
                let adapter = self.adapter(path, layer, &device);
                (
                    param,
                    Some(Lora {
                        adapters: vec![adapter],
                    }),
                )
            }
            _ => (param, None),
        }
    }
}

/// Paths, shapes and owners of a model's weights, and where adapters already sit.
#[derive(Default)]
struct Scan {
    path: Vec<String>,
    owner: Vec<String>,
    weights: BTreeMap<String, Weight>,
    occupied: BTreeSet<String>,
}

struct Weight {
    shape: Vec<usize>,
    owner: String,
}

impl Weight {
    fn is_linear(&self) -> bool {
        self.owner == "Struct:Linear"
    }

    /// Layout, inputs and outputs of a weight that can be adapted.
    fn adaptable(&self) -> Option<(WeightLayout, usize, usize)> {
        match (self.owner.as_str(), self.shape.as_slice()) {
            (_, &[inputs, outputs]) => Some((WeightLayout::InOut, inputs, outputs)),
            _ => None,
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
        if let [module @ .., last] = self.path.as_slice()
            && last == "weight"
        {
            let weight = Weight {
                shape: param.lazy_shape().to_vec(),
                owner: self.owner.last().cloned().unwrap_or_default(),
            };
            self.weights.insert(module.join("."), weight);
        }
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
        let is_target = |path: &str, weight: &Weight| {
            !exclude
                .as_ref()
                .is_some_and(|e| e.matches(path, weight.is_linear()))
                && target.matches(path, weight.is_linear())
        };
        // A list entry that selects nothing is a typing error, even where other entries match.
        if let crate::config::Targets::List(entries) = &config.target_modules {
            if entries.is_empty() {
                return Err(LoraError::Config(
                    "`target_modules` is empty: name the layers to adapt".into(),
                ));
            }
            for entry in entries {
                if !self.weights.iter().any(|(path, w)| {
                    w.adaptable().is_some() && crate::config::is_suffix(path, entry)
                }) {
                    return Err(self.no_match(entry));
                }
            }
        }
        let targets: Vec<&str> = self
            .weights
            .iter()
            .filter(|(path, weight)| weight.adaptable().is_some() && is_target(path, weight))
            .map(|(path, _)| path.as_str())
            .collect();
        if targets.is_empty() {
            let pattern = match &config.target_modules {
                crate::config::Targets::Pattern(pattern) => pattern.clone(),
                crate::config::Targets::List(entries) => entries.join(", "),
            };
            return Err(self.no_match(&pattern));
        }
        Ok(targets)
    }

    /// Checks that `config` selects the layers a file holds, no more and no fewer.
    fn selects_exactly<'a>(
        &self,
        config: &LoraConfig,
        stored: impl Iterator<Item = &'a String>,
    ) -> Result<(), LoraError> {
        let stored: BTreeSet<&str> = stored.map(String::as_str).collect();
        let selected: BTreeSet<&str> = self.targets(config)?.into_iter().collect();
        let Some(layer) = selected.symmetric_difference(&stored).next() else {
            return Ok(());
        };
        let is = |there: bool| if there { "adapted" } else { "not adapted" }.to_string();
        Err(LoraError::Disagrees {
            key: format!("target_modules ({layer})"),
            configured: is(selected.contains(layer)),
            stored: is(stored.contains(layer)),
        })
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
            key: format!("{path}.{LORA_A}"),
            reason: reason.into(),
        };
        let weight = self
            .weights
            .get(path)
            .ok_or_else(|| leftover("the model has no such layer"))?;
        let (layout, inputs, outputs) = weight.adaptable().ok_or_else(|| {
            leftover(&format!(
                "a weight of shape {:?} cannot be adapted",
                weight.shape
            ))
        })?;
        let rank = module.spec.rank;
        for (name, tensor, expected) in [
            (LORA_A, Some(&module.lora_a), vec![rank, inputs]),
            (LORA_B, Some(&module.lora_b), vec![outputs, rank]),
            (MAGNITUDE, module.magnitude.as_ref(), vec![outputs]),
            (LORA_BIAS, module.bias.as_ref(), vec![outputs]),
        ] {
            let Some(tensor) = tensor else { continue };
            if tensor.shape != expected {
                return Err(LoraError::Shape {
                    key: format!("{path}.{name}"),
                    expected,
                    found: tensor.shape.clone(),
                });
            }
            if let Some(index) = tensor.first_non_finite() {
                return Err(LoraError::NotFinite {
                    key: format!("{path}.{name}"),
                    index,
                });
            }
        }
        Ok(Layer { layout, module })
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
fn fresh(
    scan: &Scan,
    config: &LoraConfig,
    seed: u64,
) -> Result<BTreeMap<String, ModuleAdapter>, LoraError> {
    let mut modules = BTreeMap::new();
    for path in scan.targets(config)? {
        let (rank, alpha) = config.resolve(path)?;
        let Some((_, inputs, outputs)) = scan.weights[path].adaptable() else {
            continue;
        };
        let layer = name_hash(path);
        let uniform = |name: &str, n: usize, bound: f64| -> Vec<f32> {
            let mut stream = Stream::new(seed, name, 0, layer);
            (0..n)
                .map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32)
                .collect()
        };
        let a = match config.init_lora_weights {
            InitLoraWeights::Gaussian => {
                let mut stream = Stream::new(seed, "init_lora_a", 0, layer);
                stream
                    .normals(rank * inputs)
                    .into_iter()
                    .map(|v| v / rank as f32)
                    .collect()
            }
            InitLoraWeights::Default | InitLoraWeights::Random => {
                uniform("init_lora_a", rank * inputs, 1.0 / (inputs as f64).sqrt())
            }
        };
        let b = match config.init_lora_weights {
            InitLoraWeights::Random => {
                uniform("init_lora_b", outputs * rank, 1.0 / (rank as f64).sqrt())
            }
            InitLoraWeights::Default | InitLoraWeights::Gaussian => vec![0.0; outputs * rank],
        };
        let module = ModuleAdapter {
            spec: AdapterSpec {
                rank,
                alpha,
                use_rslora: config.use_rslora,
                dropout: config.lora_dropout,
            },
            lora_a: HostTensor::from_f32([rank, inputs], &a),
            lora_b: HostTensor::from_f32([outputs, rank], &b),
            magnitude: None,
            bias: config
                .lora_bias
                .then(|| HostTensor::from_f32([outputs], &vec![0.0; outputs])),
            use_dora: config.use_dora,
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
            let Some(Layer { module, .. }) = self.layers.get(&path) else {
                return;
            };
            let base = param.base();
            let [inputs, outputs] = [base.dims()[0], base.dims()[D - 1]];
            let weight: Tensor<2> = base.reshape([inputs, outputs]);
            let device = weight.device();
            let factor = |t: &HostTensor| {
                Tensor::<2>::from_data(
                    TensorData::new(t.to_f32(), [t.shape[0], t.shape[1]]),
                    &device,
                )
            };
            let delta = factor(&module.lora_b)
                .matmul(factor(&module.lora_a))
                .mul_scalar(module.spec.scale());
            let norm = (weight + delta.transpose()).square().sum_dim(0).sqrt();
            let values = norm
                .into_data()
                .convert::<f32>()
                .try_into_vec::<f32>()
                .expect("converted to f32");
            self.norms
                .insert(path, HostTensor::from_f32([outputs], &values));
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
