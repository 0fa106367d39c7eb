//! A pipeline of a model's dimensions with random weights, and the program itself that trains on it: what benchmarks of whole runs share.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use flux_model::family::ComponentFile;
use image::RgbImage;
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::safetensors::write_streaming;
use lora_core::random::{Stream, name_hash};
use serde_json::Value;

use crate::dev::random_weights::{Fill, copy_folder, files_of, fill_of};
use crate::output::say;

/// In the line that a run says before its first step.
const BEGINS: &str = "steps_per_epoch=";

/// Removed at the end, whatever the end is.
pub(super) struct Scratch {
    pub(super) folder: PathBuf,
    pub(super) is_kept: bool,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = fs::remove_dir_all(&self.folder); // what is left is seen
        }
    }
}

/// Writes a pipeline into `folder`: `template`, a small bundled one, with other configurations, by the files that they are in, and random
/// weights in bf16. Files of weights that are there stay: a run before was kept, or interrupted.
pub(super) fn write_pipeline(
    template: &str,
    configs: &BTreeMap<&'static str, Value>,
    folder: &Path,
) -> anyhow::Result<()> {
    write_configurations(template, configs, folder)?;
    let mut files = files_of(folder)?;
    files.retain(|(file, _)| !folder.join(file).is_file());
    if files.is_empty() {
        return Ok(());
    }
    check_room(folder, &files)?;
    let started = Instant::now();
    for (file, tensors) in files {
        write_weights(&folder.join(file), tensors)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(say!("pipeline written in {seconds:.0} s")?)
}

/// Pictures of `side` pixels with captions, in `folder`.
pub(super) fn write_pictures(
    folder: &Path,
    side: u32,
    pictures: &[(&str, &str, u8)],
) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    for (name, caption, tint) in pictures {
        let picture = RgbImage::from_fn(side, side, |x, y| {
            image::Rgb([*tint, (x * 255 / side) as u8, (y * 255 / side) as u8])
        });
        picture.save(folder.join(format!("{name}.png")))?;
        fs::write(folder.join(format!("{name}.txt")), caption)?;
    }
    Ok(())
}

/// The pipeline without weights: tokenizers and scheduler are those of a small bundled one.
fn write_configurations(
    template: &str,
    configs: &BTreeMap<&'static str, Value>,
    folder: &Path,
) -> anyhow::Result<()> {
    let template = Path::new(template);
    if !template.is_dir() {
        bail!(
            "{} is not here: run this in the repository, with `cargo xtask bench`",
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
    for (file, config) in configs {
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

/// `flux-lora train` in a process of its own.
pub(super) struct Training {
    child: Child,
    run: PathBuf,
    started: Instant,
}

/// What a training said, line by line.
pub(super) struct Said {
    pub(super) text: String,
    /// From the start of the program until it began to make steps.
    pub(super) began: Duration,
}

impl Training {
    pub(super) fn start(
        config: &Path,
        run: &Path,
        device: &str,
        resume: bool,
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("train").arg(config).arg("--output").arg(run);
        command.args(["--device", device]);
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
            started,
        })
    }

    /// Waits for the end; what is said is passed on too, line by line.
    pub(super) fn finish(mut self) -> anyhow::Result<Said> {
        let (mut text, mut began) = (String::new(), Duration::ZERO);
        if let Some(lines) = self.child.stderr.take() {
            for line in BufReader::new(lines).lines() {
                let line = line?;
                if line.contains(BEGINS) {
                    began = self.started.elapsed();
                }
                eprintln!("  {line}");
                text += &line;
                text.push('\n');
            }
        }
        match self.child.wait()?.success() {
            true => Ok(Said { text, began }),
            false => bail!("the training in {} failed", self.run.display()),
        }
    }

    /// Kills it `after` it has begun to make steps.
    pub(super) fn kill_inside_a_step(mut self, after: Duration) -> anyhow::Result<()> {
        if let Some(lines) = self.child.stderr.take() {
            for line in BufReader::new(lines).lines() {
                let line = line?;
                if line.contains(BEGINS) {
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
