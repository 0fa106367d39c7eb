//! The models that benchmarks train, their adapters and inputs.
//!
//! The baseline is that of the project's torch script: 122 M base parameters, 2.1 M in the adapter, 256 image and 128 text
//! tokens. The others have the dimensions of published models.

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::AdamWConfig;
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use flux_model::family::{Condition, Family, Network, Velocity};
use flux_model::flux1::config::FluxConfig;
use flux_model::flux2::config::Flux2Config;
use flux_model::weights::Compute;
use lora_core::files::host::HostTensor;
use lora_core::peft::{InitLoraWeights, Targets};
use lora_core::random::Stream;
use lora_core::training::recompute::Recomputed;
use lora_core::{LoraConfig, PathOptimizer, Training, attach};
use serde_json::{Value, json};

use crate::backward::MicroBatch;
use crate::cli::FullSizeModel;
use crate::dev::random_weights::{Fill, fill_of};
use crate::loss::Penalty;
use crate::rule::Rule;
use crate::run::checkpoint::Progress;
use crate::step::Drawn;

/// Of the adapter.
pub(super) const RANK: usize = 16;
/// How large the model and a micro-batch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// Width of a token.
    pub(super) hidden: usize,
    /// Double- and single-stream blocks.
    pub(super) blocks: [usize; 2],
    /// Samples.
    pub(super) batch: usize,
    /// Image tokens along each side.
    pub(super) image_side: usize,
    /// Text tokens of a sample, and their width.
    pub(super) text: [usize; 2],
}

impl Size {
    /// Of image and text, in a sample.
    pub(super) fn tokens(self) -> usize {
        self.image_side * self.image_side + self.text[0]
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
    hidden: 768,
    blocks: [3, 6],
    batch: 1,
    image_side: 16,
    text: [128, 1024],
};

/// Pixels that a token of an image covers, along each side.
const TOKEN_PX: u32 = 16;

/// `config.json` of a published transformer, and the size of a step of `batch` square pictures of `resolution` pixels with
/// captions of 512 tokens.
pub(super) fn published(model: FullSizeModel, batch: usize, resolution: u32) -> (Value, Size) {
    let size = |hidden, blocks, text_width| Size {
        hidden,
        blocks,
        batch,
        image_side: (resolution / TOKEN_PX) as usize,
        text: [512, text_width],
    };
    let flux1 = |config: FluxConfig| {
        let blocks = [config.num_layers, config.num_single_layers];
        let size = size(config.hidden_size(), blocks, config.joint_attention_dim);
        (json!(config), size)
    };
    match model {
        FullSizeModel::Dev => flux1(FluxConfig::dev()),
        FullSizeModel::Schnell => flux1(FluxConfig::schnell()),
        FullSizeModel::Klein4b => {
            let config = Flux2Config::klein_4b();
            let blocks = [config.num_layers, config.num_single_layers];
            let size = size(config.hidden_size(), blocks, config.joint_attention_dim);
            (json!(config), size)
        }
    }
}

/// The family of a published model.
pub(super) fn family(model: FullSizeModel) -> &'static str {
    match model {
        FullSizeModel::Dev | FullSizeModel::Schnell => "flux1",
        FullSizeModel::Klein4b => "flux2",
    }
}

/// `config.json` of a FLUX.1 of this size, with heads of 64 channels.
pub(super) fn config(size: Size) -> Value {
    json!({
        "num_layers": size.blocks[0],
        "num_single_layers": size.blocks[1],
        "attention_head_dim": 64,
        "num_attention_heads": size.hidden / 64,
        "joint_attention_dim": size.text[1],
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

/// One of these dimensions, whose random weights, matrices in `compute`, the device draws itself, and whose blocks compute in
/// it.
pub(super) fn drawn<F: Family>(
    config: Value,
    compute: Compute,
    device: &Device,
) -> anyhow::Result<F::Network> {
    let network = F::new_network(config, device).map_err(anyhow::Error::msg)?;
    device.seed(1234);
    let mut draw = Draw {
        path: Vec::new(),
        matrices: compute.dtype(),
        device,
    };
    Ok(network.map(&mut draw).with_compute(compute))
}

/// Gives each parameter the random weights that its name and shape ask for.
struct Draw<'a> {
    path: Vec<String>,
    matrices: DType,
    device: &'a Device,
}

impl ModuleMapper for Draw<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.lazy_shape();
        let in_file: Vec<usize> = shape.iter().rev().copied().collect(); // [out, in], here [in, out]
        let weights = match fill_of(&self.path.join("."), &in_file) {
            Fill::Normal(std) => {
                let normal = Distribution::Normal(0.0, f64::from(std));
                Tensor::<D>::random(shape, normal, self.device)
            }
            Fill::Constant(value) => Tensor::full(shape, value, self.device),
        };
        let weights = if D == 2 {
            weights.cast(self.matrices)
        } else {
            weights
        };
        Param::initialized(param.id, weights)
    }
}

/// Path endings of the layers that the LoRA adapts: the family's own, and in a FLUX.1 the MLP of single-stream blocks.
pub(super) fn targets<F: Family>() -> Vec<String> {
    let more = (F::NAME == "FLUX.1").then_some("proj_mlp");
    let targets = F::TARGETS.iter().copied().chain(more);
    targets.map(String::from).collect()
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
    let side = size.image_side;
    let (grid, channels) = match F::image_tokens([side; 2]) == side * side {
        true => ([side; 2], 128),
        false => ([2 * side; 2], 16), // tokens of two by two
    };
    let shape = [batch, channels, grid[0], grid[1]];
    let tokens = |name: &str| {
        let values = normals(name, &shape).to_f32();
        F::pack(Tensor::from_data(TensorData::new(values, shape), device))
    };
    let (latents, noise) = (tokens("latents"), tokens("noise"));
    let mut text = vec![
        normals("txt", &[batch, size.text[0], size.text[1]]),
        normals("pooled", &[batch, 768]),
    ];
    text.truncate(F::TEXT.len());
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
