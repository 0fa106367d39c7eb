//! `flux-lora bench step`: one training step of a mid-size random model, with and without recompute, and without the
//! project's own kernels.
//!
//! The model, adapter and inputs are those of the project's torch baseline: 122 M base parameters, 2.1 M in the adapter,
//! 256 image and 128 text tokens, f32. Phases are wall time; GFLOP/s count the multiplications of linear layers and
//! attention that the maths needs (recompute does more).

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::families::{self, Visitor};
use flux_model::family::{Condition, Family, Network};
use lora_core::files::host::HostTensor;
use lora_core::ops::composed;
use lora_core::peft::{InitLoraWeights, Targets};
use lora_core::random::Stream;
use lora_core::state::count_parameters;
use lora_core::{LoraConfig, PathOptimizer, Training, attach};
use serde_json::{Value, json};

use super::{in_own_process, median, peak_rss_mib};
use crate::backward::MicroBatch;
use crate::cli::StepBenchArgs;
use crate::device::{self, NamedDevice};
use crate::loss::Penalty;
use crate::run::checkpoint::Progress;
use crate::step::{Drawn, Rule, step};

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
        let run = |recompute| {
            let work = TimeSteps {
                device: &device,
                variant,
                recompute,
                steps: args.steps.max(1),
            };
            families::named("flux1", work).context("no FLUX.1")?
        };
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

const HIDDEN: usize = 768;
const BLOCKS: [usize; 2] = [3, 6];
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

/// Times one variant on FLUX.1.
struct TimeSteps<'a> {
    device: &'a NamedDevice,
    variant: &'a str,
    recompute: bool,
    steps: usize,
}

impl Visitor for TimeSteps<'_> {
    type Output = anyhow::Result<()>;

    fn visit<F: Family>(self) -> Self::Output {
        let (raw, autodiff) = (&self.device.device, self.device.device.clone().autodiff());
        let model = F::new_network(config(), &autodiff).map_err(anyhow::Error::msg)?;
        let model = crate::dev::random_weights::fill_module(model, 1234, &autodiff);
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
        let mut training = Training {
            model: attach(model, lora.fresh(1234).fast())?,
            optimizer: PathOptimizer::new(adamw.build()),
            progress: Progress::default(),
        };
        let count = count_parameters(&training.model);
        let rule = Rule {
            accumulation: 1,
            recomputed: if self.recompute { usize::MAX } else { 0 },
            seed: 1234,
            max_grad_norm: Some(1.0),
            lr: 1e-4,
            divergence_factor: None,
        };

        let (mut gradient_time, mut total, mut losses) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..=self.steps {
            let started = Instant::now();
            let stepped = step(&mut training, &rule, |_| Ok(draw::<F>(&autodiff)))?;
            raw.sync().map_err(|error| anyhow::anyhow!("{error:?}"))?;
            if i > 0 {
                gradient_time.push(stepped.backward);
                total.push(started.elapsed());
                losses.push(stepped.losses[0]);
            }
        }
        let pairs = total.iter().zip(&gradient_time);
        let optimizer_time: Vec<Duration> =
            pairs.map(|(total, backward)| *total - *backward).collect();
        let seconds = median(&total);
        println!(
            "{} {:9}: base {:.1} M, LoRA {:.2} M; step {seconds:.3} s (forward+backward {:.3}, optimizer {:.3}; min {:.3}); {:.1} GFLOP/s; peak RSS {} MiB; loss {:.4} -> {:.4}",
            self.device.name,
            self.variant,
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
}

/// Latents of a square image, halfway to noise, and a text.
fn draw<F: Family>(device: &Device) -> Drawn<<F::Network as Network>::Input> {
    let normals = |name: &str, shape: &[usize]| {
        let values = Stream::new(1234, name, 0, 0).normals(shape.iter().product());
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

/// Forward, gradients of inputs, and of the adapter: linear layers cost 2, attention 3 forward passes.
fn flops() -> f64 {
    let (d, s) = (
        HIDDEN as f64,
        (IMAGE_SIDE * IMAGE_SIDE + TEXT_TOKENS) as f64,
    );
    let blocks = BLOCKS.iter().sum::<usize>() as f64;
    let linears = blocks * 24.0 * s * d * d;
    let attention = blocks * 4.0 * s * s * d;
    2.0 * linears + 3.0 * attention
}
