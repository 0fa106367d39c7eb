//! `Adapters`: all adapters of one parameter, as Burn's [`Reparameterization`]: so any model can carry them.
//!
//! Their `Module` is written by hand for two reasons: paths name the adapter (`to_q.weight.adapter.default.lora_A`), and
//! visiting and mapping are the only ways that Burn gives to what is attached. [`adapters_of`] and [`with_adapters`] say on
//! the side, for the duration of one walk, what is to be read or put there.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{Device, Tensor};

use crate::adapter::Adapter;
use crate::files::quantised::Quantised;
use crate::kinds::parts::WHOLE;
use crate::ops::linear::Weight;
use crate::site::WeightLayout;
use crate::training::dropout;

/// All adapters of one parameter, in the order they were added.
#[derive(Debug, Clone)]
pub(crate) struct Adapters {
    pub(crate) adapters: Vec<Adapter>,
    /// The weight, if it is in few bits; the parameter is a placeholder then ([`frozen`](crate::frozen)).
    pub(crate) frozen: Option<Arc<Quantised>>,
}

impl Adapters {
    /// Every adapter, active or not.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// Adapters that take part in the forward pass.
    pub fn active(&self) -> impl Iterator<Item = &Adapter> {
        self.adapters.iter().filter(|a| a.is_active())
    }

    /// The parameter, or what an active adapter has in place of it.
    pub(crate) fn replaced<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let whole = self.active().find_map(|adapter| adapter.factors.get(WHOLE));
        match (whole, &self.frozen) {
            (Some(value), _) => value.vector().reshape(base.shape()).cast(base.dtype()),
            (None, Some(frozen)) => {
                let frozen = Weight::from(frozen.clone()).dense(&base.device());
                frozen.reshape(base.shape())
            }
            (None, None) => base,
        }
    }

    /// As [`replaced`](Self::replaced), for a linear layer, which can take a weight in few bits as it is.
    pub(crate) fn weight(&self, base: Tensor<2>) -> Weight {
        match &self.frozen {
            Some(frozen) if !self.active().any(Adapter::is_whole) => frozen.clone().into(),
            _ => self.replaced(base).into(),
        }
    }

    pub(crate) fn each(self, f: impl FnMut(Adapter) -> Adapter) -> Self {
        Self {
            adapters: self.adapters.into_iter().map(f).collect(),
            ..self
        }
    }

    /// Called on every visit; does nothing unless [`adapters_of`] walks.
    fn note(&self) {
        WALK.with(|walk| {
            if let Some(walk) = walk.borrow_mut().as_mut() {
                let parameter = walk.parameter();
                if let Errand::Note(found) = &mut walk.errand {
                    found.push((parameter, self.clone()));
                }
            }
        });
    }

    /// Called on every map; does nothing unless [`with_adapters`] walks.
    fn exchanged(self) -> Self {
        WALK.with(|walk| match walk.borrow_mut().as_mut() {
            None => self,
            Some(walk) => {
                let parameter = walk.parameter();
                match &mut walk.errand {
                    Errand::Exchange(others) => others.remove(&parameter).unwrap_or(self),
                    Errand::Note(_) => self,
                }
            }
        })
    }
}

/// The container of one adapter, as a walk over the model sees it: not the name of a type.
pub(crate) const ADAPTER: &str = "lora-core adapter";

/// What a walk that is under way does with the adapters it meets.
enum Errand {
    Note(Vec<(String, Adapters)>),
    Exchange(BTreeMap<String, Adapters>),
}

struct Walk {
    path: Vec<String>,
    errand: Errand,
}

thread_local! {
    static WALK: RefCell<Option<Walk>> = const { RefCell::new(None) };
}

/// Ends the walk even if it panics.
struct Started;

impl Started {
    fn with(errand: Errand) -> Self {
        let path = Vec::new();
        WALK.with(|walk| *walk.borrow_mut() = Some(Walk { path, errand }));
        Self
    }

    fn end(self) -> Option<Errand> {
        WALK.with(|walk| walk.borrow_mut().take().map(|walk| walk.errand))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        WALK.with(|walk| *walk.borrow_mut() = None);
    }
}

/// Keeps the path of the walk.
struct Steps;

impl Steps {
    fn enter(name: &str) {
        WALK.with(|walk| {
            if let Some(walk) = walk.borrow_mut().as_mut() {
                walk.path.push(name.into());
            }
        });
    }

    fn exit() {
        WALK.with(|walk| {
            if let Some(walk) = walk.borrow_mut().as_mut() {
                walk.path.pop();
            }
        });
    }
}

impl ModuleVisitor for Steps {
    fn enter_module(&mut self, name: &str, _: &str) {
        Self::enter(name);
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        Self::exit();
    }
    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {}
}

impl ModuleMapper for Steps {
    fn enter_module(&mut self, name: &str, _: &str) {
        Self::enter(name);
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        Self::exit();
    }
}

impl Walk {
    /// The path of the parameter whose adapters are met; the last step is their own name.
    fn parameter(&self) -> String {
        self.path[..self.path.len().saturating_sub(1)].join(".")
    }
}

/// The adapters of every parameter that has some, or had some, by its path.
pub(crate) fn adapters_of<M: Module>(model: &M) -> Vec<(String, Adapters)> {
    let walk = Started::with(Errand::Note(Vec::new()));
    model.visit(&mut Steps);
    match walk.end() {
        Some(Errand::Note(found)) => found,
        _ => Vec::new(),
    }
}

/// The model with other adapters on the parameters at these paths, which have some already.
pub(crate) fn with_adapters<M: Module>(model: M, adapters: BTreeMap<String, Adapters>) -> M {
    let _walk = Started::with(Errand::Exchange(adapters));
    model.map(&mut Steps)
}

/// Replaces the adapters of every parameter that has some by what `f` makes of them; `f` gets the parameter's path.
pub(crate) fn edit<M: Module>(model: M, mut f: impl FnMut(&str, Adapters) -> Adapters) -> M {
    let found = adapters_of(&model).into_iter();
    let made = found.map(|(path, adapters)| {
        let made = f(&path, adapters);
        (path, made)
    });
    let made = made.collect();
    with_adapters(model, made)
}

/// The weights of a model that are held in few bits, by path.
pub fn held<M: Module>(model: &M) -> BTreeMap<String, Arc<Quantised>> {
    let found = adapters_of(model).into_iter();
    found
        .filter_map(|(path, adapters)| Some((path, adapters.frozen?)))
        .collect()
}

impl Module for Adapters {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.adapters
            .iter()
            .fold(devices, |devices, adapter| adapter.collect_devices(devices))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.note();
        for adapter in &self.adapters {
            visitor.enter_module(&adapter.name, ADAPTER);
            adapter.visit(visitor);
            visitor.exit_module(&adapter.name, ADAPTER);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        self.exchanged().each(|adapter| {
            let name = adapter.name.clone();
            mapper.enter_module(&name, ADAPTER);
            let adapter = adapter.map(mapper);
            mapper.exit_module(&name, ADAPTER);
            adapter
        })
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|adapter| adapter.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(|adapter| adapter.to_device(device))
    }

    fn train(self) -> Self {
        self.each(Module::train)
    }

    fn valid(&self) -> Self {
        Self {
            adapters: self.adapters.iter().map(Module::valid).collect(),
            frozen: self.frozen.clone(),
        }
    }

    fn materialize(self) -> Self {
        self
    }
}

impl Reparameterization for Adapters {
    const NAME: &'static str = "adapter";

    /// `Param::val()` of an adapted weight: the dense `W + scale * B A`, or the parameter that is trained in its place.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let base = self.replaced(base);
        let changes = || self.active().filter(|adapter| !adapter.is_whole());
        let Some(first) = changes().next() else {
            return base;
        };
        let shape = base.shape();
        let rows = shape[0] as i32;
        let base = base.cast(first.dtype()); // a change is not rounded to what the weight was kept as
        let base: Tensor<2> = match first.site.layout {
            WeightLayout::InOut | WeightLayout::Table => base.reshape([rows, -1]),
            WeightLayout::OutIn => base.reshape([rows, -1]).transpose(),
        };
        let weight = changes().fold(base.clone(), |weight, adapter| {
            if first.site.layout != WeightLayout::Table {
                dropout::note_dense_path(adapter.spec.dropout, &adapter.name);
            }
            adapter.apply(weight, &base)
        });
        match first.site.layout {
            WeightLayout::InOut | WeightLayout::Table => weight.reshape(shape),
            WeightLayout::OutIn => weight.transpose().reshape(shape),
        }
    }
}
