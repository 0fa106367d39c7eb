//! The model that benchmarks train, its adapter and its inputs: those of the project's torch baseline.
//!
//! 122 M base parameters, 2.1 M in the adapter, 256 image and 128 text tokens, f32.

use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::family::{Condition, Family, Network};
use lora_core::files::host::HostTensor;
use lora_core::peft::{InitLoraWeights, Targets};
use lora_core::random::Stream;
use lora_core::{LoraConfig, PathOptimizer, Training, attach};
use serde_json::{Value, json};

use crate::backward::MicroBatch;
use crate::loss::Penalty;
use crate::rule::Rule;
use crate::run::checkpoint::Progress;
use crate::step::Drawn;

pub(super) const IMAGE_SIDE: usize = 16;
pub(super) const TEXT_TOKENS: usize = 128;
pub(super) const HIDDEN: usize = 768;
pub(super) const BLOCKS: [usize; 2] = [3, 6];
const TEXT_WIDTH: usize = 1024;
const CHANNELS: usize = 16;

fn config() -> Value {
    json!({
        "num_layers": BLOCKS[0],
        "num_single_layers": BLOCKS[1],
        "attention_head_dim": HIDDEN / 12,
        "num_attention_heads": 12,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": 768,
        "guidance_embeds": true,
        "axes_dims_rope": [16, 24, 24],
    })
}

/// With random weights.
pub(super) fn network<F: Family>(device: &Device) -> anyhow::Result<F::Network> {
    let network = F::new_network(config(), device).map_err(anyhow::Error::msg)?;
    Ok(crate::dev::random_weights::fill_module(
        network, 1234, device,
    ))
}

/// About to train a LoRA of rank 16.
pub(super) fn training<F: Family>(
    network: F::Network,
) -> anyhow::Result<Training<F::Network, Progress>> {
    let targets = F::TARGETS.iter().chain(&["proj_mlp"]);
    let lora = LoraConfig {
        r: 16,
        lora_alpha: 16.0,
        target_modules: Targets::List(targets.map(|ending| String::from(*ending)).collect()),
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

/// How a step is made, with so many blocks computed again in the backward pass.
pub(super) fn rule(recomputed: usize, lr: f64) -> Rule {
    Rule {
        accumulation: 1,
        recomputed,
        seed: 1234,
        max_grad_norm: Some(1.0),
        lr,
        divergence_factor: None,
    }
}

/// The `nth` micro-batch: latents of a square image, halfway to noise, and a text.
pub(super) fn draw<F: Family>(nth: u64, device: &Device) -> Drawn<<F::Network as Network>::Input> {
    let normals = |name: &str, shape: &[usize]| {
        let values = Stream::new(1234, name, nth, 0).normals(shape.iter().product());
        HostTensor::from_f32(shape.to_vec(), &values)
    };
    let grid = [2 * IMAGE_SIDE; 2];
    let shape = [1, CHANNELS, grid[0], grid[1]];
    let tokens = |name: &str| {
        let values = normals(name, &shape).to_f32();
        F::pack(Tensor::from_data(TensorData::new(values, shape), device))
    };
    let (latents, noise) = (tokens("latents"), tokens("noise"));
    let text = vec![
        normals("txt", &[1, TEXT_TOKENS, TEXT_WIDTH]),
        normals("pooled", &[1, 768]),
    ];
    let input = F::input(
        latents.clone() * 0.4 + noise.clone() * 0.6,
        grid,
        F::text(text, device),
        vec![0.6],
        vec![3.5],
        Condition::default(),
    );
    Drawn {
        batch: MicroBatch {
            input,
            target: noise - latents,
            weights: vec![1.0],
            penalty: Penalty::Square,
        },
        about: Vec::new(),
        loss_of_zero: f64::INFINITY,
    }
}
