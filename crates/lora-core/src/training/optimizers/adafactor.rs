//! Adafactor as torch's `torch.optim.Adafactor` has it: the second moment of a matrix as a row times a column.
//!
//! It differs from Burn's in where the small number goes: it bounds the estimate, and is not added to what is averaged.
//!
//! Source: arXiv:1804.04235; torch 2.11 `torch/optim/_adafactor.py`. `relative_step` and `scale_parameter` are transformers'
//! names for the two factors that torch always applies.

use burn::optim::{Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Deserializer, Serialize};

use super::state::{flattened, lerp, number, restored};

/// Options of Adafactor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdafactorOptions {
    /// The second moment forgets by `1 - step^beta2_decay`.
    pub beta2_decay: f64,
    /// Bound below of the root of the second moment (`null` in JSON: the machine epsilon of f32), and of a parameter's root
    /// mean square.
    #[serde(deserialize_with = "with_epsilon_of_f32")]
    pub eps: [f64; 2],
    /// Bound above of an update's root mean square, before the learning rate.
    pub d: f64,
    /// Each step takes `learning_rate * weight_decay` of every parameter off.
    pub weight_decay: f64,
    /// The learning rate is at most `1 / sqrt(step)`.
    pub relative_step: bool,
    /// A step is scaled by the parameter's root mean square, at least `eps[1]`.
    pub scale_parameter: bool,
}

impl Default for AdafactorOptions {
    fn default() -> Self {
        Self {
            beta2_decay: -0.8,
            eps: [f64::from(f32::EPSILON), 1e-3],
            d: 1.0,
            weight_decay: 0.0,
            relative_step: true,
            scale_parameter: true,
        }
    }
}

fn with_epsilon_of_f32<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[f64; 2], D::Error> {
    let (first, second) = <(Option<f64>, f64)>::deserialize(deserializer)?;
    Ok([first.unwrap_or(f64::from(f32::EPSILON)), second])
}

/// Adafactor for one tensor.
#[derive(Clone)]
pub(super) struct Adafactor(pub(super) AdafactorOptions);

/// The second moment: of a matrix its rows `[.., rows, 1]` and columns `[.., 1, columns]`, of a vector itself.
#[derive(Clone)]
pub(super) struct State<const D: usize> {
    time: usize,
    moment: Tensor<D>,
    columns: Option<Tensor<D>>,
}

impl Optimizer for Adafactor {
    type State<const D: usize> = State<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<State<D>>,
    ) -> (Tensor<D>, Option<State<D>>) {
        let options = self.0;
        let time = state.as_ref().map_or(0, |state| state.time) + 1;
        let weight = (time as f64).powf(options.beta2_decay); // 1 in the first step
        let average = |before: Option<Tensor<D>>, now: Tensor<D>| match before {
            Some(before) => lerp(before, now, weight),
            None => now,
        };
        let squares = grad.clone().square();
        let (before, columns_before) = state.map(|s| (s.moment, s.columns)).unzip();
        let (moment, columns, estimate) = if D >= 2 {
            let rows = average(before, squares.clone().mean_dim(D - 1));
            let columns = average(columns_before.flatten(), squares.mean_dim(D - 2));
            let mean = rows.clone().mean_dim(D - 2).clamp_min(options.eps[0]);
            let estimate = rows.clone() * columns.clone() / mean;
            (rows, Some(columns), estimate)
        } else {
            let moment = average(before, squares);
            (moment.clone(), None, moment)
        };
        let update = grad / estimate.clamp_min(options.eps[0] * options.eps[0]).sqrt();
        let excess = (root_mean_square(update.clone()) / options.d).clamp_min(1.0);
        let rate = match options.relative_step {
            true => lr.min(1.0 / (time as f64).sqrt()),
            false => lr,
        };
        let factor = match options.scale_parameter {
            true => root_mean_square(tensor.clone()).clamp_min(options.eps[1]) / excess,
            false => excess.recip(),
        };
        let decayed = match options.weight_decay {
            0.0 => tensor,
            decay => tensor.mul_scalar(1.0 - lr * decay),
        };
        let tensor = decayed - update * (factor * rate).unsqueeze();
        let state = State {
            time,
            moment,
            columns,
        };
        (tensor, Some(state))
    }

    fn to_device<const D: usize>(state: State<D>, device: &Device) -> State<D> {
        State {
            moment: state.moment.to_device(device),
            columns: state.columns.map(|columns| columns.to_device(device)),
            ..state
        }
    }
}

fn root_mean_square<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    flattened(tensor).square().mean().sqrt()
}

impl<const D: usize> RecordState for State<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_scalar(prefix, "time", self.time.into());
        out.push_tensor(prefix, "moment", self.moment.clone().into_data());
        if let Some(columns) = &self.columns {
            out.push_tensor(prefix, "columns", columns.clone().into_data());
        }
    }

    fn state_unflatten(prefix: &str, from: &mut StateSource, device: &Device) -> Option<Self> {
        Some(Self {
            time: number(from, prefix, "time")?,
            moment: restored(from, prefix, "moment", device)?,
            columns: restored(from, prefix, "columns", device),
        })
    }
}
