//! `flux-lora bench scaling`: how time and memory of a training step grow with blocks, batch and tokens.
//!
//! The model of `bench step` at half its width. Every size is a process of its own; times are CPU seconds of its steps, which a
//! busy machine disturbs little, the first step left out. Given is everything as a multiple of the smallest size, and so are the
//! multiplications that the maths needs: what grows as they do has no cost of its own.

use std::fs;
use std::path::Path;

use anyhow::Context;
use burn::tensor::Device;
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use lora_core::training::recompute::Recomputed;

use super::model::{self, BASELINE, Size};
use super::plot::{Panel, figure};
use super::{cpu_seconds, in_own_process, peak_rss_mib};
use crate::cli::ScalingBenchArgs;
use crate::device;
use crate::output::{print, say};
use crate::step::step;
use crate::workers::Workers;

/// What the others are compared with.
const BASE: Size = Size {
    hidden: 384,
    blocks: [1, 2],
    ..BASELINE
};
/// Multiples of the blocks.
const DEPTHS: [usize; 4] = [1, 2, 3, 4];
/// Samples.
const BATCHES: [usize; 4] = [1, 2, 3, 4];
/// Image tokens along a side: 256 to 1024 of them.
const SIDES: [usize; 4] = [16, 20, 26, 32];
/// Blocks that are computed again: none, all.
const NONE: usize = 0;
const ALL: usize = usize::MAX;

/// Measures one size, or all and prints a table of them.
///
/// # Errors
/// A system that does not tell times or memory, a file that cannot be written.
pub fn run(args: &ScalingBenchArgs) -> anyhow::Result<()> {
    if let Some(&[doubles, singles, batch, image_side, recomputed]) = args.size.as_deref() {
        let size = Size {
            blocks: [doubles, singles],
            batch,
            image_side,
            ..BASE
        };
        let work = TimeSteps {
            size,
            recomputed,
            steps: args.steps.max(1),
        };
        let (seconds, mib) = families::named("flux1", work).context("no FLUX.1")??;
        return Ok(say!("{seconds} {mib}")?);
    }
    let found = measured(args.steps)?;
    for panel in &found {
        print(panel)?;
    }
    if let Some(path) = &args.plot {
        write(path, &figure(&found))?;
    }
    Ok(())
}

fn write(path: &Path, svg: &str) -> anyhow::Result<()> {
    fs::write(path, svg).with_context(|| format!("write {}", path.display()))
}

fn measured(steps: usize) -> anyhow::Result<Vec<Panel>> {
    let deep = |n| Size {
        blocks: BASE.blocks.map(|blocks| n * blocks),
        ..BASE
    };
    let mut time = Panel::new("time", "blocks");
    let mut memory = Panel::new("peak memory", "blocks");
    let (mut none, mut all) = (Vec::new(), Vec::new());
    for depth in DEPTHS {
        let size = deep(depth);
        let plain = in_process(size, NONE, steps)?;
        let again = in_process(size, ALL, steps)?;
        time.x.push(size.blocks.iter().sum());
        none.push((plain.0, size.flops(), plain.1));
        all.push((again.0, size.flops(), again.1));
    }
    memory.x.clone_from(&time.x);
    time.add("recompute none", none.iter().map(|found| found.0));
    time.add("recompute all", all.iter().map(|found| found.0));
    time.add("multiplications", none.iter().map(|found| found.1));
    // Both memories as multiples of one number, so that they can be compared.
    let first = none.first().map_or(1.0, |found| found.2);
    memory.add_of("recompute none", first, none.iter().map(|found| found.2));
    memory.add_of("recompute all", first, all.iter().map(|found| found.2));
    let mut panels = vec![time];
    for (name, sizes) in [
        ("samples", BATCHES.map(|batch| Size { batch, ..BASE })),
        (
            "tokens",
            SIDES.map(|image_side| Size { image_side, ..BASE }),
        ),
    ] {
        let mut panel = Panel::new("time", name);
        let mut times = Vec::new();
        for size in sizes {
            times.push(in_process(size, NONE, steps)?.0);
            panel.x.push(match name {
                "samples" => size.batch,
                _ => size.tokens(),
            });
        }
        panel.add("recompute none", times.into_iter());
        panel.add("multiplications", sizes.iter().map(|size| size.flops()));
        panels.push(panel);
    }
    panels.push(memory);
    Ok(panels)
}

/// CPU seconds of a step and peak memory in MiB.
fn in_process(size: Size, recomputed: usize, steps: usize) -> anyhow::Result<(f64, f64)> {
    let [doubles, singles] = size.blocks;
    let size = [doubles, singles, size.batch, size.image_side, recomputed];
    let size = size.map(|number| number.to_string()).join(",");
    let steps = steps.to_string();
    let output = in_own_process(&["scaling", "--steps", &steps, "--size", &size])?;
    let numbers: Vec<f64> = output
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    let [seconds, mib] = numbers[..] else {
        anyhow::bail!("the process of size {size} printed `{output}`")
    };
    Ok((seconds, mib))
}

struct TimeSteps {
    size: Size,
    recomputed: usize,
    steps: usize,
}

impl Visitor for TimeSteps {
    type Output = anyhow::Result<(f64, u64)>;

    fn visit<F: Family>(self) -> Self::Output {
        let device = device::open(device::default_name())?.device.autodiff();
        let mut training = model::training::<F>(model::network_of::<F>(self.size, &device)?)?;
        let rule = model::rule(Recomputed::first(self.recomputed), 1e-4);
        let mut workers = Workers::alone(&device);
        let mut began = 0.0;
        for i in 0..=self.steps {
            if i == 1 {
                began = cpu_seconds()?; // the first step is not like the others
            }
            let draw = |_, device: &Device| Ok(model::draw_of::<F>(self.size, 0, device));
            step(&mut training, &rule, &mut workers, draw)?;
        }
        let seconds = (cpu_seconds()? - began) / self.steps as f64;
        let mib = peak_rss_mib().context("this system does not tell peak memory")?;
        Ok((seconds, mib))
    }
}
