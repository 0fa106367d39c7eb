//! Schedule-free AdamW: no schedule, for what is used is an average of the steps rather than the last of them.
//!
//! Gradients are taken at `y`, which is what a training model holds; steps are taken from `z`; used is the average `x`, which
//! follows from both: `y = beta_1 x + (1 - beta_1) z`.
//!
//! Source: arXiv:2405.15682; schedulefree 1.4.1 `adamw_schedulefree.py`.

use burn::optim::{Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::state::{flattened, lerp, number, restored};

/// Options of schedule-free AdamW.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleFreeOptions {
    /// Share of the average in where gradients are taken, above 0; decay of the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay towards 0, of where gradients are taken.
    pub weight_decay: f64,
    /// Steps over which the learning rate rises.
    pub warmup_steps: u64,
    /// Step `k` counts `k^r` in the average ...
    pub r: f64,
    /// ... times this power of the largest learning rate so far.
    pub weight_lr_power: f64,
}

impl Default for ScheduleFreeOptions {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            warmup_steps: 0,
            r: 0.0,
            weight_lr_power: 2.0,
        }
    }
}

/// Schedule-free AdamW for one tensor.
#[derive(Clone)]
pub(crate) struct ScheduleFree(pub(super) ScheduleFreeOptions);

/// The state of one tensor, row by row.
#[derive(Clone)]
pub(crate) struct State {
    time: u64,
    weight_sum: f64,
    lr_max: f64,
    z: Tensor<1>,
    exp_avg_sq: Tensor<1>,
}

impl ScheduleFree {
    /// The average `x`, of a tensor that is `y`.
    pub(crate) fn average(&self, y: Tensor<1>, state: &State) -> Tensor<1> {
        lerp(y, state.z.clone(), 1.0 - 1.0 / self.0.betas[0])
    }
}

impl Optimizer for ScheduleFree {
    type State<const D: usize> = State;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<State>,
    ) -> (Tensor<D>, Option<State>) {
        let ScheduleFreeOptions {
            betas: [beta1, beta2],
            eps,
            weight_decay,
            warmup_steps,
            r,
            weight_lr_power,
        } = self.0;
        let shape = tensor.shape();
        let (y, grad) = (flattened(tensor), flattened(grad));
        let state = state.unwrap_or_else(|| State {
            time: 0,
            weight_sum: 0.0,
            lr_max: -1.0,
            z: y.clone(),
            exp_avg_sq: y.zeros_like(),
        });
        let time = state.time + 1;
        let lr = match time < warmup_steps {
            true => lr * (time as f64 / warmup_steps as f64),
            false => lr,
        };
        let lr_max = lr.max(state.lr_max);
        let weight = (time as f64).powf(r) * lr_max.powf(weight_lr_power);
        let weight_sum = state.weight_sum + weight;
        let share = match weight_sum {
            0.0 => 0.0,
            sum => weight / sum,
        };

        let second = grad.clone().square().mul_scalar(1.0 - beta2);
        let exp_avg_sq = state.exp_avg_sq.mul_scalar(beta2) + second;
        let correction = 1.0 - beta2.powf(time as f64);
        let denominator = (exp_avg_sq.clone() / correction).sqrt() + eps;
        let mut update = grad / denominator;
        if weight_decay != 0.0 {
            update = update + y.clone() * weight_decay;
        }
        let y =
            lerp(y, state.z.clone(), share) + update.clone() * (lr * (beta1 * (1.0 - share) - 1.0));
        let state = State {
            time,
            weight_sum,
            lr_max,
            z: state.z - update * lr,
            exp_avg_sq,
        };
        (y.reshape(shape), Some(state))
    }

    fn to_device<const D: usize>(state: State, device: &Device) -> State {
        State {
            z: state.z.to_device(device),
            exp_avg_sq: state.exp_avg_sq.to_device(device),
            ..state
        }
    }
}

impl RecordState for State {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_scalar(prefix, "time", self.time.into());
        out.push_scalar(prefix, "weight_sum", self.weight_sum.into());
        out.push_scalar(prefix, "lr_max", self.lr_max.into());
        out.push_tensor(prefix, "z", self.z.clone().into_data());
        out.push_tensor(prefix, "exp_avg_sq", self.exp_avg_sq.clone().into_data());
    }

    fn state_unflatten(prefix: &str, from: &mut StateSource, device: &Device) -> Option<Self> {
        Some(Self {
            time: number(from, prefix, "time")?,
            weight_sum: number(from, prefix, "weight_sum")?,
            lr_max: number(from, prefix, "lr_max")?,
            z: restored(from, prefix, "z", device)?,
            exp_avg_sq: restored(from, prefix, "exp_avg_sq", device)?,
        })
    }
}
