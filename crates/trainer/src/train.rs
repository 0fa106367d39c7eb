//! The training run: prepare, loop, save. Read top to bottom.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use flux_model::families::{self, Visitor};
use flux_model::family::{Family, Network};
use flux_model::pipeline::PipelineFolder;
use flux_model::weights::Checkpoint;
use lora_core::attach::{NewAdapter, Plan, targeted};
use lora_core::peft::Targets;
use lora_core::state::count_parameters;
use lora_core::training::optimizers::UpdateRule;
use lora_core::{LoraConfig, LoraError, PathOptimizer, Training, attach};
use serde::Serialize;
use tracing::{info, warn};

use crate::adapters;
use crate::cli::UsageError;
use crate::condition::Pictures;
use crate::config::RunConfig;
use crate::data::batch::{Data, Order};
use crate::data::cache::Cache;
use crate::data::degradation::{cropped_and_enlarged, cut_texts};
use crate::data::digest::sample_digests;
use crate::data::file_digests::FileDigests;
use crate::data::scan::{Sample, Scan, scan};
use crate::device::{self, NamedDevice};
use crate::fingerprint::Fingerprint;
use crate::memory::{self, MemoryPlan, Peaks};
use crate::models::open_pipeline;
use crate::previews::{Previews, prompts_of};
use crate::progress;
use crate::run::checkpoint::{Opened, Progress, RunTraining, State, restore};
use crate::run::folder::RunDir;
use crate::run::resume::{Accepted, Resume, check_resume, find_checkpoint};
use crate::run::save::Saver;
use crate::run::space;
use crate::run::timings::Timing;
use crate::run::vfs::{RealFs, create_dir_durably};
use crate::step::{Rule, check_update, step};

/// How a run is started, besides its configuration.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// The run folder.
    pub output: PathBuf,
    /// Device name, see [`device::open`].
    pub device: String,
    /// Where to go on from.
    pub resume: Resume,
    /// What may differ from the part of the run before.
    pub accepted: Accepted,
    /// Train a network that was distilled to few steps.
    pub distilled: bool,
    /// Never touch the network.
    pub offline: bool,
    /// Set from outside to stop after the present step.
    pub stop: Arc<AtomicBool>,
}

impl TrainOptions {
    /// A new run in `output` on `device`.
    pub fn new(output: impl Into<PathBuf>, device: impl Into<String>) -> Self {
        Self {
            output: output.into(),
            device: device.into(),
            resume: Resume::No,
            accepted: Accepted::default(),
            distilled: false,
            offline: false,
            stop: Arc::default(),
        }
    }

    /// The same, resumed.
    #[must_use]
    pub fn resume(self, resume: Resume) -> Self {
        Self { resume, ..self }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done; the path is the finished LoRA.
    Finished {
        /// The LoRA file.
        lora: PathBuf,
    },
    /// Stopped from outside after this step, and saved.
    Stopped {
        /// Steps done.
        step: u64,
    },
}

/// Runs `config` to its end, or until it is stopped.
///
/// # Errors
/// Anything wrong with configuration, data, model, run folder or disk; what was saved before stays.
pub fn train(config: &RunConfig, options: &TrainOptions) -> anyhow::Result<Outcome> {
    struct Train<'a>(PipelineFolder, &'a RunConfig, &'a TrainOptions);
    impl Visitor for Train<'_> {
        type Output = anyhow::Result<Outcome>;
        fn visit<F: Family>(self) -> Self::Output {
            train_family(F::open(self.0)?, self.1, self.2)
        }
    }
    let folder = pipeline(config, options.offline)?;
    families::of_folder(&folder.clone(), Train(folder, config, options))?
}

fn train_family<F: Family>(
    family: F,
    config: &RunConfig,
    options: &TrainOptions,
) -> anyhow::Result<Outcome> {
    let config = &{
        let mut config = config.clone();
        config.lora.name_targets::<F>();
        config
    };
    let device = device::open(&options.device)?;
    let run = RunDir::open_or_create(&options.output)?;
    let lock = run.lock()?;
    let opened = find_checkpoint(&run, &options.resume)?
        .map(Opened::read)
        .transpose()?;

    let Scan { samples, warnings } = scan(&config.dataset)?;
    let digests = sample_digests(&samples);
    let cache_folder = run.cache_path();
    let mut known = FileDigests::load(&cache_folder);
    let base_model = known.of_all(&[family.folder().transformer_path().into()])?;
    let fingerprint = Fingerprint::of(&device).context("read the program to fingerprint it")?;
    let events = match &opened {
        Some(opened) => check_resume(
            opened,
            config,
            options.accepted,
            &digests,
            &base_model,
            &fingerprint,
        )?,
        None => Vec::new(),
    };
    run.check_places()?;
    let outline = check_start(config, &family, &samples, &device)?;
    let begin = match opened {
        Some(opened) => Begin::Resumed(Box::new(opened)),
        None => {
            if !options.distilled {
                refuse_distilled(&family)?;
            }
            Begin::New(check_new(config, &family, &run, &samples, &outline)?)
        }
    };
    let plan = memory::plan(
        config,
        &family,
        &samples,
        trained(&outline, config)?,
        &device,
    )?;
    info!("memory: {}", plan.describe());
    if let Some(warning) = plan.warning() {
        warn!("{warning}");
    }
    drop(outline);
    if matches!(begin, Begin::New(_)) || options.accepted.data {
        say_what_is_lost(warnings, &samples, config, &family)?;
    }

    // From here on the folder is written to: what is refused above leaves it as it was.
    lock.begin(&RealFs)?;
    create_dir_durably(&cache_folder)?;
    known.save()?;
    let mut peaks = Peaks::begin();
    let cache = Cache::build(
        &cache_folder,
        &samples,
        &config.dataset,
        &prompts_of(config, &family),
        &family,
        &device,
    )?;
    peaks.end("encode");

    let lora = config.lora.config();
    let optimizer = UpdateRule::from(&config.optimizer.rule);
    let model = family
        .network(plan.base, &device.device.clone().autodiff())
        .context("load the transformer")?;
    let mut training = match &begin {
        Begin::New(adapter) => start(model, adapter.clone(), optimizer)?,
        Begin::Resumed(opened) => {
            restore(opened.record()?, model, &lora, optimizer, &device.device)?
        }
    };
    let order = Order::new(&cache, config.train.batch_size, config.train.seed);
    let data = Data {
        order,
        table: family.scheduler().training_sigmas(),
        family: &family,
        cache: &cache,
        names: samples.iter().map(|sample| sample.name.clone()).collect(),
    };
    let state = State {
        progress: training.progress,
        epoch: 0,
        config: config.to_toml()?,
        base_model,
        samples: digests,
        fingerprint,
        events,
        optimizer: Default::default(),
    };
    let mut resumed = None;
    if let Begin::Resumed(opened) = begin {
        resumed = Some(opened.state.progress.step);
        lock.rewind_to(&RealFs, &opened.verified)?;
    }
    let mut saver = Saver::new(config, &lora, state, &data.order, &run, &lock, resumed)?;
    let previews = Previews::new(config, &cache, &family, &run)?;
    summary(config, &training, &data, &device);

    let autodiff = device.device.clone().autodiff();
    peaks.end("load");
    let mut report = progress::TrainReport::new(training.progress.step, config.train.steps);
    if training.progress.step == 0 && config.sample.as_ref().is_some_and(|sample| sample.at_start) {
        previews.render_if_due(&training, &report, &device)?;
    }
    while training.progress.step < config.train.steps {
        let started = Instant::now();
        let rule = rule(config, &plan, training.progress.step);
        let draw = |micro_step| data.draw(config, micro_step, &autodiff);
        let stepped = step(&mut training, &rule, draw)?;
        let accumulation = rule.accumulation as f64;
        let losses = stepped.losses.iter();
        let metrics = StepMetrics {
            step: training.progress.step,
            epoch: data
                .order
                .epoch(first_micro_step(config, training.progress.step - 1)),
            loss: losses.fold(0.0, |sum, &loss| sum + f64::from(loss) / accumulation),
            grad_norm: stepped.grad_norm,
            lr: rule.lr,
            d: training.optimizer.found_step_size(),
        };
        drop(stepped);
        let timing = Timing::of_step(metrics.step, started.elapsed());
        saver.log(&metrics, Some(&timing))?;
        report.step(metrics.loss, metrics.grad_norm, metrics.lr, &timing);

        let stopped = options.stop.load(Ordering::SeqCst);
        let last = training.progress.step == config.train.steps;
        if stopped
            || last
            || training
                .progress
                .step
                .is_multiple_of(config.checkpoint.every)
        {
            let last_micro_step = first_micro_step(config, training.progress.step) - 1;
            let drawn = data.draw(config, last_micro_step, &device.device)?;
            let (model, step) = (&training.model, training.progress.step);
            report.doing("saving");
            check_update(model, step, drawn, rule.divergence_factor)?;
            saver.save(&training)?;
        }
        peaks.end("train");
        if previews.render_if_due(&training, &report, &device)? {
            peaks.end("preview");
        }
        if stopped && !last {
            report.finish();
            saver.finish_logs();
            peaks.say();
            return Ok(Outcome::Stopped {
                step: training.progress.step,
            });
        }
    }
    report.finish();
    saver.finish_logs();
    let lora = saver.export(&training)?;
    peaks.end("export");
    peaks.say();
    Ok(Outcome::Finished { lora })
}

/// Whatever of the data is not used, or not as it is: said once, when it is first trained on.
fn say_what_is_lost<F: Family>(
    warnings: Vec<String>,
    samples: &[Sample],
    config: &RunConfig,
    family: &F,
) -> anyhow::Result<()> {
    let prompts = prompts_of(config, family);
    let texts = cut_texts(samples, &prompts, &config.dataset, family)?;
    let pictures = cropped_and_enlarged(samples, &config.dataset);
    for line in warnings.into_iter().chain(pictures).chain(texts.cut) {
        warn!("{line}");
    }
    if let Some(line) = texts.pooled {
        info!("{line}");
    }
    Ok(())
}

/// One line of `metrics.jsonl`: only what a resumed run would write again in the same bits, so no times.
#[derive(Debug, Serialize)]
struct StepMetrics {
    step: u64,
    epoch: u64,
    loss: f64,
    grad_norm: f64,
    lr: f64,
    /// The step size that Prodigy has found.
    #[serde(skip_serializing_if = "Option::is_none")]
    d: Option<f64>,
}

/// How the step after `step` steps is made.
fn rule(config: &RunConfig, plan: &MemoryPlan, step: u64) -> Rule {
    Rule {
        accumulation: config.train.gradient_accumulation_steps,
        recomputed: plan.recomputed,
        seed: config.train.seed,
        max_grad_norm: config.optimizer.max_grad_norm,
        lr: config.learning_rate(step),
        divergence_factor: config.train.divergence_factor,
    }
}

/// The first micro step after `step` steps.
fn first_micro_step(config: &RunConfig, step: u64) -> u64 {
    step * config.train.gradient_accumulation_steps as u64
}

/// Refuses a network that was distilled to few steps.
pub(crate) fn refuse_distilled<F: Family>(family: &F) -> Result<(), UsageError> {
    let Some(base) = family.distilled_from() else {
        return Ok(());
    };
    Err(UsageError(format!(
        "{} was distilled to few steps, and training undoes that: train on {base} (`hf download black-forest-labs/{base} --local-dir {base}`); the LoRA works on both. --yes-distilled trains on this one all the same",
        family.folder().root().display()
    )))
}

/// What a run goes on from.
enum Begin {
    New(NewAdapter),
    Resumed(Box<Opened>),
}

/// Finds what would go wrong later and can be known from configurations and headers; the model without its weights.
pub(crate) fn check_start<F: Family>(
    config: &RunConfig,
    family: &F,
    samples: &[Sample],
    device: &NamedDevice,
) -> anyhow::Result<F::Network> {
    for warning in config.warnings() {
        warn!("{warning}");
    }
    if let Some(problem) = config.model.base_dtype.problem(&device.device) {
        bail!("`model.base_dtype`: {problem}");
    }
    let outline = family
        .outline(&device.device)
        .context("open the transformer")?;
    if let Some(problem) = family.problem(&outline) {
        bail!("{problem}");
    }
    let references = samples.iter().any(|sample| !sample.references.is_empty());
    let pictures = Pictures {
        references: references.then_some("reference pictures (`dataset.reference`, or a list)"),
        mask: config.dataset.mask.is_some(),
        mask_name: "`dataset.mask`",
    };
    pictures.check(family, &outline)?;
    let sample = config.sample.as_ref();
    if let Some(path) = sample.and_then(|sample| sample.preview_vae.as_deref()) {
        let problem = family.preview_problem(path);
        if let Some(problem) = problem.context("open `sample.preview_vae`")? {
            bail!("`sample.preview_vae`: {}: {problem}", path.display());
        }
    }
    // Networks have a config.json; tokenizers are read with them.
    for path in family.encoder_paths() {
        if path.is_file() || path.join("config.json").is_file() {
            Checkpoint::open(&path)?;
        }
    }
    let step = family.pixel_step();
    for (key, side) in config.sides() {
        if !(side as usize).is_multiple_of(step) {
            bail!("`{key}` must be a multiple of {step} for this model, found {side}");
        }
    }
    Ok(outline)
}

/// How many numbers the adapter trains, by the layers it is for.
pub(crate) fn trained<N: Network>(outline: &N, config: &RunConfig) -> anyhow::Result<usize> {
    let lora = config.lora.config();
    let layers =
        targeted(outline, &lora).map_err(|error| explain_targets(error, &lora.target_modules))?;
    let layers = layers.into_iter().map(|(layer, [inputs, outputs])| {
        let (rank, _) = lora.resolve(&layer)?;
        Ok(rank * (inputs + outputs))
    });
    layers.sum()
}

/// The same for what only a run that begins needs: layers and ranks, the file it continues from, room on the disk. (A
/// checkpoint fits its model, and a save takes the place of another.)
pub(crate) fn check_new<F: Family>(
    config: &RunConfig,
    family: &F,
    run: &RunDir,
    samples: &[Sample],
    outline: &F::Network,
) -> anyhow::Result<NewAdapter> {
    let lora = config.lora.config();
    let layers =
        targeted(outline, &lora).map_err(|error| explain_targets(error, &lora.target_modules))?;
    space::check(config, family, run, samples, &layers)?;
    let adapter = adapter(config, &lora, outline)?;
    // The magnitudes of DoRA are those of the weights, which an outline has not.
    if config.lora.init_from.is_some() && !lora.use_dora {
        Plan::new(outline, adapter.clone())?;
    }
    Ok(adapter)
}

/// The adapter of a run that begins; `model` may be an outline.
fn adapter<N: Network>(
    config: &RunConfig,
    lora: &LoraConfig,
    model: &N,
) -> anyhow::Result<NewAdapter> {
    let Some(path) = &config.lora.init_from else {
        return Ok(lora.clone().fresh(config.train.seed).fast());
    };
    let file = adapters::to_train_on(path, &model.shape(), lora).context("`lora.init_from`")?;
    Ok(file.stored().agreeing_with(lora).fast())
}

/// Says what is meant by a string, where it names no layer.
fn explain_targets(error: LoraError, targets: &Targets) -> anyhow::Error {
    match targets {
        Targets::Pattern(pattern) if matches!(error, LoraError::NoMatch { .. }) => anyhow!(
            "{error}: `lora.target_modules` = \"{pattern}\" is a string, so a pattern for whole paths; for every layer whose path ends so, write a list: [\"{pattern}\"]"
        ),
        _ => error.into(),
    }
}

/// A run that has made no step.
fn start<N: Network>(
    model: N,
    adapter: NewAdapter,
    optimizer: UpdateRule,
) -> anyhow::Result<RunTraining<N>> {
    Ok(Training {
        model: attach(model, adapter)?,
        optimizer: PathOptimizer::new(optimizer),
        progress: Progress::default(),
    })
}

/// The pipeline folder, with the single files that the configuration puts in place of its components.
///
/// # Errors
/// See [`open_pipeline`].
pub fn pipeline(config: &RunConfig, offline: bool) -> anyhow::Result<PipelineFolder> {
    let model = &config.model;
    open_pipeline(
        &model.path,
        model.transformer.as_deref(),
        model.vae.as_deref(),
        offline,
    )
    .context("open `model.path`")
}

/// What is about to happen; most mis-set runs show here.
fn summary<F: Family>(
    config: &RunConfig,
    training: &RunTraining<F::Network>,
    data: &Data<'_, F>,
    device: &NamedDevice,
) {
    let count = count_parameters(&training.model);
    let accumulation = config.train.gradient_accumulation_steps as u64;
    info!(
        device = device.name,
        hardware = device.hardware,
        base_dtype = %config.model.base_dtype,
        "device"
    );
    if device::reduction_fault(&device.device) {
        warn!(
            "this device sums permuted rank-4 tensors to wrong numbers (a fault of Burn 0.22.1); the networks here avoid the case"
        );
    }
    info!(
        parameters = count.total,
        trainable = count.trainable,
        adapted_layers = count.adapted_layers,
        lora_megabytes = format!("{:.2}", count.trainable as f64 * 4.0 / 1e6),
        "model"
    );
    info!(
        samples = data.cache.len(),
        batch_size = config.train.batch_size,
        accumulation,
        steps_per_epoch = format!(
            "{:.2}",
            data.order.batches_per_epoch() as f64 / accumulation as f64
        ),
        steps = config.train.steps,
        from_step = training.progress.step,
        "data"
    );
}
