//! Prodigy: Adam that finds its own step size `d` while it goes; the learning rate is a factor on it, and stays 1.
//!
//! All tensors share `d`. It follows from what their gradients say of the way since the start, so an update has two passes:
//! [`Prodigy::adapt`] over all of them, then a step of each.
//!
//! Source: arXiv:2306.06101; prodigyopt 1.1.2 `prodigy.py`.

use std::num::NonZeroUsize;

use burn::optim::{Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Int, Tensor};
use burn_pack::Scalar;
use serde::{Deserialize, Serialize};

use super::state::{flattened, restored};

/// Options of Prodigy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProdigyOptions {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Decay of what `d` is found from; the root of `betas[1]` if absent.
    pub beta3: Option<f64>,
    /// Added to the root of the second moment, times `d`.
    pub eps: f64,
    /// Decay of the parameters.
    pub weight_decay: f64,
    /// Decay as AdamW does; else it is added to the gradient.
    pub decouple: bool,
    /// Adam's correction of the first steps.
    pub use_bias_correction: bool,
    /// Leave the learning rate out of what `d` is found from, for runs with a warm-up.
    pub safeguard_warmup: bool,
    /// The first `d`.
    pub d0: f64,
    /// Factor on the `d` that is found.
    pub d_coef: f64,
    /// `d` grows by at most this factor a step; unlimited if absent.
    pub growth_rate: Option<f64>,
    /// `d` is found from every so many-th element.
    pub slice_p: NonZeroUsize,
}

impl Default for ProdigyOptions {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.999],
            beta3: None,
            eps: 1e-8,
            weight_decay: 0.0,
            decouple: true,
            use_bias_correction: false,
            safeguard_warmup: false,
            d0: 1e-6,
            d_coef: 1.0,
            growth_rate: None,
            slice_p: NonZeroUsize::MIN,
        }
    }
}

/// What all tensors share.
#[derive(Debug, Clone, Copy)]
struct Shared {
    d: f64,
    d_max: f64,
    d_numerator: f64,
    /// Updates made.
    k: u64,
}

/// Prodigy, between [`adapt`](Self::adapt) and the steps that follow it.
#[derive(Debug, Clone)]
pub(crate) struct Prodigy {
    options: ProdigyOptions,
    shared: Shared,
    /// `d` before the last [`adapt`](Self::adapt), and the step size that it gave.
    before: (f64, f64),
    /// Whether that found anything to step along.
    moves: bool,
}

/// The state of one tensor, row by row; `start` and `s` of every `slice_p`-th element.
#[derive(Clone)]
pub(crate) struct State {
    start: Tensor<1>,
    s: Tensor<1>,
    exp_avg: Tensor<1>,
    exp_avg_sq: Tensor<1>,
}

impl Prodigy {
    pub(super) fn new(options: ProdigyOptions) -> Self {
        let shared = Shared {
            d: options.d0,
            d_max: options.d0,
            d_numerator: 0.0,
            k: 0,
        };
        Self {
            options,
            shared,
            before: (options.d0, 0.0),
            moves: false,
        }
    }

    fn step_size(&self, lr: f64) -> f64 {
        let [beta1, beta2] = self.options.betas;
        let next = (self.shared.k + 1) as f64;
        let correction = match self.options.use_bias_correction {
            true => (1.0 - beta2.powf(next)).sqrt() / (1.0 - beta1.powf(next)),
            false => 1.0,
        };
        self.shared.d * lr * correction
    }

    fn sliced(&self, tensor: Tensor<1>) -> Tensor<1> {
        let step = self.options.slice_p.get();
        if step == 1 {
            return tensor;
        }
        let [n] = tensor.dims();
        let every = Tensor::<1, Int>::arange_step(0..n as i64, step, &tensor.device());
        tensor.select(0, every)
    }

    fn with_decay(&self, tensor: &Tensor<1>, grad: Tensor<1>) -> Tensor<1> {
        match self.options.decouple || self.options.weight_decay == 0.0 {
            true => grad,
            false => grad + tensor.clone() * self.options.weight_decay,
        }
    }

    /// `s` after a gradient, of which every `slice_p`-th element is given; `d` and the step size as they were before it.
    fn s(&self, s: Tensor<1>, grad: Tensor<1>, (d, step_size): (f64, f64)) -> Tensor<1> {
        let beta3 = self.options.beta3.unwrap_or(self.options.betas[1].sqrt());
        let size = match self.options.safeguard_warmup {
            true => d,
            false => step_size,
        };
        s * beta3 + grad * (d / self.options.d0 * size)
    }

    fn first_state(&self, tensor: &Tensor<1>) -> State {
        let start = self.sliced(tensor.clone());
        State {
            s: start.zeros_like(),
            start,
            exp_avg: tensor.zeros_like(),
            exp_avg_sq: tensor.zeros_like(),
        }
    }

    /// What one tensor adds to the numerator and the denominator of `d`, as values to be summed.
    pub(crate) fn terms(
        &self,
        lr: f64,
        tensor: Tensor<1>,
        grad: Tensor<1>,
        state: Option<&State>,
    ) -> [Tensor<1>; 2] {
        let grad = self.sliced(self.with_decay(&tensor, grad));
        let state = state.cloned().unwrap_or_else(|| self.first_state(&tensor));
        let way = state.start - self.sliced(tensor);
        let s = self.s(state.s, grad.clone(), (self.shared.d, self.step_size(lr)));
        [grad * way, s.abs()]
    }

    /// Finds the next `d`, from the sums of what [`terms`](Self::terms) gave for every tensor.
    pub(crate) fn adapt(&mut self, lr: f64, [numerator, denominator]: [f64; 2]) {
        let ProdigyOptions {
            betas,
            beta3,
            d0,
            d_coef,
            growth_rate,
            ..
        } = self.options;
        let step_size = self.step_size(lr);
        let Shared { d, .. } = self.shared;
        self.before = (d, step_size);
        self.moves = lr > 0.0 && denominator > 0.0;
        if !self.moves {
            return;
        }
        let shared = &mut self.shared;
        shared.d_numerator *= beta3.unwrap_or(betas[1].sqrt());
        shared.d_numerator += d / d0 * step_size * numerator;
        let found = d_coef * shared.d_numerator / denominator;
        if d == d0 {
            shared.d = d.max(found);
        }
        shared.d_max = shared.d_max.max(found);
        shared.d = shared
            .d_max
            .min(shared.d * growth_rate.unwrap_or(f64::INFINITY));
        shared.k += 1;
    }

    /// `d`.
    pub(crate) fn step_size_found(&self) -> f64 {
        self.shared.d
    }

    /// What is shared, for saving.
    pub(crate) fn shared(&self) -> [(&'static str, Scalar); 4] {
        let Shared {
            d,
            d_max,
            d_numerator,
            k,
        } = self.shared;
        [
            ("d", d.into()),
            ("d_max", d_max.into()),
            ("d_numerator", d_numerator.into()),
            ("k", k.into()),
        ]
    }

    /// Goes on from what [`shared`](Self::shared) gave; false if it is not that.
    pub(crate) fn restore_shared(&mut self, value: impl Fn(&str) -> Option<Scalar>) -> bool {
        let float = |name| f64::try_from(value(name)?).ok().filter(|v| v.is_finite());
        let restored = || {
            Some(Shared {
                d: float("d")?,
                d_max: float("d_max")?,
                d_numerator: float("d_numerator")?,
                k: u64::try_from(value("k")?).ok()?,
            })
        };
        let restored = restored();
        self.shared = restored.unwrap_or(self.shared);
        restored.is_some()
    }
}

impl Optimizer for Prodigy {
    type State<const D: usize> = State;

    /// The step after [`Prodigy::adapt`].
    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<State>,
    ) -> (Tensor<D>, Option<State>) {
        let shape = tensor.shape();
        let tensor = flattened(tensor);
        let grad = self.with_decay(&tensor, flattened(grad));
        let mut state = state.unwrap_or_else(|| self.first_state(&tensor));
        if lr > 0.0 {
            let [beta1, beta2] = self.options.betas;
            let (d, _) = self.before;
            state.exp_avg = state.exp_avg * beta1 + grad.clone() * (d * (1.0 - beta1));
            let squares = grad.clone().square();
            state.exp_avg_sq = state.exp_avg_sq * beta2 + squares * (d * d * (1.0 - beta2));
            state.s = self.s(state.s, self.sliced(grad), self.before);
        }
        if !self.moves {
            return (tensor.reshape(shape), Some(state));
        }
        let (_, step_size) = self.before;
        let decayed = match self.options.weight_decay {
            decay if self.options.decouple && decay != 0.0 => {
                tensor.clone() + tensor * (-decay * step_size)
            }
            _ => tensor,
        };
        let denominator = state.exp_avg_sq.clone().sqrt() + self.shared.d * self.options.eps;
        let tensor = decayed - state.exp_avg.clone() / denominator * step_size;
        (tensor.reshape(shape), Some(state))
    }

    fn to_device<const D: usize>(state: State, device: &Device) -> State {
        State {
            start: state.start.to_device(device),
            s: state.s.to_device(device),
            exp_avg: state.exp_avg.to_device(device),
            exp_avg_sq: state.exp_avg_sq.to_device(device),
        }
    }
}

impl RecordState for State {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        for (name, tensor) in [
            ("start", &self.start),
            ("s", &self.s),
            ("exp_avg", &self.exp_avg),
            ("exp_avg_sq", &self.exp_avg_sq),
        ] {
            out.push_tensor(prefix, name, tensor.clone().into_data());
        }
    }

    fn state_unflatten(prefix: &str, from: &mut StateSource, device: &Device) -> Option<Self> {
        let mut tensor = |name| restored(from, prefix, name, device);
        Some(Self {
            start: tensor("start")?,
            s: tensor("s")?,
            exp_avg: tensor("exp_avg")?,
            exp_avg_sq: tensor("exp_avg_sq")?,
        })
    }
}
