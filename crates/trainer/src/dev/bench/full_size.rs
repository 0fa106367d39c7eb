//! `flux-lora bench full-size`: a whole training of a model of real dimensions, in the memory that `--limit` says.
//!
//! Writes a pipeline folder with random weights in bf16 (no published weight is needed for memory and time), then runs the
//! program itself: two pictures are encoded, steps are made and saved, a preview is rendered, the LoRA exported. A second run
//! goes on from the first save, is killed inside its step, resumed, and must end in the same bits. The GEMM rate is measured
//! right after the steps, on the shapes of the largest layers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::tensor::{Tensor, TensorData};
use flux_model::autoencoder::AutoencoderConfig;
use flux_model::family::ComponentFile;
use flux_model::flux1::config::FluxConfig;
use flux_model::flux2::config::{Flux2AutoencoderConfig, Flux2Config};
use flux_model::text::clip::ClipConfig;
use flux_model::text::decoder::DecoderConfig;
use flux_model::text::t5::T5Config;
use image::RgbImage;
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::safetensors::write_streaming;
use lora_core::random::{Stream, name_hash};
use serde::Serialize;
use serde_json::Value;

use crate::cli::{FullSizeArgs, FullSizeModel};
use crate::dev::random_weights::{Fill, copy_folder, files_of, fill_of};
use crate::device;
use crate::output::say;

/// Runs it all, prints a table, and removes what was written unless it is to be kept.
///
/// # Errors
/// Too little room on the disk, a run that fails, or results that differ.
pub fn run(args: &FullSizeArgs) -> anyhow::Result<()> {
    let model = Model::new(args);
    let work = args.dir.join(format!("full-size-{}", args.model));
    let pipeline = work.join("pipeline");
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let scratch = Scratch {
        folder: work.clone(),
        is_kept: args.keep,
    };
    model.write_configurations(&pipeline)?;
    let mut files = files_of(&pipeline)?;
    files.retain(|(file, _)| !pipeline.join(file).is_file()); // written by a run before that was kept or interrupted
    if !files.is_empty() {
        check_room(&work, &files)?;
        let started = Instant::now();
        for (file, tensors) in files {
            write_weights(&pipeline.join(file), tensors)?;
        }
        say!(
            "pipeline written in {:.0} s",
            started.elapsed().as_secs_f64()
        )?;
    }
    let config = write_run(args, &work)?;

    let straight = work.join("straight");
    let resumed = work.join("resumed");
    for run in [&straight, &resumed] {
        if run.exists() {
            fs::remove_dir_all(run).with_context(|| format!("remove {}", run.display()))?;
        }
    }
    say!(
        "\n{} ({}) at {} px, {} text tokens, limit {}",
        args.model,
        args.base_dtype,
        args.resolution,
        args.tokens,
        args.limit
    )?;
    let said = Training::start(&config, &straight, false)?.finish()?;
    let steps = numbers_after(&said, "s_per_step=\"");
    for line in said.lines().filter(|line| line.contains("memory")) {
        say!("{}", line.trim())?;
    }
    model.print_rate(args, &steps)?;

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
    let killed = Training::start(&config, &resumed, true)?;
    killed.kill_inside_a_step(Duration::from_secs_f64(
        steps.first().copied().unwrap_or(1.0) / 3.0,
    ))?;
    Training::start(&config, &resumed, true)?.finish()?;
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

/// Removed at the end, whatever the end is.
struct Scratch {
    folder: PathBuf,
    is_kept: bool,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = fs::remove_dir_all(&self.folder); // what is left is seen
        }
    }
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

    /// The pipeline without weights: tokenizers and scheduler are those of a small bundled one.
    fn write_configurations(&self, folder: &Path) -> anyhow::Result<()> {
        let template = Path::new(self.template);
        if !template.is_dir() {
            bail!(
                "{} is not here: run this in the repository, with `cargo xtask bench full-size`",
                template.display()
            );
        }
        if !folder.is_dir() {
            let copy = folder.with_extension("part");
            copy_folder(template, &copy)?;
            for (file, _) in files_of(&copy)? {
                fs::remove_file(copy.join(file))?;
            }
            fs::rename(copy, folder)?;
        }
        for (file, config) in &self.configs {
            let path = folder.join(file);
            fs::write(&path, config.to_string())
                .with_context(|| format!("write {}", path.display()))?;
        }
        let index = folder.join("model_index.json");
        let text = fs::read_to_string(&index)?;
        fs::write(
            &index,
            text.replace(r#""is_distilled": true"#, r#""is_distilled": false"#),
        )?;
        Ok(())
    }

    /// Seconds of the fastest step beside what a GEMM of the same shape takes for the same work.
    fn print_rate(&self, args: &FullSizeArgs, steps: &[f64]) -> anyhow::Result<()> {
        let side = f64::from(args.resolution) / 16.0;
        let tokens = side * side + args.tokens as f64;
        let forward = self.blocks * self.linears * tokens * self.width * self.width;
        let attention = self.blocks * 4.0 * tokens * tokens * self.width;
        // Forward and the gradients of inputs; attention's backward pass costs two forward passes.
        let needed = 2.0 * forward + 3.0 * attention;
        let rate = gemm_rate(tokens as usize, self.width as usize)?;
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

/// FLOP/s of `[tokens, width] x [width, 4 * width]` in f32 on the default device, the fastest of seven.
fn gemm_rate(tokens: usize, width: usize) -> anyhow::Result<f64> {
    let device = device::open(device::default_name())?.device;
    let matrix = |rows: usize, columns: usize| {
        let values = Stream::new(1, "gemm", 0, rows as u64).normals(columns);
        let row = Tensor::<2>::from_data(TensorData::new(values, [1, columns]), &device);
        row.repeat(&[rows, 1])
    };
    let (x, weight) = (matrix(tokens, width), matrix(width, 4 * width));
    let mut times = Vec::new();
    for _ in 0..7 {
        let started = Instant::now();
        let y = x.clone().matmul(weight.clone());
        device
            .sync()
            .map_err(|error| anyhow::anyhow!("{error:?}"))?;
        drop(y);
        times.push(started.elapsed());
    }
    let fastest = times.iter().min().copied().unwrap_or_default();
    Ok(8.0 * (tokens * width * width) as f64 / fastest.as_secs_f64())
}

fn check_room(work: &Path, files: &[ComponentFile]) -> anyhow::Result<()> {
    let numbers = files.iter().flat_map(|(_, tensors)| tensors.values());
    let numbers: usize = numbers.map(|shape| shape.iter().product::<usize>()).sum();
    let needed = 2 * numbers as u64 + (2 << 30); // and two runs
    let free = fs4::available_space(work)
        .with_context(|| format!("ask for the free space of {}", work.display()))?;
    if needed > free {
        bail!(
            "{} has {:.1} GB free, and {:.1} GB are needed: choose another --dir",
            work.display(),
            free as f64 / 1e9,
            needed as f64 / 1e9
        );
    }
    say!(
        "writing {:.1} GB to {}",
        2.0 * numbers as f64 / 1e9,
        work.display()
    )?;
    Ok(())
}

/// A file of random weights in bf16, one tensor in memory at a time. The numbers of a tensor repeat after a prime number of
/// them: drawing twelve thousand million would take longer than what is measured.
fn write_weights(path: &Path, shapes: BTreeMap<String, Vec<usize>>) -> anyhow::Result<()> {
    const PERIOD: usize = 1_048_573;
    let normals = Stream::new(1, "full-size", 0, 0).normals(PERIOD);
    let layout: Vec<_> = shapes
        .iter()
        .map(|(name, shape)| (name.clone(), Dtype::Bf16, shape.clone()))
        .collect();
    let tensor = |name: &str| -> std::io::Result<HostTensor> {
        let shape = &shapes[name];
        let (std, constant) = match fill_of(name, shape) {
            Fill::Normal(std) => (std, 0.0),
            Fill::Constant(value) => (0.0, value),
        };
        let values: Vec<f32> = normals.iter().map(|v| v * std + constant).collect();
        let period = HostTensor::from_f32([PERIOD], &values)
            .cast(Dtype::Bf16)
            .bytes;
        let len = 2 * shape.iter().product::<usize>();
        let start = 2 * (name_hash(name) as usize % PERIOD);
        let mut bytes = Vec::with_capacity(len + period.len());
        bytes.extend_from_slice(&period[start..]);
        while bytes.len() < len {
            bytes.extend_from_slice(&period);
        }
        bytes.truncate(len);
        Ok(HostTensor {
            dtype: Dtype::Bf16,
            shape: shape.clone(),
            bytes,
        })
    };
    let write = || -> std::io::Result<()> {
        let part = path.with_extension("part");
        let mut out = BufWriter::new(File::create(&part)?);
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        write_streaming(&mut out, &layout, &metadata, tensor)?;
        out.flush()?;
        fs::rename(part, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Two pictures with captions, and the configuration of the run.
fn write_run(args: &FullSizeArgs, work: &Path) -> anyhow::Result<PathBuf> {
    let data = work.join("data");
    fs::create_dir_all(&data)?;
    for (name, caption, tint) in [("a", "a red hill", 200), ("b", "a blue lake", 40)] {
        let side = args.resolution;
        let picture = RgbImage::from_fn(side, side, |x, y| {
            image::Rgb([tint, (x * 255 / side) as u8, (y * 255 / side) as u8])
        });
        picture.save(data.join(format!("{name}.png")))?;
        fs::write(data.join(format!("{name}.txt")), caption)?;
    }
    let config = work.join("run.toml");
    let text = format!(
        r#"[model]
path = "pipeline"
base_dtype = "{dtype}"
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

/// `flux-lora train` in a process of its own.
struct Training {
    child: std::process::Child,
    run: PathBuf,
}

impl Training {
    fn start(config: &Path, run: &Path, resume: bool) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("train").arg(config).arg("--output").arg(run);
        if resume {
            command.arg("--resume");
        }
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start the training")?;
        Ok(Self {
            child,
            run: run.into(),
        })
    }

    /// Waits for the end; returns what was said, which is passed on line by line.
    fn finish(mut self) -> anyhow::Result<String> {
        let mut said = String::new();
        if let Some(lines) = self.child.stderr.take() {
            for line in BufReader::new(lines).lines() {
                let line = line?;
                eprintln!("  {line}");
                said += &line;
                said.push('\n');
            }
        }
        match self.child.wait()?.success() {
            true => Ok(said),
            false => bail!("the training in {} failed", self.run.display()),
        }
    }

    /// Kills it `after` it has begun to make steps.
    fn kill_inside_a_step(mut self, after: Duration) -> anyhow::Result<()> {
        if let Some(lines) = self.child.stderr.take() {
            for line in BufReader::new(lines).lines() {
                let line = line?;
                if line.contains("steps_per_epoch=") {
                    break;
                }
            }
        }
        sleep(after);
        if self.child.try_wait()?.is_some() {
            bail!(
                "the training in {} ended before it was killed",
                self.run.display()
            );
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}
