//! The velocity network with the text encoders that are trained with it: what it reads are prompts as tokens, and gradients flow
//! through it into them.

use std::fmt::{self, Debug};

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::{Device, Tensor};
use lora_core::files::host::HostTensor;
use lora_core::training::recompute::Blocks;

use crate::error::WeightsError;
use crate::family::{Condition, Family, Network, TextModules, Velocity};
use crate::lora::{Component, ModelShape};

/// A velocity network and text encoders as one module: the network's parameters keep their paths, those of an encoder begin
/// with its folder.
#[derive(Debug)]
pub struct Prompted<F: Family> {
    /// The velocity network.
    pub network: F::Network,
    /// The text encoders that are not constants.
    pub text: Option<F::TextModules>,
}

/// The network that a parameter of a [`Prompted`] belongs to, by its path.
pub fn component_of(path: &str) -> Component {
    let folder = path.split('.').next();
    let of_text = [Component::ClipL, Component::T5].into_iter();
    let mut found = of_text.filter(|component| folder == Some(&component.to_string()));
    found.next().unwrap_or(Component::Transformer)
}

/// The tokens of a prompt for a family's text encoders.
pub type TokensOf<F> = <<F as Family>::TextModules as TextModules>::Tokens;

/// Prompts of a batch, for text encoders of which some are trained.
#[derive(Debug, Clone, Default)]
pub struct Prompts<T> {
    /// What the encoders made of them before the training, one row each; nothing where every encoder is trained.
    pub encoded: Vec<HostTensor>,
    /// Their tokens, where an encoder is trained.
    pub tokens: Vec<T>,
}

/// What [`Family::input`] takes, with the prompts not encoded yet.
pub struct PromptedInput<F: Family> {
    /// Noisy tokens of an image, `[batch, img_tokens, channels]`.
    pub tokens: Tensor<3>,
    /// Their grid.
    pub grid: [usize; 2],
    /// The prompts.
    pub prompts: Prompts<TokensOf<F>>,
    /// Noise level of each row.
    pub sigma: Vec<f32>,
    /// Guidance strength of each row.
    pub guidance: Vec<f32>,
    /// Pictures beside the prompts.
    pub condition: Condition,
}

impl<F: Family> Prompted<F> {
    /// Prompts as the text encoders read them now.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn text(
        &self,
        prompts: &Prompts<TokensOf<F>>,
        device: &Device,
    ) -> Result<F::Text, WeightsError> {
        match &self.text {
            None => Ok(F::text(prompts.encoded.clone(), device)),
            Some(text) => text.text(&prompts.tokens, &prompts.encoded, device),
        }
    }

    /// The architectures of all of it.
    pub fn shape(&self) -> ModelShape {
        let text = self.text.as_ref().map(F::TextModules::shape);
        let text = text.unwrap_or_default();
        ModelShape {
            clip: text.clip,
            t5: text.t5,
            ..self.network.shape()
        }
    }
}

impl<F: Family> Velocity for Prompted<F> {
    type Input = PromptedInput<F>;

    fn enter(&self, input: PromptedInput<F>) -> Result<(Self::Carry, Self::Shared), WeightsError> {
        let text = self.text(&input.prompts, &input.tokens.device())?;
        self.network.enter(F::input(
            input.tokens,
            input.grid,
            text,
            input.sigma,
            input.guidance,
            input.condition,
        ))
    }

    fn leave(&self, carry: Self::Carry, shared: &Self::Shared) -> Tensor<3> {
        self.network.leave(carry, shared)
    }
}

impl<F: Family> Blocks for Prompted<F> {
    type Block = <F::Network as Blocks>::Block;
    type Carry = <F::Network as Blocks>::Carry;
    type Shared = <F::Network as Blocks>::Shared;
    type Error = WeightsError;

    fn count(&self) -> usize {
        self.network.count()
    }

    fn block(&self, index: usize) -> Result<Self::Block, WeightsError> {
        self.network.block(index)
    }

    fn path(&self, index: usize) -> String {
        self.network.path(index)
    }

    fn apply(block: &Self::Block, carry: Self::Carry, shared: &Self::Shared) -> Self::Carry {
        F::Network::apply(block, carry, shared)
    }
}

impl<F: Family> Prompted<F> {
    /// The same of what a function makes of either part.
    fn each(
        self,
        network: impl FnOnce(F::Network) -> F::Network,
        text: impl FnOnce(F::TextModules) -> F::TextModules,
    ) -> Self {
        Self {
            network: network(self.network),
            text: self.text.map(text),
        }
    }
}

impl<F: Family> Module for Prompted<F> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self.network.collect_devices(devices);
        self.text.collect_devices(devices)
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.network.visit(visitor);
        self.text.visit(visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self {
            network: self.network.map(mapper),
            text: self.text.map(|text| text.map(mapper)),
        }
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|network| network.fork(device), |text| text.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        let network = |network: F::Network| network.to_device(device);
        self.each(network, |text| text.to_device(device))
    }

    fn train(self) -> Self {
        self.each(F::Network::train, F::TextModules::train)
    }

    fn valid(&self) -> Self {
        Self {
            network: self.network.valid(),
            text: self.text.as_ref().map(F::TextModules::valid),
        }
    }

    fn materialize(self) -> Self {
        self.each(F::Network::materialize, F::TextModules::materialize)
    }
}

// Derived, these would ask the same of the family itself.
impl<F: Family> Clone for Prompted<F> {
    fn clone(&self) -> Self {
        Self {
            network: self.network.clone(),
            text: self.text.clone(),
        }
    }
}

impl<F: Family> Clone for PromptedInput<F> {
    fn clone(&self) -> Self {
        Self {
            tokens: self.tokens.clone(),
            grid: self.grid,
            prompts: self.prompts.clone(),
            sigma: self.sigma.clone(),
            guidance: self.guidance.clone(),
            condition: self.condition.clone(),
        }
    }
}

impl<F: Family> Debug for PromptedInput<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PromptedInput")
            .field("grid", &self.grid)
            .field("prompts", &self.prompts)
            .field("sigma", &self.sigma)
            .finish_non_exhaustive()
    }
}
