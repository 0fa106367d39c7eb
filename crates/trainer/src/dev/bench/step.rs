//! `flux-lora bench step`: one training step of a mid-size random model, with and without recompute, and without the
//! project's own kernels.
//!
//! The model, adapter and inputs are those of the project's torch baseline: 122 M base parameters, 2.1 M in the adapter,
//! 256 image and 128 text tokens, f32. Phases are wall time; GFLOP/s count the multiplications of linear layers and
//! attention that the maths needs (recompute does more).

use std::time::{Duration, Instant};

use anyhow::bail;
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::flux1::config::FluxConfig;
use flux_model::flux1::latent::{image_positions, text_positions};
use flux_model::flux1::transformer::{FluxInput, FluxTransformer};
use lora_core::ops::composed;
use lora_core::random::Stream;
use lora_core::{
    AdapterSource, DEFAULT_ADAPTER, ForwardPath, InitLoraWeights, LoraConfig, PathOptimizer, Plan,
    Targets, count_parameters,
};

use super::{in_own_process, median, peak_rss_mib};
use crate::backward::{MicroBatch, loss_and_gradients};
use crate::cli::StepBenchArgs;
use crate::config::LoraSection;
use crate::device::{self, NamedDevice};

const IMAGE_SIDE: usize = 16;
const TEXT_TOKENS: usize = 128;

/// Runs one variant, or each in a process of its own so that peak memory belongs to it.
///
/// # Errors
/// An unknown device or variant.
pub fn run(args: &StepBenchArgs) -> anyhow::Result<()> {
    let name = args.device.as_deref().unwrap_or(device::default_name());
    if let Some(variant) = &args.variant {
        let device = device::open(name)?;
        let run = |recompute| step(&device, variant, recompute, args.steps.max(1));
        return match variant.as_str() {
            "recompute" => run(true),
            "plain" => run(false),
            "composed" => composed(|| run(false)),
            other => bail!("unknown variant `{other}`: plain, recompute or composed"),
        };
    }
    for variant in ["plain", "recompute", "composed"] {
        let steps = args.steps.to_string();
        let output = in_own_process(&[
            "step",
            "--device",
            name,
            "--variant",
            variant,
            "--steps",
            &steps,
        ])?;
        print!("{output}");
    }
    Ok(())
}

fn config() -> FluxConfig {
    FluxConfig {
        num_layers: 3,
        num_single_layers: 6,
        attention_head_dim: 64,
        num_attention_heads: 12,
        joint_attention_dim: 1024,
        pooled_projection_dim: 768,
        guidance_embeds: true,
        axes_dims_rope: vec![16, 24, 24],
        ..FluxConfig::default()
    }
}

fn step(device: &NamedDevice, variant: &str, recompute: bool, steps: usize) -> anyhow::Result<()> {
    let raw = &device.device;
    let model = FluxTransformer::new(&config(), &raw.clone().autodiff());
    let model = crate::dev::random_weights::fill_module(model, 1234, &raw.clone().autodiff());
    let Targets::List(mut targets) = LoraSection::default().target_modules else {
        bail!("the default targets are a list")
    };
    targets.push("proj_mlp".into());
    let lora = LoraConfig {
        r: 16,
        lora_alpha: 16.0,
        target_modules: Targets::List(targets),
        init_lora_weights: InitLoraWeights::Gaussian,
        ..LoraConfig::default()
    };
    let source = AdapterSource::Fresh { seed: 1234 };
    let mut model = Plan::new(
        &model,
        DEFAULT_ADAPTER,
        Some(&lora),
        source,
        ForwardPath::Fast,
    )?
    .apply(model);
    let count = count_parameters(&model);
    let mut optimizer = PathOptimizer::new(
        AdamWConfig::new()
            .with_epsilon(1e-8)
            .with_weight_decay(1e-2)
            .build(),
    );

    let (mut gradient_time, mut optimizer_time, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..=steps {
        let started = Instant::now();
        let (loss, gradients) =
            loss_and_gradients(&model, batch(&raw.clone().autodiff()), 1, recompute)?;
        let norm = gradients.norm()?; // reads the gradients, so the device is done
        let backward = started.elapsed();
        model = optimizer.step(1e-4, model, gradients.clip(norm, 1.0))?;
        raw.sync().map_err(|error| anyhow::anyhow!("{error:?}"))?;
        if i > 0 {
            gradient_time.push(backward);
            optimizer_time.push(started.elapsed() - backward);
            losses.push(loss);
        }
    }
    let total: Vec<Duration> = gradient_time
        .iter()
        .zip(&optimizer_time)
        .map(|(a, b)| *a + *b)
        .collect();
    let seconds = median(&total);
    println!(
        "{} {variant:9}: base {:.1} M, LoRA {:.2} M; step {seconds:.3} s (forward+backward {:.3}, optimizer {:.3}; min {:.3}); {:.1} GFLOP/s; peak RSS {} MiB; loss {:.4} -> {:.4}",
        device.name,
        (count.total - count.trainable) as f64 / 1e6,
        count.trainable as f64 / 1e6,
        median(&gradient_time),
        median(&optimizer_time),
        total.iter().min().map_or(0.0, Duration::as_secs_f64),
        flops() / seconds / 1e9,
        peak_rss_mib().map_or("?".into(), |mib| mib.to_string()),
        losses[0],
        losses[losses.len() - 1],
    );
    Ok(())
}

fn batch(device: &Device) -> MicroBatch<FluxInput> {
    let config = config();
    let tokens = IMAGE_SIDE * IMAGE_SIDE;
    let normal = |name: &str, shape: [usize; 3]| {
        let values = Stream::new(1234, name, 0, 0).normals(shape.iter().product());
        Tensor::<3>::from_data(TensorData::new(values, shape), device)
    };
    let (latents, noise) = (
        normal("latents", [1, tokens, 64]),
        normal("noise", [1, tokens, 64]),
    );
    let mut positions = text_positions(TEXT_TOKENS);
    positions.extend(image_positions(2 * IMAGE_SIDE, 2 * IMAGE_SIDE));
    let input = FluxInput {
        img: latents.clone() * 0.4 + noise.clone() * 0.6,
        txt: normal("txt", [1, TEXT_TOKENS, config.joint_attention_dim]),
        pooled: normal("pooled", [1, 1, config.pooled_projection_dim]).flatten(0, 1),
        sigma: vec![0.6],
        guidance: vec![3.5],
        positions,
    };
    MicroBatch {
        input,
        target: noise - latents,
        weights: vec![1.0],
    }
}

/// Forward, gradients of inputs, and of the adapter: linear layers cost 2, attention 3 forward passes.
fn flops() -> f64 {
    let config = config();
    let (d, s) = (
        config.hidden_size() as f64,
        (IMAGE_SIDE * IMAGE_SIDE + TEXT_TOKENS) as f64,
    );
    let blocks = (config.num_layers + config.num_single_layers) as f64;
    let linears = blocks * 24.0 * s * d * d;
    let attention = blocks * 4.0 * s * s * d;
    2.0 * linears + 3.0 * attention
}
