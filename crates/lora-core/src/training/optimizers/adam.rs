//! The options of Adam and AdamW, and both for betas that are not the defaults.
//!
//! Burn's own keep the betas in f32, where `1 - 0.9999` is off by 2e-4 of itself: what 200 steps change is then off by 1.5e-5, and
//! with the default betas by 6e-6, where torch's f32 is off by 2e-6. The defaults stay with Burn, whose bits every run has that was
//! begun before. Here all that is no tensor is f64, and the state has the form of Burn's.
//!
//! Source: torch 2.8 `optim/adam.py` (`_single_tensor_adam`).

use burn::optim::{AdamWState, AdaptiveMomentumState, Optimizer};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::state::lerp;

/// Betas that Burn's f32 is near enough to.
pub(super) const DEFAULT_BETAS: [f64; 2] = [0.9, 0.999];

/// Options of AdamW, torch's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWOptions {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Each step takes `learning_rate * weight_decay` of every parameter off.
    pub weight_decay: f64,
    /// Divide by the largest second moment so far.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub amsgrad: bool,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self {
            betas: DEFAULT_BETAS,
            eps: 1e-8,
            weight_decay: 1e-2,
            amsgrad: false,
        }
    }
}

/// Options of Adam, torch's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamOptions {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// This much of every parameter is added to its gradient.
    pub weight_decay: f64,
    /// Divide by the largest second moment so far.
    pub amsgrad: bool,
}

impl Default for AdamOptions {
    fn default() -> Self {
        Self {
            betas: DEFAULT_BETAS,
            eps: 1e-8,
            weight_decay: 0.0,
            amsgrad: false,
        }
    }
}

/// Adam for one tensor.
#[derive(Clone)]
pub(super) struct Adam {
    options: AdamOptions,
    /// Whether weight decay shrinks the parameter, rather than joining the gradient.
    is_decoupled: bool,
}

impl From<AdamOptions> for Adam {
    fn from(options: AdamOptions) -> Self {
        Self {
            options,
            is_decoupled: false,
        }
    }
}

impl From<AdamWOptions> for Adam {
    fn from(options: AdamWOptions) -> Self {
        Self {
            options: AdamOptions {
                betas: options.betas,
                eps: options.eps,
                weight_decay: options.weight_decay,
                amsgrad: options.amsgrad,
            },
            is_decoupled: true,
        }
    }
}

impl Optimizer for Adam {
    type State<const D: usize> = AdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        mut tensor: Tensor<D>,
        mut grad: Tensor<D>,
        state: Option<AdamWState<D>>,
    ) -> (Tensor<D>, Option<AdamWState<D>>) {
        let AdamOptions {
            betas: [beta1, beta2],
            eps,
            weight_decay,
            amsgrad,
        } = self.options;
        if weight_decay != 0.0 {
            match self.is_decoupled {
                true => tensor = tensor * (1.0 - lr * weight_decay),
                false => grad = grad + tensor.clone() * weight_decay,
            }
        }
        let before = state.map(|state| state.momentum);
        let before = before
            .unwrap_or_else(|| AdaptiveMomentumState::new(0, grad.zeros_like(), grad.zeros_like()));
        let time = before.time + 1;
        let mut state = AdaptiveMomentumState::new(
            time,
            lerp(before.moment_1, grad.clone(), 1.0 - beta1),
            before.moment_2 * beta2 + grad.square() * (1.0 - beta2),
        );
        let mut second = state.moment_2.clone();
        if amsgrad {
            if let Some(largest) = before.max_moment_2 {
                second = largest.max_pair(second);
            }
            state.max_moment_2 = Some(second.clone());
        }
        let correction = |beta: f64| 1.0 - beta.powf(time as f64);
        let denominator = second.sqrt() / correction(beta2).sqrt() + eps;
        let step = lr / correction(beta1);
        let tensor = tensor - state.moment_1.clone() / denominator * step;
        (tensor, Some(AdamWState::new(state)))
    }

    fn to_device<const D: usize>(state: AdamWState<D>, device: &Device) -> AdamWState<D> {
        AdamWState::new(state.momentum.to_device(device))
    }
}
