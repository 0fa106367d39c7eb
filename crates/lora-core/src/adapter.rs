//! `Adapter`: one named update of one parameter; `Lora`: all adapters of that parameter.
//!
//! `Lora` is Burn's [`Reparameterization`]: it sits on the parameter, so any model can carry it. Its `Module` is written by
//! hand for two reasons: paths name the adapter (`to_q.weight.lora.default.lora_A`), and `map` is the only mutable access
//! Burn gives to what is attached, which [`edit`](crate::edit) uses.
//!
//! Factors are kept as files store them, `lora_A: [r, in]` and `lora_B: [out, r]`, while Burn's linear weight is `[in, out]`.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Reparameterization};
use burn::tensor::{Device, Tensor};

use crate::kinds::factors::{Factor, Factors, Layer};
use crate::kinds::lora;
use crate::kinds::module::AdapterSpec;
use crate::kinds::parts::{Kind, LORA_A, LORA_B, LORA_BIAS, WHOLE};
use crate::ops::linear::LowRank;
use crate::peft::config::InitLoraWeights;
use crate::site::{Site, WeightLayout};
use crate::{dropout, edit};

/// One named adapter on one parameter.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub(crate) name: String,
    pub(crate) spec: AdapterSpec,
    pub(crate) site: Site,
    /// How its factors were split off the base weight, if they were.
    pub(crate) split: Option<InitLoraWeights>,
    /// Strength chosen at run time. A DoRA adapter of strength 0 still sets the magnitude, as in PEFT.
    pub(crate) weight: f64,
    /// Whether it takes part in the forward pass.
    pub(crate) active: bool,
    /// Identity of the layer in random streams.
    pub(crate) stream: u64,
    pub(crate) factors: Factors<Factor>,
}

impl Adapter {
    /// Name given when it was attached.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rank, alpha and the rest that is not trained.
    pub fn spec(&self) -> &AdapterSpec {
        &self.spec
    }

    /// Strength times the scale of the [`AdapterSpec`].
    pub fn scale(&self) -> f64 {
        self.weight * self.spec.scale()
    }

    /// Whether it takes part in the forward pass.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Whether it is a parameter trained in full, in place of the model's own.
    pub(crate) fn is_whole(&self) -> bool {
        self.factors.kind() == Kind::Whole
    }

    /// The change of the weight with its scale, `[out, in]` (for LoRA `scale * B A`, less its start), before DoRA. A convolution's kernel is
    /// flattened into `in`. `None` for a parameter that is trained in full.
    pub fn delta(&self) -> Option<Tensor<2>> {
        Some(self.factors.delta()?.mul_scalar(self.scale()))
    }

    /// What it adds to the bias of its layer, before its scale.
    pub(crate) fn bias(&self) -> Option<Tensor<1>> {
        self.factors.get(LORA_BIAS).map(Factor::vector)
    }

    /// Its factors for the input `x`, if it is a LoRA of two factors and nothing else.
    pub(crate) fn low_rank<const D: usize>(&self, x: &Tensor<D>) -> Option<LowRank<D>> {
        let alone = self.factors.kind() == Kind::Lora && self.factors.iter().count() == 2;
        alone.then(|| LowRank {
            a: self.factors[LORA_A].matrix(),
            b: self.factors[LORA_B].matrix(),
            scale: self.scale(),
            mask: dropout::mask(self.spec.dropout, self.stream, x),
        })
    }

    /// `result` plus what this adapter adds for the input `x`.
    ///
    /// # Shapes
    /// - `x`: `[..., in]`, `base`: `[in, out]`, `result`: `[..., out]`; returns `[..., out]`
    pub(crate) fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        base: Tensor<2>,
        bias: Option<Tensor<1>>,
        result: Tensor<D>,
    ) -> Tensor<D> {
        let layer = Layer {
            mask: dropout::mask(self.spec.dropout, self.stream, &x),
            x,
            base,
            bias,
        };
        self.factors.forward(self.scale(), layer, result)
    }

    /// The weight this adapter makes of `weight`, which is `[in, out]`; `base` is the weight without any adapter.
    fn apply(&self, weight: Tensor<2>, base: &Tensor<2>) -> Tensor<2> {
        match self.delta() {
            Some(delta) => lora::changed(&self.factors, weight, delta.transpose(), base),
            None => weight,
        }
    }

    fn map_factors(self, mut f: impl FnMut(Factor) -> Factor) -> Self {
        Self {
            factors: self.factors.map(|_, factor| f(factor)),
            ..self
        }
    }

    /// Switches gradients of every factor on or off; what a LoRA started from has none.
    pub(crate) fn set_trainable(self, trainable: bool) -> Self {
        Self {
            factors: (self.factors)
                .map(|part, factor| factor.set_require_grad(trainable && part.trained)),
            ..self
        }
    }
}

/// All adapters of one parameter, in the order they were added.
#[derive(Debug, Clone)]
pub struct Lora {
    pub(crate) adapters: Vec<Adapter>,
}

impl Lora {
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
        match whole {
            Some(value) => value.vector().reshape(base.shape()).cast(base.dtype()),
            None => base,
        }
    }

    pub(crate) fn each(self, f: impl FnMut(Adapter) -> Adapter) -> Self {
        Self {
            adapters: self.adapters.into_iter().map(f).collect(),
        }
    }
}

const CONTAINER: &str = "Struct:Adapter";

impl Module for Adapter {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let factors = self.factors.iter();
        factors.fold(devices, |devices, (_, factor)| {
            factor.collect_devices(devices)
        })
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (part, factor) in self.factors.iter() {
            visitor.enter_module(part.name, CONTAINER);
            factor.visit(visitor);
            visitor.exit_module(part.name, CONTAINER);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self {
            factors: self.factors.map(|part, factor| {
                mapper.enter_module(part.name, CONTAINER);
                let factor = factor.map(mapper);
                mapper.exit_module(part.name, CONTAINER);
                factor
            }),
            ..self
        }
    }

    fn fork(self, device: &Device) -> Self {
        self.map_factors(|factor| factor.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.map_factors(|factor| factor.to_device(device))
    }

    fn train(self) -> Self {
        self.map_factors(Module::train)
    }

    fn valid(&self) -> Self {
        self.clone().map_factors(|factor| factor.valid())
    }

    fn materialize(self) -> Self {
        self
    }
}

impl Module for Lora {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.adapters
            .iter()
            .fold(devices, |devices, adapter| adapter.collect_devices(devices))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for adapter in &self.adapters {
            visitor.enter_module(&adapter.name, "Struct:Lora");
            adapter.visit(visitor);
            visitor.exit_module(&adapter.name, "Struct:Lora");
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        edit::apply_pending(self).each(|adapter| {
            let name = adapter.name.clone();
            mapper.enter_module(&name, "Struct:Lora");
            let adapter = adapter.map(mapper);
            mapper.exit_module(&name, "Struct:Lora");
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
        }
    }

    fn materialize(self) -> Self {
        self
    }
}

impl Reparameterization for Lora {
    const NAME: &'static str = "lora";

    /// `Param::val()` of an adapted weight: the dense `W + scale * B A`, or the parameter that is trained in its place.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let base = self.replaced(base);
        let changes = || self.active().filter(|adapter| !adapter.is_whole());
        let Some(first) = changes().next() else {
            return base;
        };
        let shape = base.shape();
        let rows = shape[0] as i32;
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
