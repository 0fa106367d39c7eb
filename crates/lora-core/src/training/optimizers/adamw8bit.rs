//! AdamW with moments of 8 bits: blocks of 256 values, each with its largest magnitude and a code per value.
//!
//! It is computed on the host, block by block, so that no moment is ever whole in f32, and every backend gets the same numbers.
//!
//! Source: arXiv:2110.02861; bitsandbytes 0.50 `functional.py` (`create_dynamic_map`), `backends/default/ops.py`
//! (`quantize_blockwise`), `backends/cpu/ops.py` (`_optimizer_update_8bit_blockwise_cpu`).

use std::sync::LazyLock;

use burn::optim::{Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::state::number;

/// Options of AdamW with moments of 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW8bitOptions {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Each step takes `learning_rate * weight_decay` of every parameter off.
    pub weight_decay: f64,
    /// Tensors of fewer elements keep moments of 32 bits.
    pub min_8bit_size: usize,
}

impl Default for AdamW8bitOptions {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 1e-2,
            min_8bit_size: 4096,
        }
    }
}

const BLOCK: usize = 256;

/// The values that codes stand for, rising, and the bounds between them.
struct Map {
    values: [f32; 256],
    bounds: [f32; 255],
}

/// For the first moment.
static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::dynamic(true));
/// For the second moment.
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::dynamic(false));

impl Map {
    /// Seven decades, each with twice the values of the one below; 0, and 1.
    fn dynamic(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for decade in 0..7 {
            let steps = (1 << decade) * if signed { 1 } else { 2 };
            let bounds: Vec<f32> = (0..=steps).map(|i| linspace(i, steps)).collect();
            let scale = 10f64.powi(decade - 6) as f32;
            for pair in bounds.windows(2) {
                let value = scale * ((pair[0] + pair[1]) / 2.0);
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let bound = |i: usize| (values[i] + values[i + 1]) / 2.0;
        Self {
            bounds: std::array::from_fn(bound),
            values: std::array::from_fn(|i| values[i]),
        }
    }

    /// The code of the nearest value.
    fn code(&self, value: f32) -> u8 {
        self.bounds.partition_point(|&bound| bound < value) as u8
    }

    fn decode(&self, codes: &[u8], absmax: f32, into: &mut [f32]) {
        for (value, &code) in into.iter_mut().zip(codes) {
            *value = self.values[usize::from(code)] * absmax;
        }
    }

    /// Puts the codes of a block and returns its largest magnitude.
    fn encode(&self, block: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = block.iter().fold(0f32, |most, value| most.max(value.abs()));
        let scale = 1.0 / absmax.max(1e-38);
        for (code, value) in codes.iter_mut().zip(block) {
            *code = self.code((value * scale).clamp(-1.0, 1.0));
        }
        absmax
    }
}

/// Value `i` of `steps + 1` from 0.1 to 1, counted from the nearer end as `torch.linspace` does.
fn linspace(i: i32, steps: i32) -> f32 {
    let step = (1.0 - 0.1f32) / steps as f32;
    match i < (steps + 1) / 2 {
        true => 0.1 + step * i as f32,
        false => 1.0 - step * (steps - i) as f32,
    }
}

/// A moment of one tensor.
#[derive(Clone)]
enum Moment {
    Full(Vec<f32>),
    Blocks { codes: Vec<u8>, absmax: Vec<f32> },
}

impl Moment {
    fn zeros(n: usize, map: &Map, min_8bit_size: usize) -> Self {
        match n < min_8bit_size {
            true => Self::Full(vec![0.0; n]),
            false => Self::Blocks {
                codes: vec![map.code(0.0); n],
                absmax: vec![0.0; n.div_ceil(BLOCK)],
            },
        }
    }

    /// Changes the values of block `index` by `f`.
    fn update(&mut self, map: &Map, index: usize, f: impl FnOnce(&mut [f32])) {
        let from = index * BLOCK;
        match self {
            Self::Full(values) => {
                let to = values.len().min(from + BLOCK);
                f(&mut values[from..to]);
            }
            Self::Blocks { codes, absmax } => {
                let to = codes.len().min(from + BLOCK);
                let codes = &mut codes[from..to];
                let mut values = [0.0; BLOCK];
                let values = &mut values[..codes.len()];
                map.decode(codes, absmax[index], values);
                f(values);
                absmax[index] = map.encode(values, codes);
            }
        }
    }
}

/// AdamW with moments of 8 bits, for one tensor.
#[derive(Clone)]
pub(super) struct AdamW8bit(pub(super) AdamW8bitOptions);

/// The state of one tensor, on the host.
#[derive(Clone)]
pub(super) struct State {
    time: u64,
    moment_1: Moment,
    moment_2: Moment,
}

impl Optimizer for AdamW8bit {
    type State<const D: usize> = State;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<State>,
    ) -> (Tensor<D>, Option<State>) {
        let AdamW8bitOptions {
            betas: [beta1, beta2],
            eps,
            weight_decay,
            min_8bit_size,
        } = self.0;
        let (shape, device) = (tensor.shape(), tensor.device());
        let (mut tensor, grad) = (values(tensor), values(grad));
        let n = tensor.len();
        let mut state = state.unwrap_or_else(|| State {
            time: 0,
            moment_1: Moment::zeros(n, &SIGNED, min_8bit_size),
            moment_2: Moment::zeros(n, &UNSIGNED, min_8bit_size),
        });
        state.time += 1;
        let time = state.time as f64;
        let step = (lr / (1.0 - beta1.powf(time))) as f32;
        let correction = (1.0 - beta2.powf(time)).sqrt() as f32;
        let (eps, keep) = (eps as f32, (1.0 - lr * weight_decay) as f32);
        let average = |before: &mut [f32], now: &[f32], beta: f64| {
            let (beta, rest) = (beta as f32, (1.0 - beta) as f32);
            for (before, now) in before.iter_mut().zip(now) {
                *before = *before * beta + now * rest;
            }
        };
        for (index, tensor) in tensor.chunks_mut(BLOCK).enumerate() {
            let grad = &grad[index * BLOCK..][..tensor.len()];
            let mut squares = [0.0; BLOCK];
            let squares = &mut squares[..tensor.len()];
            for (square, grad) in squares.iter_mut().zip(grad) {
                *square = grad * grad;
            }
            let State {
                moment_1, moment_2, ..
            } = &mut state;
            moment_1.update(&SIGNED, index, |first| {
                average(first, grad, beta1);
                moment_2.update(&UNSIGNED, index, |second| {
                    average(second, squares, beta2);
                    for ((value, first), second) in tensor.iter_mut().zip(first).zip(second) {
                        *value = *value * keep - step * *first / (second.sqrt() / correction + eps);
                    }
                });
            });
        }
        let tensor = Tensor::from_data(TensorData::new(tensor, shape), &device);
        (tensor, Some(state))
    }

    fn to_device<const D: usize>(state: State, _: &Device) -> State {
        state
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    data.try_into_vec().expect("converted to f32")
}

impl RecordState for State {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_scalar(prefix, "time", self.time.into());
        for (name, moment) in [("moment_1", &self.moment_1), ("moment_2", &self.moment_2)] {
            let mut push =
                |suffix: &str, data| out.push_tensor(prefix, &format!("{name}{suffix}"), data);
            match moment {
                Moment::Full(values) => push("", TensorData::new(values.clone(), [values.len()])),
                Moment::Blocks { codes, absmax } => {
                    push(".codes", TensorData::new(codes.clone(), [codes.len()]));
                    push(".absmax", TensorData::new(absmax.clone(), [absmax.len()]));
                }
            }
        }
    }

    fn state_unflatten(prefix: &str, from: &mut StateSource, _: &Device) -> Option<Self> {
        let time = number(from, prefix, "time")?;
        let mut moment = |name: &str| {
            if let Some(values) = from.take_tensor(prefix, name) {
                return Some(Moment::Full(values.try_into_vec().ok()?));
            }
            let mut part = |suffix| from.take_tensor(prefix, &format!("{name}{suffix}"));
            Some(Moment::Blocks {
                codes: part(".codes")?.try_into_vec().ok()?,
                absmax: part(".absmax")?.try_into_vec().ok()?,
            })
        };
        Some(Self {
            time,
            moment_1: moment("moment_1")?,
            moment_2: moment("moment_2")?,
        })
    }
}
