//! `flux-lora bench lora`: reads and writes a LoRA file of some gigabytes, beside a plain copy of it.
//!
//! The file is a LoRA in diffusers' form and bf16 on every linear layer of FLUX.1 dev. Each kind of work runs in a process
//! of its own, in turns, with the file in the page cache; what is written is synced to disk, by the copy too.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use flux_model::families::{self, Visitor};
use flux_model::family::{Family, Network};
use flux_model::lora::{Component, LoraFormat, ModelShape, ModuleShape, WriteOptions, read, write};
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::safetensors::write_streaming;
use lora_core::random::Stream;
use serde_json::json;

use super::{in_own_process, median, peak_rss_mib};
use crate::cli::LoraBenchArgs;
use crate::output::say;
use crate::{device, inspect};

/// What is timed, by its name; a format is converted to.
const WORK: [&str; 6] = ["copy", "inspect", "diffusers", "peft", "kohya", "comfyui"];

/// Makes the file and times every kind of work on it, or does one kind on the file that is there.
///
/// # Errors
/// What the system says; a kind of work that is not known.
pub fn run(args: &LoraBenchArgs) -> anyhow::Result<()> {
    if let (Some(work), Some(file)) = (&args.work, &args.file) {
        return one(work, file);
    }
    let folder = tempfile::tempdir_in(&args.dir)
        .with_context(|| format!("make a folder in {}", args.dir.display()))?;
    let file = folder.path().join("lora.safetensors");
    make(&file, args.rank.max(1))?;
    let (size, path) = (fs::metadata(&file)?.len(), file.to_string_lossy());
    say!(
        "a LoRA of rank {} and {:.2} GB",
        args.rank.max(1),
        size as f64 / 1e9
    )?;

    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut peaks: BTreeMap<&str, u64> = BTreeMap::new();
    for _ in 0..args.rounds.max(1) {
        for work in WORK {
            let output = in_own_process(&["lora", "--work", work, "--file", &path])?;
            let (seconds, peak) = output
                .trim()
                .split_once(' ')
                .with_context(|| format!("bench {work} printed {output:?}"))?;
            times
                .entry(work)
                .or_default()
                .push(Duration::from_secs_f64(seconds.parse()?));
            let highest = peaks.entry(work).or_default();
            *highest = peak.parse::<u64>()?.max(*highest);
        }
    }
    let copy = median(&times["copy"]);
    say!(
        "{:<10} {:>8} {:>8} {:>10}",
        "",
        "median s",
        "/ copy",
        "peak MiB"
    )?;
    for work in WORK {
        let seconds = median(&times[work]);
        say!(
            "{work:<10} {seconds:>8.2} {:>8.2} {:>10}",
            seconds / copy,
            peaks[work]
        )?;
    }
    Ok(())
}

/// Does one kind of work; prints its seconds and the peak memory of this process in MiB.
fn one(work: &str, file: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(file.parent().unwrap_or(Path::new(".")))?;
    let out = folder.path().join("out.safetensors");
    let started = Instant::now();
    match (work, LoraFormat::parse(work)) {
        ("copy", _) => {
            let mut to = File::create(&out)?;
            io::copy(&mut File::open(file)?, &mut to)?;
            to.sync_all()?;
        }
        ("inspect", _) => {
            inspect::describe(file)?;
        }
        (_, Some(format)) => {
            let set = read(file, &ModelShape::default())?;
            write(&set, format, &out, &WriteOptions::default())?;
        }
        _ => bail!("unknown work `{work}`: {}", WORK.join(", ")),
    }
    let seconds = started.elapsed().as_secs_f64();
    say!("{seconds} {}", peak_rss_mib().unwrap_or(0))?;
    Ok(())
}

/// The modules of the family's default architecture; nothing is allocated.
struct DefaultShape;

impl Visitor for DefaultShape {
    type Output = anyhow::Result<ModelShape>;

    fn visit<F: Family>(self) -> Self::Output {
        let device = device::open(device::default_name())?.device;
        let network = F::new_network(json!({}), &device).map_err(anyhow::Error::msg)?;
        Ok(network.shape())
    }
}

/// Streams the LoRA to `path`: normal numbers, of which the same million is used again and again.
fn make(path: &Path, rank: usize) -> anyhow::Result<()> {
    let shape = families::named("flux1", DefaultShape).context("no FLUX.1")??;
    let mut layout = Vec::new();
    for (module, shape) in shape.modules(Component::Transformer) {
        if let ModuleShape::Linear { out, input } = shape {
            let key = |part: &str| format!("transformer.{module}.{part}.weight");
            layout.push((key("lora_A"), Dtype::Bf16, vec![rank, input]));
            layout.push((key("lora_B"), Dtype::Bf16, vec![out, rank]));
        }
    }
    const BLOCK: usize = 1 << 20;
    let values = Stream::new(1234, "lora", 0, 0).normals(BLOCK);
    let block = HostTensor::from_f32([BLOCK], &values)
        .cast(Dtype::Bf16)
        .bytes;
    let shapes: BTreeMap<&str, &[usize]> = layout
        .iter()
        .map(|(name, _, shape)| (name.as_str(), shape.as_slice()))
        .collect();
    let mut out = BufWriter::new(File::create(path)?);
    write_streaming(&mut out, &layout, &BTreeMap::new(), |name| {
        let shape = shapes[name].to_vec();
        let bytes = 2 * shape.iter().product::<usize>();
        Ok::<_, io::Error>(HostTensor {
            dtype: Dtype::Bf16,
            bytes: block.iter().copied().cycle().take(bytes).collect(),
            shape,
        })
    })?;
    out.flush()?;
    out.get_ref().sync_all()?;
    Ok(())
}
