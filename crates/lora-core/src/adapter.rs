//! `Adapter`: one named low-rank update of one weight; `Lora`: all adapters of that weight.
//!
//! `Lora` is Burn's [`Reparameterization`]: it sits on the parameter, so any model can carry it. Its `Module` is written by
//! hand for two reasons: paths name the adapter (`to_q.weight.lora.default.lora_A`), and `map` is the only mutable access
//! Burn gives to what is attached, which [`edit`](crate::edit) uses.
//!
//! Factors are kept as files store them, `lora_A: [r, in]` and `lora_B: [out, r]`, while Burn's linear weight is `[in, out]`.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{dropout, edit};

/// Name of the down projection, `[r, in]`.
pub const LORA_A: &str = "lora_A";
/// Name of the up projection, `[out, r]`.
pub const LORA_B: &str = "lora_B";
/// Name of the DoRA magnitude, `[out]`.
pub const MAGNITUDE: &str = "lora_magnitude_vector";
/// Name of the bias of the up projection, `[out]`.
pub const LORA_BIAS: &str = "lora_B_bias";

/// Numbers that belong to one adapter of one layer and are not trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdapterSpec {
    /// Rank of the factors.
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

/// How the adapted weight lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightLayout {
    /// `[in, out]`: Burn's `Linear`.
    InOut,
    /// `[out, in, ...]`, flattened to `[out, in * ...]`: Burn's convolutions.
    OutIn,
}

/// One named adapter on one weight.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub(crate) name: String,
    pub(crate) spec: AdapterSpec,
    pub(crate) layout: WeightLayout,
    /// Strength chosen at run time. A DoRA adapter of strength 0 still sets the magnitude, as in PEFT.
    pub(crate) weight: f64,
    /// Whether it takes part in the forward pass.
    pub(crate) active: bool,
    /// Identity of the layer in random streams.
    pub(crate) stream: u64,
    pub(crate) lora_a: Param<Tensor<2>>,
    pub(crate) lora_b: Param<Tensor<2>>,
    pub(crate) magnitude: Option<Param<Tensor<1>>>,
    pub(crate) bias: Option<Param<Tensor<1>>>,
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

    /// `scale * B A`, shape `[out, in]`.
    pub fn delta(&self) -> Tensor<2> {
        self.lora_b
            .val()
            .matmul(self.lora_a.val())
            .mul_scalar(self.scale())
    }

    /// `result` plus what this adapter adds for the input `x`, without the dense `B A` (DoRA needs it for its norm).
    ///
    /// # Shapes
    /// - `x`: `[..., in]`, `base`: `[in, out]`, `result`: `[..., out]`; returns `[..., out]`
    /// # Source
    /// PEFT `lora.Linear.forward` and `DoraLinearLayer.forward`.
    pub(crate) fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        base: Tensor<2>,
        bias: Option<Tensor<1>>,
        result: Tensor<D>,
    ) -> Tensor<D> {
        use burn::tensor::module::linear;
        let (x, dropped) = match dropout::mask(self.spec.dropout, self.stream, &x) {
            Some(mask) => (x * mask, true),
            None => (x, false),
        };
        let hidden = linear(x.clone(), self.lora_a.val().transpose(), None);
        let lora_bias = self.bias.as_ref().map(|b| b.val());
        let update =
            linear(hidden, self.lora_b.val().transpose(), lora_bias).mul_scalar(self.scale());
        let Some(magnitude) = &self.magnitude else {
            return result + update;
        };

        let direction = base.clone().inner() + self.delta().inner().transpose();
        let norm = direction.square().sum_dim(0).sqrt(); // [1, out], a constant for the gradient
        let norm = Tensor::<2>::from_inner(norm).flatten::<1>(0, 1);
        let factor: Tensor<D> = (magnitude.val() / norm).unsqueeze();
        let unadapted = match (dropped, bias) {
            (true, _) => linear(x, base, None),
            (false, Some(bias)) => result.clone() - bias.unsqueeze(),
            (false, None) => result.clone(),
        };
        result + (factor.clone() - 1.0) * unadapted + factor * update
    }

    /// The weight this adapter makes of `weight`, which is `[in, out]`; `base` is the weight without any adapter.
    fn apply(&self, weight: Tensor<2>, base: &Tensor<2>) -> Tensor<2> {
        let delta = self.delta().transpose();
        let Some(magnitude) = &self.magnitude else {
            return weight + delta;
        };
        let direction = (base.clone() + delta.clone()).detach();
        let norm = direction.square().sum_dim(0).sqrt();
        let factor = magnitude.val().unsqueeze::<2>() / norm;
        (weight + delta) * factor
    }

    fn each_param(&self, f: &mut impl FnMut(&str, ParamRef)) {
        f(LORA_A, ParamRef::Matrix(&self.lora_a));
        f(LORA_B, ParamRef::Matrix(&self.lora_b));
        if let Some(m) = &self.magnitude {
            f(MAGNITUDE, ParamRef::Vector(m));
        }
        if let Some(b) = &self.bias {
            f(LORA_BIAS, ParamRef::Vector(b));
        }
    }

    fn map_params<M: Mapping>(self, m: &mut M) -> Self {
        Self {
            lora_a: m.param(LORA_A, self.lora_a),
            lora_b: m.param(LORA_B, self.lora_b),
            magnitude: self.magnitude.map(|p| m.param(MAGNITUDE, p)),
            bias: self.bias.map(|p| m.param(LORA_BIAS, p)),
            ..self
        }
    }

    /// Switches gradients of every factor on or off.
    pub(crate) fn set_trainable(self, trainable: bool) -> Self {
        struct Set(bool);
        impl Mapping for Set {
            fn param<const D: usize>(&mut self, _: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>> {
                p.set_require_grad(self.0)
            }
        }
        self.map_params(&mut Set(trainable))
    }
}

enum ParamRef<'a> {
    Matrix(&'a Param<Tensor<2>>),
    Vector(&'a Param<Tensor<1>>),
}

/// A function over parameters of any rank.
trait Mapping {
    fn param<const D: usize>(&mut self, name: &str, p: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// All adapters of one weight, in the order they were added.
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

    pub(crate) fn each(self, f: impl FnMut(Adapter) -> Adapter) -> Self {
        Self {
            adapters: self.adapters.into_iter().map(f).collect(),
        }
    }
}

const CONTAINER: &str = "Struct:Adapter";

impl Module for Adapter {
    fn collect_devices(&self, mut devices: Devices) -> Devices {
        self.each_param(&mut |_, p| {
            let d = std::mem::take(&mut devices);
            devices = match p {
                ParamRef::Matrix(p) => p.collect_devices(d),
                ParamRef::Vector(p) => p.collect_devices(d),
            };
        });
        devices
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.each_param(&mut |name, p| {
            visitor.enter_module(name, CONTAINER);
            match p {
                ParamRef::Matrix(p) => p.visit(visitor),
                ParamRef::Vector(p) => p.visit(visitor),
            }
            visitor.exit_module(name, CONTAINER);
        });
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

    /// `Param::val()` of an adapted weight: the dense `W + scale * B A`.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let Some(first) = self.active().next() else {
            return base;
        };
        let shape = base.shape();
        let base: Tensor<2> = match first.layout {
            WeightLayout::InOut => base.reshape([shape[0] as i32, -1]),
            WeightLayout::OutIn => base.reshape([shape[0] as i32, -1]).transpose(),
        };
        let weight = self.active().fold(base.clone(), |weight, adapter| {
            dropout::note_dense_path(adapter.spec.dropout, &adapter.name);
            adapter.apply(weight, &base)
        });
        match first.layout {
            WeightLayout::InOut => weight.reshape(shape),
            WeightLayout::OutIn => weight.transpose().reshape(shape),
        }
    }
}
