//! `flux-lora bench lora-core`: a LoRA through this project's `lora-core`, beside Burn's own `apply_lora`, on the same model.
//!
//! The model is a chain of gated feed-forward layers of burn-nn, `x + down(silu(gate(x)) * up(x))`, every layer of which has a
//! LoRA of rank 16. A step is a forward pass and the gradients of the factors. Each way runs in a process of its own, in turns,
//! so that peak memory belongs to it.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::module::{Lora, Module};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::peft::{InitLoraWeights, Targets};
use lora_core::random::Stream;
use lora_core::training::recompute::{Blocks, Chain, Recomputed};
use lora_core::{Gradients, LoraConfig, attach, last_linear, linear};

use super::{in_own_process, median, peak_rss_mib};
use crate::cli::LoraCoreBenchArgs;
use crate::device;
use crate::output::say;

/// Ways of doing it; the first is what the others are compared with.
const WAYS: [&str; 4] = [
    "apply_lora",
    "lora-core",
    "lora-core, recompute",
    "lora-core, kept",
];
const RANK: usize = 16;

/// Times every way at every width, or one way in this process.
///
/// # Errors
/// What the system says; a way that is not known.
pub fn run(args: &LoraCoreBenchArgs) -> anyhow::Result<()> {
    if let Some(way) = &args.way {
        return one(way, args);
    }
    say!(
        "{} blocks, {} tokens; forward and backward pass",
        args.blocks,
        args.tokens
    )?;
    say!(
        "{:>6} {:<22} {:>9} {:>7} {:>10} {:>7}",
        "width",
        "",
        "seconds",
        "ratio",
        "peak MiB",
        "ratio"
    )?;
    for width in &args.widths {
        let mut times = vec![Vec::new(); WAYS.len()];
        let mut peaks = vec![0u64; WAYS.len()];
        for _ in 0..args.rounds.max(1) {
            for (i, way) in WAYS.iter().enumerate() {
                let (width, blocks) = (width.to_string(), args.blocks.to_string());
                let (tokens, steps) = (args.tokens.to_string(), args.steps.to_string());
                let output = in_own_process(&[
                    "lora-core",
                    "--way",
                    way,
                    "--widths",
                    &width,
                    "--blocks",
                    &blocks,
                    "--tokens",
                    &tokens,
                    "--steps",
                    &steps,
                ])?;
                let (seconds, peak) = output
                    .trim()
                    .split_once(' ')
                    .with_context(|| format!("bench {way} printed {output:?}"))?;
                times[i].push(Duration::from_secs_f64(seconds.parse()?));
                peaks[i] = peaks[i].max(peak.parse()?);
            }
        }
        for (i, way) in WAYS.iter().enumerate() {
            let (seconds, first) = (median(&times[i]), median(&times[0]));
            say!(
                "{width:>6} {way:<22} {seconds:>9.3} {:>7.2} {:>10} {:>7.2}",
                seconds / first,
                peaks[i],
                peaks[i] as f64 / peaks[0] as f64
            )?;
        }
    }
    Ok(())
}

#[derive(Module, Debug)]
struct Block {
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Model {
    blocks: Vec<Block>,
}

impl Model {
    fn new(width: usize, blocks: usize, device: &Device) -> Self {
        let layer = |inputs, outputs| {
            LinearConfig::new(inputs, outputs)
                .with_bias(false)
                .init(device)
        };
        let block = |_| Block {
            gate: layer(width, 4 * width),
            up: layer(width, 4 * width),
            down: layer(4 * width, width),
        };
        let model = Self {
            blocks: (0..blocks).map(block).collect(),
        };
        crate::dev::random_weights::fill_module(model, 1234, device)
    }
}

impl Blocks for Model {
    type Block = Block;
    type Carry = Tensor<2>;
    type Shared = Tensor<1>;
    type Error = Infallible;

    fn count(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, index: usize) -> Result<Block, Infallible> {
        Ok(self.blocks[index].clone())
    }

    fn path(&self, index: usize) -> String {
        format!("blocks.{index}")
    }

    fn apply(block: &Block, x: Tensor<2>, _: &Tensor<1>) -> Tensor<2> {
        let hidden = silu(linear(&block.gate, x.clone())) * linear(&block.up, x.clone());
        x + last_linear(&block.down, hidden)
    }
}

/// Runs one way; prints the median of its steps in seconds, and the peak memory of this process in MiB.
fn one(way: &str, args: &LoraCoreBenchArgs) -> anyhow::Result<()> {
    let [width] = args.widths.as_slice() else {
        bail!("one way takes one width");
    };
    let device = device::open(device::default_name())?.device;
    let model = Model::new(*width, args.blocks.max(1), &device.clone().autodiff());
    let values = Stream::new(1234, "lora-core", 0, 0).normals(args.tokens * width);
    let x = Tensor::<2>::from_data(TensorData::new(values, [args.tokens, *width]), &device);
    let config = LoraConfig {
        r: RANK,
        lora_alpha: RANK as f64,
        target_modules: Targets::Pattern("all-linear".into()),
        init_lora_weights: InitLoraWeights::Gaussian,
        ..LoraConfig::default()
    };
    let model = match way {
        "apply_lora" => model.apply_lora(Lora::new(RANK, RANK as f64)),
        _ => attach(model, config.fresh(1234).fast())?,
    };
    let step = || -> anyhow::Result<()> {
        let shared = Tensor::<1>::zeros([1], &device);
        let mut gradients = Gradients::default();
        match way {
            "apply_lora" => {
                let forward = |x: Tensor<2>, block: &Block| {
                    let hidden = silu(block.gate.forward(x.clone())) * block.up.forward(x.clone());
                    x + block.down.forward(hidden)
                };
                let y = model.blocks.iter().fold(x.clone().autodiff(), forward);
                gradients.take("", &model, &mut y.square().mean().backward());
            }
            "lora-core" => {
                let shared = shared.autodiff();
                let blocks = model.blocks.iter();
                let y = blocks.fold(x.clone().autodiff(), |x, block| {
                    Model::apply(block, x, &shared)
                });
                gradients.take("", &model, &mut y.square().mean().backward());
            }
            "lora-core, recompute" | "lora-core, kept" => {
                let all = Recomputed {
                    blocks: model.count(),
                    with_results: match way {
                        "lora-core, kept" => model.count(),
                        _ => 0,
                    },
                };
                let (chain, y) = Chain::run(&model, all, x.clone(), shared)?;
                let numel = y.shape().num_elements() as f64;
                chain.backward(y.mul_scalar(2.0 / numel), None, &mut gradients)?;
            }
            other => bail!("unknown way `{other}`: {}", WAYS.join(", ")),
        }
        let found = gradients.iter().count();
        if found != 6 * model.count() {
            bail!("{found} gradients were found, not those of all factors");
        }
        device.sync().map_err(|error| anyhow::anyhow!("{error:?}"))
    };
    step()?;
    let mut times = Vec::new();
    for _ in 0..args.steps.max(1) {
        let started = Instant::now();
        step()?;
        times.push(started.elapsed());
    }
    say!("{} {}", median(&times), peak_rss_mib().unwrap_or(0))?;
    Ok(())
}
