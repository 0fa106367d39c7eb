//! `Adapter`: one named update of one parameter.
//!
//! Factors are kept as files store them, `lora_A: [r, in]` and `lora_B: [out, r]`, while Burn's linear weight is `[in, out]`.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::{DType, Device, Tensor};

use crate::kinds::factors::{Factor, Factors, Layer};
use crate::kinds::lora;
use crate::kinds::parts::{Kind, LORA_A, LORA_B, LORA_BIAS};
use crate::kinds::spec::AdapterSpec;
use crate::ops::linear::LowRank;
use crate::peft::config::InitLoraWeights;
use crate::site::Site;
use crate::training::dropout;

/// One named adapter on one parameter.
#[derive(Debug, Clone)]
pub(crate) struct Adapter {
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

    /// Strength times the scale of the [`AdapterSpec`].
    pub fn scale(&self) -> f64 {
        self.weight * self.spec.scale()
    }

    /// Whether it takes part in the forward pass.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// The type of its factors.
    pub(crate) fn dtype(&self) -> DType {
        let first = self.factors.iter().next();
        first.map_or(DType::F32, |(_, factor)| factor.dtype())
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
    pub(crate) fn apply(&self, weight: Tensor<2>, base: &Tensor<2>) -> Tensor<2> {
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

/// The container of a factor, as a walk over the model sees it.
const PART: &str = "lora-core part";

impl Module for Adapter {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let factors = self.factors.iter();
        factors.fold(devices, |devices, (_, factor)| {
            factor.collect_devices(devices)
        })
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (part, factor) in self.factors.iter() {
            visitor.enter_module(part.name, PART);
            factor.visit(visitor);
            visitor.exit_module(part.name, PART);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self {
            factors: self.factors.map(|part, factor| {
                mapper.enter_module(part.name, PART);
                let factor = factor.map(mapper);
                mapper.exit_module(part.name, PART);
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
