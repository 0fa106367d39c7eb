//! Optimizers by the names people know them by, with the options and defaults of their reference implementations.
//!
//! Where Burn's own agrees with the reference it is used; the others have a file each. Whatever has a published version is
//! tested against it (`optimizer` reference cases).

mod adafactor;
mod adam;
mod adamw8bit;
pub(crate) mod prodigy;
pub(crate) mod schedule_free;
mod state;

use std::sync::Arc;

use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamConfig, AdamWConfig, DynOptimizer, LionConfig, Optimizer, SgdConfig};
use serde::{Deserialize, Serialize};

use self::adafactor::Adafactor;
pub use self::adafactor::AdafactorOptions;
use self::adam::{Adam, DEFAULT_BETAS};
pub use self::adam::{AdamOptions, AdamWOptions};
use self::adamw8bit::AdamW8bit;
pub use self::adamw8bit::AdamW8bitOptions;
use self::prodigy::Prodigy;
pub use self::prodigy::ProdigyOptions;
use self::schedule_free::ScheduleFree;
pub use self::schedule_free::ScheduleFreeOptions;

/// An optimizer by name, with its options; in JSON and TOML a table whose `name` is the name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay, arXiv:1711.05101.
    Adamw(AdamWOptions),
    /// The same with moments of 8 bits, arXiv:2110.02861.
    Adamw8bit(AdamW8bitOptions),
    /// Adam, arXiv:1412.6980.
    Adam(AdamOptions),
    /// Gradient descent, with momentum if asked for.
    Sgd(SgdOptions),
    /// The sign of a momentum, arXiv:2302.06675.
    Lion(LionOptions),
    /// Second moments as rows times columns, arXiv:1804.04235.
    Adafactor(AdafactorOptions),
    /// Adam that finds its own step size, arXiv:2306.06101.
    Prodigy(ProdigyOptions),
    /// AdamW without a schedule, arXiv:2405.15682.
    ScheduleFreeAdamw(ScheduleFreeOptions),
}

/// Options of gradient descent, torch's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdOptions {
    /// Share of the last update in the next; 0 for none.
    pub momentum: f64,
    /// Share of the gradient that momentum leaves out.
    pub dampening: f64,
    /// This much of every parameter is added to its gradient.
    pub weight_decay: f64,
    /// Nesterov's momentum.
    pub nesterov: bool,
}

/// Options of Lion, lion-pytorch's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LionOptions {
    /// Share of the momentum in the update, and its decay.
    pub betas: [f64; 2],
    /// Each step takes `learning_rate * weight_decay` of every parameter off.
    pub weight_decay: f64,
}

impl Default for LionOptions {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.99],
            weight_decay: 0.0,
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::Adamw(AdamWOptions::default())
    }
}

impl OptimizerConfig {
    /// Bytes of state for a parameter; what is far less than one is left out.
    pub fn state_bytes(&self) -> u64 {
        match self {
            Self::Adamw(AdamWOptions { amsgrad, .. }) | Self::Adam(AdamOptions { amsgrad, .. }) => {
                if *amsgrad {
                    12
                } else {
                    8
                }
            }
            Self::Adamw8bit(_) => 2,
            Self::Sgd(options) if options.momentum == 0.0 => 0,
            Self::Sgd(_) | Self::Lion(_) => 4,
            Self::Adafactor(_) => 0,
            Self::Prodigy(_) => 16,
            Self::ScheduleFreeAdamw(_) => 8,
        }
    }
}

/// How gradients become updates: any per-tensor optimizer of Burn, or one of [`OptimizerConfig`].
#[derive(Clone)]
pub struct UpdateRule(pub(crate) Kind);

#[derive(Clone)]
pub(crate) enum Kind {
    /// Every tensor by itself.
    Each(Arc<dyn DynOptimizer>),
    /// With a step size that all tensors share.
    Prodigy(Prodigy),
    /// With an average of the weights, which is what is used.
    ScheduleFree(ScheduleFree),
}

impl Kind {
    /// What makes the step of one tensor.
    pub(crate) fn of_tensors(&self) -> &dyn DynOptimizer {
        match self {
            Self::Each(optimizer) => optimizer.as_ref(),
            Self::Prodigy(prodigy) => prodigy,
            Self::ScheduleFree(schedule_free) => schedule_free,
        }
    }
}

impl<O: Optimizer> From<O> for UpdateRule {
    fn from(optimizer: O) -> Self {
        Self(Kind::Each(Arc::new(optimizer)))
    }
}

impl From<&OptimizerConfig> for UpdateRule {
    fn from(config: &OptimizerConfig) -> Self {
        match config {
            OptimizerConfig::Adamw(options) if options.betas != DEFAULT_BETAS => {
                Adam::from(*options).into()
            }
            OptimizerConfig::Adam(options) if options.betas != DEFAULT_BETAS => {
                Adam::from(*options).into()
            }
            OptimizerConfig::Adamw(options) => AdamWConfig::new()
                .with_beta_1(options.betas[0] as f32)
                .with_beta_2(options.betas[1] as f32)
                .with_epsilon(options.eps as f32)
                .with_weight_decay(options.weight_decay as f32)
                .with_amsgrad(options.amsgrad)
                .build()
                .into(),
            OptimizerConfig::Adam(options) => AdamConfig::new()
                .with_beta_1(options.betas[0] as f32)
                .with_beta_2(options.betas[1] as f32)
                .with_epsilon(options.eps as f32)
                .with_weight_decay(decay(options.weight_decay))
                .with_amsgrad(options.amsgrad)
                .build()
                .into(),
            OptimizerConfig::Sgd(options) => SgdConfig::new()
                .with_momentum((options.momentum != 0.0).then(|| {
                    MomentumConfig::new()
                        .with_momentum(options.momentum)
                        .with_dampening(options.dampening)
                        .with_nesterov(options.nesterov)
                }))
                .with_weight_decay(decay(options.weight_decay))
                .build()
                .into(),
            OptimizerConfig::Lion(options) => LionConfig::new()
                .with_beta_1(options.betas[0] as f32)
                .with_beta_2(options.betas[1] as f32)
                .with_weight_decay(options.weight_decay as f32)
                .build()
                .into(),
            OptimizerConfig::Adamw8bit(options) => AdamW8bit(*options).into(),
            OptimizerConfig::Adafactor(options) => Adafactor(*options).into(),
            OptimizerConfig::Prodigy(options) => Self(Kind::Prodigy(Prodigy::new(*options))),
            OptimizerConfig::ScheduleFreeAdamw(options) => {
                Self(Kind::ScheduleFree(ScheduleFree(*options)))
            }
        }
    }
}

fn decay(penalty: f64) -> Option<WeightDecayConfig> {
    (penalty != 0.0).then(|| WeightDecayConfig::new(penalty as f32))
}
