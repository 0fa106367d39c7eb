//! `flux-lora bench full-size`: a whole training of a model of real dimensions, in the memory that `--limit` says.
//!
//! Writes a pipeline folder with random weights in bf16 (no published weight is needed for memory and time), then runs the
//! program itself: two pictures are encoded, steps are made and saved, a preview is rendered, the LoRA exported. A second run
//! goes on from the first save, is killed inside its step, resumed, and must end in the same bits. The GEMM rate is measured
//! right after the steps, on the shapes of the largest layers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::autoencoder::AutoencoderConfig;
use flux_model::flux1::config::FluxConfig;
use flux_model::flux2::config::{Flux2AutoencoderConfig, Flux2Config};
use flux_model::text::clip::ClipConfig;
use flux_model::text::decoder::DecoderConfig;
use flux_model::text::t5::T5Config;
use flux_model::weights::Compute;
use lora_core::ops::matmul;
use lora_core::random::Stream;
use serde::Serialize;
use serde_json::Value;

use super::pipeline::{Scratch, Training, write_pictures, write_pipeline};
use crate::cli::{FullSizeArgs, FullSizeModel};
use crate::dev::random_weights::copy_folder;
use crate::device;
use crate::output::say;

/// Runs it all, prints a table, and removes what was written unless it is to be kept.
///
/// # Errors
/// Too little room on the disk, a run that fails, or results that differ.
pub fn run(args: &FullSizeArgs) -> anyhow::Result<()> {
    let device = device::open(&args.device)?.device;
    if let Some(problem) = args.compute.problem(&device) {
        bail!("--compute {}: {problem}", args.compute);
    }
    let model = Model::new(args);
    let work = args.dir.join(format!("full-size-{}", args.model));
    let pipeline = work.join("pipeline");
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let scratch = Scratch {
        folder: work.clone(),
        is_kept: args.keep,
    };
    write_pipeline(model.template, &model.configs, &pipeline)?;
    let config = write_run(args, &work)?;

    let start = |run: &Path, resume| Training::start(&config, run, &args.device, resume);
    let straight = work.join("straight");
    let resumed = work.join("resumed");
    for run in [&straight, &resumed] {
        if run.exists() {
            fs::remove_dir_all(run).with_context(|| format!("remove {}", run.display()))?;
        }
    }
    say!(
        "\n{} ({}, computed in {}) on {} at {} px, {} text tokens, limit {}",
        args.model,
        args.base_dtype,
        args.compute,
        args.device,
        args.resolution,
        args.tokens,
        args.limit
    )?;
    let said = start(&straight, false)?.finish()?.text;
    let steps = numbers_after(&said, "s_per_step=\"");
    for line in said.lines().filter(|line| line.contains("memory")) {
        say!("{}", line.trim())?;
    }
    model.print_rate(args, &device, &steps)?;

    // From the first save of that run, killed inside the next step, resumed to its end.
    fs::create_dir_all(&resumed)?;
    let first = "ckpt-0000000001";
    for part in ["cache", first] {
        copy_folder(&straight.join(part), &resumed.join(part))?;
    }
    let log = fs::read_to_string(straight.join("metrics.jsonl"))?;
    let log: String = log
        .lines()
        .take(1)
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(resumed.join("metrics.jsonl"), log)?;
    let killed = start(&resumed, true)?;
    killed.kill_inside_a_step(Duration::from_secs_f64(
        steps.first().copied().unwrap_or(1.0) / 3.0,
    ))?;
    start(&resumed, true)?.finish()?;
    let last = format!("ckpt-{:010}", args.steps);
    for file in [
        "lora.safetensors".to_string(),
        format!("{last}/optimizer.safetensors"),
    ] {
        if fs::read(straight.join(&file))? != fs::read(resumed.join(&file))? {
            bail!("{file} of the run that was killed and resumed has other bits");
        }
    }
    say!("killed after step 1, resumed: the same bits")?;
    drop(scratch);
    Ok(())
}

/// Configurations of the parts, by the files that they are in.
struct Model {
    template: &'static str,
    configs: BTreeMap<&'static str, Value>,
    /// Width, blocks, and FLOPs of a block's linear layers for a token, in squares of the width.
    width: f64,
    blocks: f64,
    linears: f64,
}

impl Model {
    fn new(args: &FullSizeArgs) -> Self {
        let cut = |count: usize| args.layers.map_or(count, |layers| layers.min(count));
        match args.model {
            FullSizeModel::Dev | FullSizeModel::Schnell => {
                let config = match args.model {
                    FullSizeModel::Schnell => FluxConfig::schnell(),
                    _ => FluxConfig::dev(),
                };
                let config = FluxConfig {
                    num_layers: cut(config.num_layers),
                    num_single_layers: cut(config.num_single_layers),
                    ..config
                };
                let t5 = T5Config::xxl();
                let t5 = T5Config {
                    num_layers: cut(t5.num_layers),
                    ..t5
                };
                Self {
                    template: "tests/fixtures/parity/pipeline_dev/model",
                    width: config.hidden_size() as f64,
                    blocks: (config.num_layers + config.num_single_layers) as f64,
                    linears: 24.0,
                    configs: BTreeMap::from([
                        ("transformer/config.json", json(&config)),
                        ("vae/config.json", json(&AutoencoderConfig::flux())),
                        ("text_encoder/config.json", json(&ClipConfig::clip_l())),
                        ("text_encoder_2/config.json", json(&t5)),
                    ]),
                }
            }
            FullSizeModel::Klein4b => {
                let config = Flux2Config::klein_4b();
                let config = Flux2Config {
                    num_layers: cut(config.num_layers),
                    num_single_layers: cut(config.num_single_layers),
                    ..config
                };
                let qwen = DecoderConfig::qwen3_4b();
                let qwen = DecoderConfig {
                    num_hidden_layers: cut(qwen.num_hidden_layers),
                    ..qwen
                };
                Self {
                    template: "tests/fixtures/parity/flux2_pipeline_distilled/model",
                    width: config.hidden_size() as f64,
                    blocks: (config.num_layers + config.num_single_layers) as f64,
                    linears: 26.0,
                    configs: BTreeMap::from([
                        ("transformer/config.json", json(&config)),
                        ("vae/config.json", json(&Flux2AutoencoderConfig::default())),
                        ("text_encoder/config.json", json(&qwen)),
                    ]),
                }
            }
        }
    }

    /// Seconds of the fastest step beside what a GEMM of the same shape takes for the same work.
    fn print_rate(
        &self,
        args: &FullSizeArgs,
        device: &Device,
        steps: &[f64],
    ) -> anyhow::Result<()> {
        let side = f64::from(args.resolution) / 16.0;
        let tokens = side * side + args.tokens as f64;
        let forward = self.blocks * self.linears * tokens * self.width * self.width;
        let attention = self.blocks * 4.0 * tokens * tokens * self.width;
        // Forward and the gradients of inputs; attention's backward pass costs two forward passes.
        let needed = 2.0 * forward + 3.0 * attention;
        let rate = gemm_rate(device, args.compute, tokens as usize, self.width as usize)?;
        let step = steps.iter().copied().fold(f64::INFINITY, f64::min); // what else the machine does only adds
        say!(
            "step {step:.1} s of {:.2} TFLOP needed; GEMM {:.1} GFLOP/s: {:.2} times its time",
            needed / 1e12,
            rate / 1e9,
            step * rate / needed,
        )?;
        Ok(())
    }
}

fn json(config: &impl Serialize) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// FLOP/s of `[tokens, width] x [width, 4 * width]` in what the run computed in, the fastest of seven.
fn gemm_rate(
    device: &Device,
    compute: Compute,
    tokens: usize,
    width: usize,
) -> anyhow::Result<f64> {
    let matrix = |rows: usize, columns: usize| {
        let values = Stream::new(1, "gemm", 0, rows as u64).normals(columns);
        let row = Tensor::<2>::from_data(TensorData::new(values, [1, columns]), device);
        row.repeat(&[rows, 1]).cast(compute.dtype())
    };
    let (x, weight) = (matrix(tokens, width), matrix(width, 4 * width));
    let mut times = Vec::new();
    for _ in 0..7 {
        let started = Instant::now();
        let y = matmul(x.clone(), weight.clone());
        device
            .sync()
            .map_err(|error| anyhow::anyhow!("{error:?}"))?;
        drop(y);
        times.push(started.elapsed());
    }
    let fastest = times.iter().min().copied().unwrap_or_default();
    Ok(8.0 * (tokens * width * width) as f64 / fastest.as_secs_f64())
}

/// Two pictures with captions, and the configuration of the run.
fn write_run(args: &FullSizeArgs, work: &Path) -> anyhow::Result<PathBuf> {
    let pictures = [("a", "a red hill", 200), ("b", "a blue lake", 40)];
    write_pictures(&work.join("data"), args.resolution, &pictures)?;
    let config = work.join("run.toml");
    let text = format!(
        r#"[model]
path = "pipeline"
base_dtype = "{dtype}"
compute = "{compute}"
[dataset]
path = "data"
resolution = {side}
max_sequence_length = {tokens}
[train]
steps = {steps}
divergence_factor = "none"
[memory]
limit = "{limit}"
[checkpoint]
every = 1
[sample]
prompts = ["a red lake"]
every = {steps}
at_start = false
num_inference_steps = 1
height = {side}
width = {side}
"#,
        side = args.resolution,
        tokens = args.tokens,
        steps = args.steps,
        limit = args.limit,
        dtype = args.base_dtype,
        compute = args.compute,
    );
    fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
    Ok(config)
}

/// The numbers that follow `before` in a text.
fn numbers_after(text: &str, before: &str) -> Vec<f64> {
    let parts = text.split(before).skip(1);
    parts
        .filter_map(|rest| rest.split('"').next()?.parse().ok())
        .collect()
}
