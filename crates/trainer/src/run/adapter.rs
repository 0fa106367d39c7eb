//! The adapter of a run: one for the velocity network, and one for every text encoder that is trained with it. In files they are
//! side by side, under the prefixes of diffusers.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{anyhow, bail};
use burn::module::Module;
use burn::tensor::Device;
use flux_model::family::{Adapt, Family, TextModules};
use flux_model::lora::{Component, LoraSet, ModelShape};
use flux_model::prompted::{Prompted, component_of};
use lora_core::attach::{DEFAULT_ADAPTER, NewAdapter, Plan, attach, targeted, trained_in_full};
use lora_core::peft::{PeftType, Targets, TrainBias, load_together, write_together};
use lora_core::{AdapterFile, LoraConfig, LoraError};

use crate::config::Loras;

/// Prefix of a component's keys in a diffusers LoRA file; in a checkpoint they are in this order.
const PREFIXES: [(Component, &str); 3] = [
    (Component::Transformer, "transformer."),
    (Component::ClipL, "text_encoder."),
    (Component::T5, "text_encoder_2."),
];

/// The layers that are adapted of every network, with inputs and outputs.
pub(crate) type Layers = BTreeMap<Component, BTreeMap<String, [usize; 2]>>;

/// What is to be attached to every network.
pub type NewAdapters = BTreeMap<Component, NewAdapter>;

/// The adapter of every network that is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct RunAdapter(pub(crate) BTreeMap<Component, AdapterFile>);

impl RunAdapter {
    /// The adapter on a [`Prompted`], checked to be finite.
    ///
    /// # Errors
    /// A weight that is NaN or infinite; the error names it.
    pub fn of_model<M: Module>(model: &M, loras: &Loras) -> anyhow::Result<Self> {
        let adapters = loras.iter().map(|(&component, lora)| {
            let is_part = |path: &str| component_of(path) == component;
            let file = AdapterFile::from_part(model, is_part, DEFAULT_ADAPTER, Some(lora))?;
            file.check_finite()?;
            Ok((component, file))
        });
        Ok(Self(adapters.collect::<anyhow::Result<_>>()?))
    }

    /// The adapter that these plans, made of `loras`, would attach.
    pub(crate) fn planned(plans: &BTreeMap<Component, Plan>, loras: &Loras) -> Self {
        let files = plans
            .iter()
            .map(|(component, plan)| (*component, plan.file(loras.get(component))));
        Self(files.collect())
    }

    /// Reads what [`write`](Self::write) has written.
    ///
    /// # Errors
    /// Tensors that are no adapter.
    pub fn load(path: &Path) -> Result<Self, LoraError> {
        let mut found = load_together(path, &PREFIXES.map(|(_, prefix)| prefix))?;
        let adapters = PREFIXES
            .iter()
            .filter_map(|(component, prefix)| Some((*component, found.remove(prefix)?)));
        Ok(Self(adapters.collect()))
    }

    /// Writes it with every bit, as diffusers loads it.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let adapters = PREFIXES
            .iter()
            .filter_map(|(component, prefix)| Some((*prefix, self.0.get(component)?)));
        write_together(adapters, out)
    }

    /// What is to be attached to go on from this with `loras`, whose networks these are.
    ///
    /// # Errors
    /// The adapter of a network that is not trained, or none of one that is.
    pub fn restored(self, loras: &Loras) -> anyhow::Result<NewAdapters> {
        let (stored, trained) = (self.0.keys(), loras.keys());
        if !stored.clone().eq(trained.clone()) {
            bail!(
                "the checkpoint has adapters of {}, and the configuration of {}",
                names(stored),
                names(trained)
            );
        }
        Ok(self.stored(loras).collect())
    }

    /// What is to be attached to go on from this with `loras`.
    pub(crate) fn stored(self, loras: &Loras) -> impl Iterator<Item = (Component, NewAdapter)> {
        self.0.into_iter().filter_map(|(component, file)| {
            let lora = loras.get(&component)?;
            Some((component, file.stored().agreeing_with(lora).fast()))
        })
    }

    /// The kind of the velocity network's factors.
    pub(crate) fn peft_type(&self) -> PeftType {
        let network = self.0.get(&Component::Transformer);
        network.map(AdapterFile::peft_type).unwrap_or_default()
    }

    /// The same with the scale of LoHa and LoKr in the factors.
    pub(crate) fn fold_scale(self) -> Self {
        let folded = |(component, file): (_, AdapterFile)| (component, file.fold_scale());
        Self(self.0.into_iter().map(folded).collect())
    }

    /// As a set that is written in any format, for the networks of `shape`.
    pub(crate) fn set(&self, shape: ModelShape) -> LoraSet {
        let empty = LoraSet {
            shape,
            ..LoraSet::default()
        };
        let adapters = self.0.iter();
        adapters.fold(empty, |set, (&component, file)| {
            set.with_adapter(file, component)
        })
    }
}

fn names<'a>(components: impl Iterator<Item = &'a Component>) -> String {
    let names: Vec<String> = components.map(Component::to_string).collect();
    names.join(", ")
}

/// Attaches an adapter to every network.
///
/// # Errors
/// As [`attach`].
pub fn attach_all<F: Family>(
    model: Prompted<F>,
    adapters: &NewAdapters,
) -> anyhow::Result<Prompted<F>> {
    each(model, &Attached(adapters))
}

/// What [`attach_all`] would attach to every network, on a model that may be an outline: attaching to one would make its weights.
///
/// # Errors
/// As [`Plan::new`].
pub(crate) fn plan_all<F: Family>(
    outline: &Prompted<F>,
    adapters: &NewAdapters,
) -> anyhow::Result<BTreeMap<Component, Plan>> {
    let planned = Planned(adapters, RefCell::default());
    each(outline.clone(), &planned)?;
    Ok(planned.1.into_inner())
}

/// The layers of every network that `loras` adapt, see [`targeted`].
///
/// # Errors
/// A pattern that matches nothing; the error of a text encoder's says so.
pub(crate) fn targeted_all<F: Family>(
    outline: &Prompted<F>,
    loras: &Loras,
) -> anyhow::Result<Layers> {
    let found = Targeted(loras, RefCell::default());
    each(outline.clone(), &found)?;
    Ok(found.1.into_inner())
}

/// The parameters of the velocity network that `loras` train in full, see [`trained_in_full`].
///
/// # Errors
/// `modules_to_save` that name nothing; `bias` where no layer has one.
pub(crate) fn whole_of<F: Family>(
    outline: &Prompted<F>,
    loras: &Loras,
) -> anyhow::Result<BTreeMap<String, usize>> {
    let component = Component::Transformer;
    let Some(lora) = loras.get(&component) else {
        return Ok(BTreeMap::new());
    };
    let found = |lora| {
        let whole = trained_in_full(&outline.network, lora);
        whole.map_err(|error| explained(error, component, lora))
    };
    let biases = LoraConfig {
        modules_to_save: Vec::new(),
        ..lora.clone()
    };
    if lora.bias != TrainBias::None && found(&biases)?.is_empty() {
        bail!(
            "`lora.bias`: {} has no such biases, so nothing would be trained: remove the key",
            F::NAME
        );
    }
    found(lora)
}

/// The linear layers of these text encoders.
///
/// # Errors
/// A configuration that is missing or describes no network.
pub(crate) fn text_layers<F: Family>(
    family: &F,
    encoders: &[Component],
    device: &Device,
) -> anyhow::Result<Layers> {
    let all = LoraConfig {
        r: 1,
        target_modules: Targets::Pattern("all-linear".into()),
        ..LoraConfig::default()
    };
    let all: Loras = encoders
        .iter()
        .map(|&encoder| (encoder, all.clone()))
        .collect();
    let found = Targeted(&all, RefCell::default());
    if !encoders.is_empty() {
        family.text_modules(encoders, true, device)?.adapt(&found)?;
    }
    Ok(found.1.into_inner())
}

/// A change of the velocity network and of every text encoder.
fn each<F: Family>(
    model: Prompted<F>,
    change: &impl Adapt<Error = anyhow::Error>,
) -> anyhow::Result<Prompted<F>> {
    let text = model.text.map(|text| text.adapt(change)).transpose()?;
    Ok(Prompted {
        network: change.adapt(Component::Transformer, model.network)?,
        text,
    })
}

/// Says of which text encoder an error is.
fn of_component(component: Component, error: LoraError) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    match component {
        Component::Transformer => error,
        component => error.context(format!("`lora.{component}`")),
    }
}

/// Says what is meant by a string, where it names no layer.
fn explained(error: LoraError, component: Component, lora: &LoraConfig) -> anyhow::Error {
    let key = match component {
        Component::Transformer => "lora".to_string(),
        component => format!("lora.{component}"),
    };
    match &lora.target_modules {
        Targets::Pattern(pattern) if matches!(error, LoraError::NoMatch { .. }) => anyhow!(
            "{error}: `{key}.target_modules` = \"{pattern}\" is a string, so a pattern for whole paths; for every layer whose path ends so, write a list: [\"{pattern}\"]"
        ),
        _ => of_component(component, error),
    }
}

struct Attached<'a>(&'a NewAdapters);

impl Adapt for Attached<'_> {
    type Error = anyhow::Error;

    fn changes_weights(&self, _: Component) -> bool {
        false
    }

    fn adapt<M: Module>(&self, component: Component, module: M) -> anyhow::Result<M> {
        match self.0.get(&component) {
            None => Ok(module),
            Some(adapter) => {
                attach(module, adapter.clone()).map_err(|error| of_component(component, error))
            }
        }
    }
}

struct Planned<'a>(&'a NewAdapters, RefCell<BTreeMap<Component, Plan>>);

impl Adapt for Planned<'_> {
    type Error = anyhow::Error;

    fn changes_weights(&self, _: Component) -> bool {
        false
    }

    fn adapt<M: Module>(&self, component: Component, module: M) -> anyhow::Result<M> {
        if let Some(adapter) = self.0.get(&component) {
            let plan = Plan::new(&module, adapter.clone());
            let plan = plan.map_err(|error| of_component(component, error))?;
            self.1.borrow_mut().insert(component, plan);
        }
        Ok(module)
    }
}

struct Targeted<'a>(&'a Loras, RefCell<Layers>);

impl Adapt for Targeted<'_> {
    type Error = anyhow::Error;

    fn changes_weights(&self, _: Component) -> bool {
        false
    }

    fn adapt<M: Module>(&self, component: Component, module: M) -> anyhow::Result<M> {
        if let Some(lora) = self.0.get(&component) {
            let layers = targeted(&module, lora);
            let layers = layers.map_err(|error| explained(error, component, lora))?;
            self.1.borrow_mut().insert(component, layers);
        }
        Ok(module)
    }
}
