//! `flux-lora check`: what can be known of a run before it starts, in seconds, without a weight being read.
//!
//! What is refused here is refused by `train` and the other way round: both call the same functions. The rest is counted from
//! configurations, headers and the pictures themselves; what is only estimated says so.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context;
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use flux_model::lora::{Component, LoraFormat, Reading, WriteOptions, write};
use flux_model::pipeline::PipelineFolder;
use flux_model::prompted::Prompted;
use lora_core::peft::{InitLoraWeights, PeftType, TrainBias};
use lora_core::state::count_parameters;
use lora_core::{AdapterFile, LoraConfig};

use crate::config::{Loras, RunConfig};
use crate::data::bucket::{Bucket, buckets, nearest_bucket};
use crate::data::degradation::{cropped_and_enlarged, cut_texts};
use crate::data::sample::Sample;
use crate::data::samples::Samples;
use crate::data::scan::{Scan, scan};
use crate::device::{self, NamedDevice};
use crate::estimate::{self, device_speed, step_operations};
use crate::memory::{self, Need};
use crate::nearest::sentence;
use crate::previews::prompts_of;
use crate::progress;
use crate::run::adapter::{RunAdapter, plan_all, targeted_all, whole_of};
use crate::run::folder::RunDir;
use crate::run::resume::{Resume, find_checkpoint};
use crate::run::space;
use crate::train::{check_new, check_start, pipeline, refuse_distilled, trained};
use crate::workers::check_shares;

/// Memory of cards that people have, in bytes.
const CARDS: [(&str, u64); 4] = [
    ("a card of 8 GB", 8 << 30),
    ("a card of 12 GB", 12 << 30),
    ("a card of 16 GB", 16 << 30),
    ("a card of 24 GB", 24 << 30),
];
/// Percent of a card's memory that a run may take: the screen and the driver take the rest.
const CARD_SHARE: u64 = 92;

/// What was found: a table, and what would keep `train` from starting.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Name and value.
    pub(crate) rows: Vec<(&'static str, String)>,
    /// What is allowed and hardly meant, or lost of the data.
    pub(crate) notes: Vec<String>,
    /// Why the run would not start.
    pub(crate) problems: Vec<String>,
}

impl Report {
    fn row(&mut self, name: &'static str, value: impl Into<String>) {
        self.rows.push((name, value.into()));
    }

    /// The value, or a problem.
    fn take<T>(&mut self, result: anyhow::Result<T>) -> Option<T> {
        result
            .map_err(|error| self.problems.push(sentence(&error)))
            .ok()
    }
}

/// How the run is to be started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planned<'a> {
    /// The run folder.
    pub(crate) output: &'a Path,
    /// Device name, see [`device::open`].
    pub(crate) device: &'a str,
    /// Whether a network that was distilled to few steps is to be trained.
    pub(crate) distilled: bool,
    /// Whether the network must not be touched.
    pub(crate) offline: bool,
}

/// Checks a run of `config`.
///
/// # Errors
/// A model that cannot be opened: nothing else can be known then.
pub(crate) fn check(config: &RunConfig, planned: &Planned<'_>) -> anyhow::Result<Report> {
    struct Check<'a>(
        PipelineFolder,
        &'a RunConfig,
        &'a Planned<'a>,
        Vec<NamedDevice>,
    );
    impl Visitor for Check<'_> {
        type Output = anyhow::Result<Report>;
        fn visit<F: Family>(self) -> Self::Output {
            check_family(&F::open(self.0)?, self.1, self.2, &self.3)
        }
    }
    let devices = device::open_all(planned.device)?;
    let folder = pipeline(config, planned.offline)?;
    families::of_folder(&folder.clone(), Check(folder, config, planned, devices))?
}

fn check_family<F: Family>(
    family: &F,
    config: &RunConfig,
    planned: &Planned<'_>,
    devices: &[NamedDevice],
) -> anyhow::Result<Report> {
    let device = &devices[0];
    let config = &{
        let mut config = config.clone();
        config.lora.name_targets::<F>();
        config
    };
    let mut report = Report::default();
    report.row(
        "model",
        format!("{}, {}", F::NAME, family.folder().root().display()),
    );
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    report.row(
        "device",
        format!("{} ({})", names.join(", "), device.hardware),
    );
    report.take(check_shares(config, devices).map_err(Into::into));

    let run = report.take(RunDir::planned(planned.output).map_err(Into::into));
    if let Some(run) = &run {
        report.take(run.check_places().map_err(Into::into));
        report.take(find_checkpoint(run, &Resume::No));
    }
    if !planned.distilled {
        report.take(refuse_distilled(family).map_err(Into::into));
    }
    let samples = match report.take(scan(&config.dataset).map_err(Into::into)) {
        Some(Scan { samples, warnings }) => {
            report.notes.extend(warnings);
            samples
        }
        None => Vec::new(),
    };
    let outline = report.take(check_start(config, family, &samples, device));
    if !samples.is_empty()
        && let Some(samples) = report.take(Samples::new(config, samples.clone()))
    {
        let (trained, held_out) = samples.all.split_at(samples.trained);
        report.notes.extend(samples.warnings.iter().cloned());
        if config.validation.is_some() {
            report.row("held out", held_out.len().to_string());
        }
        data(&mut report, config, family, trained);
    }
    if let (Some(outline), Some(run)) = (outline, run) {
        let started = check_new(config, family, &run, &samples, &outline);
        if report.take(started).is_some() {
            adapter(&mut report, config, &outline)?;
            disk(&mut report, config, family, &run, &samples, &outline)?;
            cost(&mut report, config, family, &samples, &outline, devices)?;
        }
        if config.lora.peft_type == PeftType::Lora {
            let formats = formats(&outline, &config.lora.configs());
            if let Some(formats) = report.take(formats.context("the formats it can be written in"))
            {
                report.rows.extend(formats);
            }
        }
    }
    report.notes.extend(config.warnings());
    Ok(report)
}

/// Pictures, captions, sizes, and how they make steps.
fn data<F: Family>(report: &mut Report, config: &RunConfig, family: &F, samples: &[Sample]) {
    let captions: BTreeSet<&str> = samples
        .iter()
        .map(|sample| sample.caption.as_str())
        .collect();
    let empty = samples
        .iter()
        .filter(|sample| sample.caption.trim().is_empty());
    report.row("pictures", samples.len().to_string());
    report.row(
        "captions",
        format!("{} different, {} empty", captions.len(), empty.count()),
    );
    let texts = cut_texts(
        samples,
        &prompts_of(config, family),
        &config.dataset,
        family,
    );
    if let Some(texts) = report.take(texts) {
        report.row(
            "texts cut",
            if texts.cut.is_some() {
                "yes, see below"
            } else {
                "none"
            },
        );
        report
            .notes
            .extend(texts.cut.into_iter().chain(texts.pooled));
    }

    let mut sizes: BTreeMap<Bucket, usize> = BTreeMap::new();
    // what shares a batch has references of the same sizes too
    let mut alike: BTreeMap<(Bucket, Vec<Bucket>), usize> = BTreeMap::new();
    let mut cropped = 0.0;
    let folders = config.dataset.all_folders();
    let resolutions = config.dataset.resolution.as_slice();
    for &resolution in resolutions {
        let all = buckets(resolution, config.dataset.bucket_step);
        for sample in samples {
            let bucket = nearest_bucket(&all, sample.width_px, sample.height_px);
            cropped += bucket.cropped(sample.width_px, sample.height_px);
            let repeats = folders[sample.folder].repeats;
            *sizes.entry(bucket).or_default() += repeats;
            let references = sample.references.iter();
            let references =
                references.map(|picture| nearest_bucket(&all, picture.width_px, picture.height_px));
            *alike.entry((bucket, references.collect())).or_default() += repeats;
        }
    }
    let references: usize = samples.iter().map(|sample| sample.references.len()).sum();
    if references > 0 {
        report.row("references", references.to_string());
    }
    let masks = samples
        .iter()
        .filter(|sample| sample.mask.is_some())
        .count();
    if masks > 0 {
        report.row("masks", masks.to_string());
    }
    let listed: Vec<String> = sizes
        .iter()
        .map(|(bucket, count)| format!("{count} of {bucket}"))
        .collect();
    report.row("sizes", listed.join(", "));
    let mean = 100.0 * cropped / (samples.len() * resolutions.len()) as f64;
    report.row("cropped away", format!("{mean:.1} % of the pictures' area"));
    report
        .notes
        .extend(cropped_and_enlarged(samples, &config.dataset));

    let train = &config.train;
    let batches: usize = alike
        .values()
        .map(|count| count.div_ceil(train.batch_size))
        .sum();
    let per_epoch = batches as f64 / train.gradient_accumulation_steps as f64;
    report.row(
        "steps",
        format!(
            "{} of {} x {} pictures; {per_epoch:.1} steps an epoch, {:.1} epochs",
            train.steps,
            train.gradient_accumulation_steps,
            train.batch_size,
            train.steps as f64 / per_epoch
        ),
    );
}

/// What is trained.
fn adapter<F: Family>(
    report: &mut Report,
    config: &RunConfig,
    outline: &Prompted<F>,
) -> anyhow::Result<()> {
    let loras = config.lora.configs();
    let layers = targeted_all(outline, &loras)?;
    let total = count_parameters(outline).total;
    report.row(
        "parameters",
        format!("{:.1} million, frozen", total as f64 / 1e6),
    );
    let counts = layers.iter().map(|(component, layers)| match component {
        Component::Transformer => layers.len().to_string(),
        component => format!("{} of {component}", layers.len()),
    });
    report.row("layers adapted", counts.collect::<Vec<_>>().join(", "));
    // Splitting the base weight and DoRA's magnitudes read weights, of which there are none here; the first doubles the rank in
    // files only.
    let plain = |lora: &LoraConfig| LoraConfig {
        modules_to_save: Vec::new(),
        bias: TrainBias::None,
        use_dora: false,
        lora_dropout: 0.0,
        init_lora_weights: match lora.init_lora_weights.splits_base() {
            true => InitLoraWeights::Gaussian,
            false => lora.init_lora_weights,
        },
        ..lora.clone()
    };
    let fresh = loras
        .iter()
        .map(|(&component, lora)| (component, plain(lora).fresh(0)));
    let planned = RunAdapter::planned(&plan_all(outline, &fresh.collect())?, &loras);
    let factors: usize = planned.0.values().map(AdapterFile::numel).sum();
    let whole = whole_of(outline, &loras)?;
    let in_full = whole.values().sum::<usize>();
    let mut trainable = factors + in_full;
    if !whole.is_empty() {
        report.row(
            "trained in full",
            format!(
                "{} parameters, {:.3} million numbers: in checkpoints, PEFT's folder and, of FLUX.1, the run's LoRA",
                whole.len(),
                in_full as f64 / 1e6
            ),
        );
    }
    if config.lora.use_dora {
        let layers = layers.values().flat_map(BTreeMap::values);
        trainable += layers.map(|[_, outputs]| outputs).sum::<usize>();
    }
    report.row(
        "trainable",
        format!(
            "{:.3} million, {} as a file",
            trainable as f64 / 1e6,
            progress::shown(4 * trainable as u64)
        ),
    );
    Ok(())
}

/// Memory and time, estimated.
fn cost<F: Family>(
    report: &mut Report,
    config: &RunConfig,
    family: &F,
    samples: &[Sample],
    outline: &Prompted<F>,
    devices: &[NamedDevice],
) -> anyhow::Result<()> {
    let device = &devices[0];
    let count = trained(outline, config)?;
    let Some(plan) = report.take(memory::plan(config, family, samples, count, devices)) else {
        return Ok(());
    };
    let on_card = Need {
        keeps_results: false, // there are no kernels that do
        ..memory::need(config, family, samples, count, devices)?
    };
    report.row("memory (estimate)", plan.describe());
    report.notes.extend(plan.warning());
    for (name, gigabytes) in CARDS {
        let limit = gigabytes * CARD_SHARE / 100;
        let plan = on_card.plan(config, Some(limit), true);
        let fits = match plan.warning() {
            None => "fits",
            Some(_) => "does not fit",
        };
        report.row(name, format!("{fits}: {}", plan.describe()));
    }
    let recomputed = plan.recomputed.blocks as f64 / plan.blocks.max(1) as f64;
    let operations = step_operations(
        config,
        family,
        samples,
        &outline.network,
        recomputed,
        &device.device,
    )?;
    let seconds = operations / device_speed(&device.device, config.model.compute);
    report.row(
        "time (estimate)",
        format!(
            "about {} a step, {} in all, by how fast {} multiplies just now",
            estimate::shown(seconds),
            estimate::shown(seconds * config.train.steps as f64),
            device.name
        ),
    );
    Ok(())
}

fn disk<F: Family>(
    report: &mut Report,
    config: &RunConfig,
    family: &F,
    run: &RunDir,
    samples: &[Sample],
    outline: &Prompted<F>,
) -> anyhow::Result<()> {
    let trained = trained(outline, config)?;
    let (need, free) = space::need(config, family, run, samples, trained)?;
    report.row(
        "disk",
        format!(
            "about {} for encoded samples, {} for checkpoints; {} free",
            progress::shown(need.cache),
            progress::shown(need.checkpoints),
            progress::shown(free)
        ),
    );
    Ok(())
}

/// A program, and how many of the keys it loads as they are meant.
fn loads(reading: &Reading) -> String {
    let keys = reading.loads + reading.drops.len() + reading.differs.len();
    match reading.loads {
        0 => format!("{} none", reading.reader),
        loads if loads == keys => format!("{} all", reading.reader),
        loads => format!("{} {loads} of {keys}", reading.reader),
    }
}

/// How much of the LoRA each format holds, and who reads how much of that: it is written in each, at rank 1.
fn formats<F: Family>(
    outline: &Prompted<F>,
    loras: &Loras,
) -> anyhow::Result<Vec<(&'static str, String)>> {
    let small = |lora: &LoraConfig| LoraConfig {
        r: 1,
        modules_to_save: Vec::new(),
        bias: TrainBias::None,
        rank_pattern: Default::default(),
        alpha_pattern: Default::default(),
        use_dora: false,
        lora_dropout: 0.0,
        init_lora_weights: InitLoraWeights::Default,
        ..lora.clone()
    };
    let shape = outline.shape();
    let small: Loras = loras
        .iter()
        .map(|(&component, lora)| (component, small(lora)))
        .collect();
    let fresh = small
        .iter()
        .map(|(&component, lora)| (component, lora.clone().fresh(0)));
    let plans = plan_all(outline, &fresh.collect())?;
    let set = RunAdapter::planned(&plans, &small).set(shape);
    let folder = tempfile::tempdir().context("make a temporary folder")?;
    let options = WriteOptions {
        lossy: true,
        ..WriteOptions::default()
    };
    let rows = [
        ("as diffusers' file", LoraFormat::Diffusers),
        ("as PEFT's folder", LoraFormat::Peft),
        ("as kohya's file", LoraFormat::Kohya),
        ("as ComfyUI's file", LoraFormat::ComfyUi),
    ];
    let row = |(name, format)| {
        let path = folder.path().join(format!("{format}"));
        let value = match write(&set, format, &path, &options) {
            Ok(written) => {
                let lost = written.losses.len();
                let held = match written.losses.first() {
                    None => format!("all {} layers", set.len()),
                    Some(loss) => format!(
                        "{} of {} layers, not {}",
                        set.len() - lost,
                        set.len(),
                        loss.module
                    ),
                };
                let readers: Vec<String> = written.readings.iter().map(loads).collect();
                format!("{held}; keys loaded by {}", readers.join(", "))
            }
            Err(error) => format!("no: {error}"),
        };
        (name, value)
    };
    Ok(rows.map(row).to_vec())
}
