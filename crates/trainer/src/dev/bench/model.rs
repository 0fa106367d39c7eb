//! The model that benchmarks train, its adapter and its inputs: those of the project's torch baseline.
//!
//! 122 M base parameters, 2.1 M in the adapter, 256 image and 128 text tokens, f32.

use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::family::{Condition, Family, Velocity};
use lora_core::files::host::HostTensor;
use lora_core::peft::{InitLoraWeights, Targets};
use lora_core::random::Stream;
use lora_core::training::recompute::Recomputed;
use lora_core::{LoraConfig, PathOptimizer, Training, attach};
use serde_json::{Value, json};

use crate::backward::MicroBatch;
use crate::loss::Penalty;
use crate::rule::Rule;
use crate::run::checkpoint::Progress;
use crate::step::Drawn;

/// Of the adapter.
pub(super) const RANK: usize = 16;
/// Of a sample.
pub(super) const TEXT_TOKENS: usize = 128;
const IMAGE_SIDE: usize = 16;
const HIDDEN: usize = 768;
const BLOCKS: [usize; 2] = [3, 6];
const TEXT_WIDTH: usize = 1024;
const CHANNELS: usize = 16;

/// How large the model and a micro-batch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// Width of a token, in heads of 64.
    pub(super) hidden: usize,
    /// Double- and single-stream blocks.
    pub(super) blocks: [usize; 2],
    /// Samples.
    pub(super) batch: usize,
    /// Image tokens along each side.
    pub(super) image_side: usize,
}

impl Size {
    /// Of image and text, in a sample.
    pub(super) fn tokens(self) -> usize {
        self.image_side * self.image_side + TEXT_TOKENS
    }

    /// Multiplications and additions of a step: forward, gradients of inputs, and of the adapter. Linear layers cost 2,
    /// attention 3 forward passes.
    pub(super) fn flops(self) -> f64 {
        let (d, s) = (self.hidden as f64, self.tokens() as f64);
        let blocks = (self.batch * self.blocks.iter().sum::<usize>()) as f64;
        let linears = blocks * 24.0 * s * d * d;
        let attention = blocks * 4.0 * s * s * d;
        2.0 * linears + 3.0 * attention
    }
}

/// The baseline's.
pub(super) const BASELINE: Size = Size {
    hidden: HIDDEN,
    blocks: BLOCKS,
    batch: 1,
    image_side: IMAGE_SIDE,
};

/// `config.json` of a transformer of this size.
pub(super) fn config(size: Size) -> Value {
    json!({
        "num_layers": size.blocks[0],
        "num_single_layers": size.blocks[1],
        "attention_head_dim": 64,
        "num_attention_heads": size.hidden / 64,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": 768,
        "guidance_embeds": true,
        "axes_dims_rope": [16, 24, 24],
    })
}

/// The baseline's, with random weights.
pub(super) fn network<F: Family>(device: &Device) -> anyhow::Result<F::Network> {
    network_of::<F>(BASELINE, device)
}

/// One of another size.
pub(super) fn network_of<F: Family>(size: Size, device: &Device) -> anyhow::Result<F::Network> {
    let network = F::new_network(config(size), device).map_err(anyhow::Error::msg)?;
    Ok(crate::dev::random_weights::fill_module(
        network, 1234, device,
    ))
}

/// Path endings of the layers that the LoRA adapts.
pub(super) fn targets<F: Family>() -> Vec<String> {
    let targets = F::TARGETS.iter().chain(&["proj_mlp"]);
    targets.map(|ending| String::from(*ending)).collect()
}

/// About to train a LoRA of rank [`RANK`].
pub(super) fn training<F: Family>(
    network: F::Network,
) -> anyhow::Result<Training<F::Network, Progress>> {
    let lora = LoraConfig {
        r: RANK,
        lora_alpha: RANK as f64,
        target_modules: Targets::List(targets::<F>()),
        init_lora_weights: InitLoraWeights::Gaussian,
        ..LoraConfig::default()
    };
    let adamw = AdamWConfig::new()
        .with_epsilon(1e-8)
        .with_weight_decay(1e-2);
    Ok(Training {
        model: attach(network, lora.fresh(1234).fast())?,
        optimizer: PathOptimizer::new(adamw.build()),
        progress: Progress::default(),
    })
}

/// How a step is made.
pub(super) fn rule(recomputed: Recomputed, lr: f64) -> Rule {
    Rule {
        accumulation: 1,
        recomputed,
        seed: 1234,
        max_grad_norm: Some(1.0),
        lr,
        divergence_factor: None,
    }
}

/// The `nth` micro-batch of the baseline: latents of a square image, halfway to noise, and a text.
pub(super) fn draw<F: Family>(nth: u64, device: &Device) -> Drawn<<F::Network as Velocity>::Input> {
    draw_of::<F>(BASELINE, nth, device)
}

/// One of another size.
pub(super) fn draw_of<F: Family>(
    size: Size,
    nth: u64,
    device: &Device,
) -> Drawn<<F::Network as Velocity>::Input> {
    let batch = size.batch;
    let normals = |name: &str, shape: &[usize]| {
        let values = Stream::new(1234, name, nth, 0).normals(shape.iter().product());
        HostTensor::from_f32(shape.to_vec(), &values)
    };
    let grid = [2 * size.image_side; 2];
    let shape = [batch, CHANNELS, grid[0], grid[1]];
    let tokens = |name: &str| {
        let values = normals(name, &shape).to_f32();
        F::pack(Tensor::from_data(TensorData::new(values, shape), device))
    };
    let (latents, noise) = (tokens("latents"), tokens("noise"));
    let text = vec![
        normals("txt", &[batch, TEXT_TOKENS, TEXT_WIDTH]),
        normals("pooled", &[batch, 768]),
    ];
    let input = F::input(
        latents.clone() * 0.4 + noise.clone() * 0.6,
        grid,
        F::text(text, device),
        vec![0.6; batch],
        vec![3.5; batch],
        Condition::default(),
    );
    Drawn {
        batch: MicroBatch {
            input,
            target: noise - latents,
            weights: vec![1.0; batch],
            penalty: Penalty::Square,
        },
        about: Vec::new(),
        loss_of_zero: f64::INFINITY,
    }
}
