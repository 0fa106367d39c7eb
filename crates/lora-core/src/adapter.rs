//! `Adapter`: one named update of one parameter; `Lora`: all adapters of that parameter.
//!
//! `Lora` is Burn's [`Reparameterization`]: it sits on the parameter, so any model can carry it. Its `Module` is written by
//! hand for two reasons: paths name the adapter (`to_q.weight.lora.default.lora_A`), and `map` is the only mutable access
//! Burn gives to what is attached, which [`edit`](crate::edit) uses.
//!
//! Factors are kept as files store them, `lora_A: [r, in]` and `lora_B: [out, r]`, while Burn's linear weight is `[in, out]`.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::kinds::factors::{Factors, INITIAL_A, INITIAL_B, MapParts, ParamFactors, kron_apply};
use crate::site::{Site, WeightLayout};
use crate::{dropout, edit};

/// Numbers that belong to one adapter of one layer and are not trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdapterSpec {
    /// Rank of the factors; for a LoKr of two full matrices the one that its scale is computed with.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// Probability of zeroing an element of the input, in training.
    pub dropout: f64,
}

impl AdapterSpec {
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// One named adapter on one parameter.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub(crate) name: String,
    pub(crate) spec: AdapterSpec,
    pub(crate) site: Site,
    /// Strength chosen at run time. A DoRA adapter of strength 0 still sets the magnitude, as in PEFT.
    pub(crate) weight: f64,
    /// Whether it takes part in the forward pass.
    pub(crate) active: bool,
    /// Identity of the layer in random streams.
    pub(crate) stream: u64,
    pub(crate) factors: ParamFactors,
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
        matches!(self.factors, Factors::Whole(_))
    }

    /// The change of the weight with its scale, `[out, in]` (for LoRA `scale * B A`, less its start), before DoRA. A convolution's kernel is
    /// flattened into `in`. `None` for a parameter that is trained in full.
    pub fn delta(&self) -> Option<Tensor<2>> {
        Some(self.factors.delta()?.mul_scalar(self.scale()))
    }

    fn magnitude(&self) -> Option<&Param<Tensor<1>>> {
        self.factors.as_lora()?.magnitude.as_ref()
    }

    /// `result` plus what this adapter adds for the input `x`, without the dense change where there is a way (DoRA needs it
    /// for its norm, LoHa for the product).
    ///
    /// # Shapes
    /// - `x`: `[..., in]`, `base`: `[in, out]`, `result`: `[..., out]`; returns `[..., out]`
    /// # Source
    /// PEFT `lora.Linear.forward`, `DoraLinearLayer.forward`, `LoHaLayer.forward`, `LoKrLayer.forward`.
    pub(crate) fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        base: Tensor<2>,
        bias: Option<Tensor<1>>,
        result: Tensor<D>,
    ) -> Tensor<D> {
        use burn::tensor::module::linear;
        let lora = match &self.factors {
            Factors::Lora(lora) => lora,
            Factors::Loha { .. } => {
                return match self.delta() {
                    Some(delta) => result + linear(x, delta.transpose(), None),
                    None => result,
                };
            }
            Factors::Lokr { w1, w2 } => {
                let shape = result.dims();
                let x = x.clone().reshape([-1, x.dims()[D - 1] as i32]);
                let update = kron_apply(x, w1, w2).mul_scalar(self.scale());
                return result + update.reshape(shape);
            }
            Factors::Whole(_) => return result, // it is `base` already
        };
        // What the adapter started from is a part of the base weight: no dropout.
        let start = |x: Tensor<D>| {
            lora.initial.as_ref().map(|initial| {
                let hidden = linear(x, initial.lora_a.val().transpose(), None);
                linear(hidden, initial.lora_b.val().transpose(), None).mul_scalar(self.scale())
            })
        };
        let result = match start(x.clone()) {
            None => result,
            Some(start) => result - start,
        };
        let (x, dropped) = match dropout::mask(self.spec.dropout, self.stream, &x) {
            Some(mask) => (x * mask, true),
            None => (x, false),
        };
        let hidden = linear(x.clone(), lora.lora_a.val().transpose(), None);
        let lora_bias = lora.bias.as_ref().map(|b| b.val());
        let update =
            linear(hidden, lora.lora_b.val().transpose(), lora_bias).mul_scalar(self.scale());
        let (Some(magnitude), Some(delta)) = (&lora.magnitude, self.delta()) else {
            return result + update;
        };

        let direction = base.clone().inner() + delta.inner().transpose();
        let norm = direction.square().sum_dim(0).sqrt(); // [1, out], a constant for the gradient
        let norm = Tensor::<2>::from_inner(norm).flatten::<1>(0, 1);
        let factor: Tensor<D> = (magnitude.val() / norm).unsqueeze();
        let unadapted = match (dropped, bias) {
            (true, _) => match start(x.clone()) {
                None => linear(x, base, None),
                Some(start) => linear(x, base, None) - start,
            },
            (false, Some(bias)) => result.clone() - bias.unsqueeze(),
            (false, None) => result.clone(),
        };
        result + (factor.clone() - 1.0) * unadapted + factor * update
    }

    /// The weight this adapter makes of `weight`, which is `[in, out]`; `base` is the weight without any adapter.
    fn apply(&self, weight: Tensor<2>, base: &Tensor<2>) -> Tensor<2> {
        let Some(delta) = self.delta() else {
            return weight;
        };
        let delta = delta.transpose();
        let Some(magnitude) = self.magnitude() else {
            return weight + delta;
        };
        let direction = (base.clone() + delta.clone()).detach();
        let norm = direction.square().sum_dim(0).sqrt();
        let factor = magnitude.val().unsqueeze::<2>() / norm;
        (weight + delta) * factor
    }

    fn map_params<M: Mapping>(self, m: &mut M) -> Self {
        Self {
            factors: self.factors.map(&mut Mapped(m)),
            ..self
        }
    }

    /// Switches gradients of every factor on or off; what a LoRA started from has none.
    pub(crate) fn set_trainable(self, trainable: bool) -> Self {
        struct Set(bool);
        impl Mapping for Set {
            fn param<const D: usize>(&mut self, n: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>> {
                p.set_require_grad(self.0 && n != INITIAL_A && n != INITIAL_B)
            }
        }
        self.map_params(&mut Set(trainable))
    }
}

/// A function over parameters of any rank.
trait Mapping {
    fn param<const D: usize>(&mut self, name: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// A [`Mapping`] applied to every part of some factors.
struct Mapped<'a, M>(&'a mut M);

impl<M: Mapping> MapParts<Param<Tensor<2>>, Param<Tensor<1>>> for Mapped<'_, M> {
    type Matrix = Param<Tensor<2>>;
    type Vector = Param<Tensor<1>>;
    fn matrix(&mut self, name: &'static str, part: Param<Tensor<2>>) -> Param<Tensor<2>> {
        self.0.param(name, part)
    }
    fn vector(&mut self, name: &'static str, part: Param<Tensor<1>>) -> Param<Tensor<1>> {
        self.0.param(name, part)
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
        let whole = self.active().find_map(|adapter| match &adapter.factors {
            Factors::Whole(value) => Some(value),
            _ => None,
        });
        match whole {
            Some(value) => value.val().reshape(base.shape()).cast(base.dtype()),
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
        struct Collect(Devices);
        impl MapParts<&Param<Tensor<2>>, &Param<Tensor<1>>> for Collect {
            type Matrix = ();
            type Vector = ();
            fn matrix(&mut self, _: &'static str, part: &Param<Tensor<2>>) {
                self.0 = part.collect_devices(std::mem::take(&mut self.0));
            }
            fn vector(&mut self, _: &'static str, part: &Param<Tensor<1>>) {
                self.0 = part.collect_devices(std::mem::take(&mut self.0));
            }
        }
        let mut collect = Collect(devices);
        let _ = self.factors.as_ref().map(&mut collect);
        collect.0
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        struct Visit<'a, V>(&'a mut V);
        impl<V: ModuleVisitor> Visit<'_, V> {
            fn part(&mut self, name: &str, part: &impl Module) {
                self.0.enter_module(name, CONTAINER);
                part.visit(self.0);
                self.0.exit_module(name, CONTAINER);
            }
        }
        impl<V: ModuleVisitor> MapParts<&Param<Tensor<2>>, &Param<Tensor<1>>> for Visit<'_, V> {
            type Matrix = ();
            type Vector = ();
            fn matrix(&mut self, name: &'static str, part: &Param<Tensor<2>>) {
                self.part(name, part);
            }
            fn vector(&mut self, name: &'static str, part: &Param<Tensor<1>>) {
                self.part(name, part);
            }
        }
        let _ = self.factors.as_ref().map(&mut Visit(visitor));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        struct Map<'a, M>(&'a mut M);
        impl<M: ModuleMapper> Mapping for Map<'_, M> {
            fn param<const D: usize>(
                &mut self,
                name: &str,
                p: Param<Tensor<D>>,
            ) -> Param<Tensor<D>> {
                self.0.enter_module(name, CONTAINER);
                let p = p.map_module(self.0);
                self.0.exit_module(name, CONTAINER);
                p
            }
        }
        self.map_params(&mut Map(mapper))
    }

    fn fork(self, device: &Device) -> Self {
        struct Fork<'a>(&'a Device);
        impl Mapping for Fork<'_> {
            fn param<const D: usize>(&mut self, _: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>> {
                p.fork(self.0)
            }
        }
        self.map_params(&mut Fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        struct Move<'a>(&'a Device);
        impl Mapping for Move<'_> {
            fn param<const D: usize>(&mut self, _: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>> {
                p.to_device(self.0)
            }
        }
        self.map_params(&mut Move(device))
    }

    fn train(self) -> Self {
        struct Train;
        impl Mapping for Train {
            fn param<const D: usize>(&mut self, _: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>> {
                p.train()
            }
        }
        self.map_params(&mut Train)
    }

    fn valid(&self) -> Self {
        struct Valid;
        impl Mapping for Valid {
            fn param<const D: usize>(&mut self, _: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>> {
                p.valid()
            }
        }
        self.clone().map_params(&mut Valid)
    }

    fn materialize(self) -> Self {
        self
    }
}

/// The `Module` form of `map`: Burn's inherent `Param::map` drops what is attached.
trait MapModule {
    fn map_module<M: ModuleMapper>(self, mapper: &mut M) -> Self;
}
impl<P: Module> MapModule for P {
    fn map_module<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Module::map(self, mapper)
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
