//! The training run: prepare, loop, save. Read top to bottom.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use burn::module::Module;
use burn::tensor::Device;
use flux_model::families::{self, Visitor};
use flux_model::family::Family;
use flux_model::lora::Component;
use flux_model::pipeline::PipelineFolder;
use flux_model::prompted::Prompted;
use flux_model::weights::Checkpoint;
use lora_core::state::{count_parameters, trainable_parameters};
use lora_core::training::Ema;
use lora_core::training::optimizers::UpdateRule;
use lora_core::{LoraConfig, PathOptimizer, Training};
use serde::Serialize;
use tracing::{info, warn};

use crate::adapters::to_train_on;
use crate::cli::UsageError;
use crate::condition::Pictures;
use crate::config::{Loras, RunConfig};
use crate::data::ahead::Ahead;
use crate::data::batch::{Data, Order};
use crate::data::cache::Cache;
use crate::data::degradation::{cropped_and_enlarged, cut_texts};
use crate::data::digest::{SampleDigest, sample_digests};
use crate::data::file_digests::FileDigests;
use crate::data::reader::Reader;
use crate::data::sample::Sample;
use crate::data::samples::Samples;
use crate::data::scan::{Scan, scan, unreadable};
use crate::device::{self, NamedDevice};
use crate::fingerprint::Fingerprint;
use crate::kept_base::kept;
use crate::memory::{self, MemoryPlan};
use crate::models::open_pipeline;
use crate::previews::{Previews, prompts_of};
use crate::progress;
use crate::rule::Rule;
use crate::run::adapter::{NewAdapters, attach_all, plan_all, targeted_all, whole_of};
use crate::run::checkpoint::{Best, Event, Opened, Progress, RunTraining, State, restore};
use crate::run::folder::{RunDir, RunLock};
use crate::run::resume::{Accepted, Resume, check_resume, find_checkpoint};
use crate::run::save::Saver;
use crate::run::space;
use crate::run::timings::Timing;
use crate::run::vfs::{RealFs, create_dir_durably};
use crate::step::{check_update, compute, update};
use crate::taken::Peaks;
use crate::validation::{Validated, Validation};
use crate::workers::{Workers, check_shares};

/// How a run is started, besides its configuration.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// The run folder.
    pub output: PathBuf,
    /// Device, or several separated by commas, see [`device::open_all`].
    pub device: String,
    /// Where to go on from.
    pub resume: Resume,
    /// What may differ from the part of the run before.
    pub accepted: Accepted,
    /// Train a network that was distilled to few steps.
    pub distilled: bool,
    /// Never touch the network.
    pub offline: bool,
    /// Leave out images that cannot be read, and note them in the run's configuration.
    pub skip_bad: bool,
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
            skip_bad: false,
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

/// The same configuration with the layers to adapt named as paths.
fn named<F: Family>(config: &RunConfig, _: &F) -> RunConfig {
    let mut config = config.clone();
    config.lora.name_targets::<F>();
    config
}

/// The same configuration, leaving out what the run has left out before and, if `skip_bad`, what cannot be read now.
fn skipping(
    config: &RunConfig,
    opened: Option<&Opened>,
    skip_bad: bool,
) -> anyhow::Result<RunConfig> {
    let mut config = config.clone();
    if let Some(opened) = opened
        && config.dataset.skip.is_empty()
    {
        config.dataset.skip.clone_from(&opened.config.dataset.skip);
    }
    if skip_bad {
        for (name, error) in unreadable(&config.dataset)? {
            warn!("left out: {:#}", anyhow!(error));
            config.dataset.skip.push(name);
        }
        config.dataset.skip.sort();
    }
    Ok(config)
}

/// Encodes what `config` is to be trained on into the run folder, and trains nothing.
///
/// # Errors
/// Anything that [`train`] refuses before its first step.
pub fn encode(config: &RunConfig, options: &TrainOptions) -> anyhow::Result<Encoded> {
    struct Encode<'a>(PipelineFolder, &'a RunConfig, &'a TrainOptions);
    impl Visitor for Encode<'_> {
        type Output = anyhow::Result<Encoded>;
        fn visit<F: Family>(self) -> Self::Output {
            let Self(folder, config, options) = self;
            let family = F::open(folder)?;
            let prepared = prepare(&family, &named(config, &family), options)?;
            Ok(Encoded {
                folder: prepared.run.cache_path(),
                trained: prepared.samples.trained,
                held_out: prepared.samples.all.len() - prepared.samples.trained,
            })
        }
    }
    let folder = pipeline(config, options.offline)?;
    families::of_folder(&folder.clone(), Encode(folder, config, options))?
}

/// What [`encode`] has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The folder of entries.
    pub folder: PathBuf,
    /// Samples that are trained on.
    pub trained: usize,
    /// Samples that are held out.
    pub held_out: usize,
}

/// A run that nothing is wrong with, as far as can be known, and all that it is made of encoded.
struct Prepared {
    /// With the images that are left out.
    config: RunConfig,
    /// The first is where everything is that is not a micro-batch's.
    devices: Vec<NamedDevice>,
    run: RunDir,
    lock: RunLock,
    samples: Samples,
    digests: Vec<SampleDigest>,
    base_model: String,
    fingerprint: Fingerprint,
    events: Vec<Event>,
    begin: Begin,
    cache: Cache,
    plan: MemoryPlan,
    peaks: Peaks,
}

/// Checks a run, and encodes what is not in its cache.
fn prepare<F: Family>(
    family: &F,
    config: &RunConfig,
    options: &TrainOptions,
) -> anyhow::Result<Prepared> {
    let devices = device::open_all(&options.device)?;
    let device = &devices[0];
    check_shares(config, &devices)?;
    let run = RunDir::planned(&options.output)?;
    let lock = run.lock_if_there()?;
    if lock.is_none() {
        run.check_places()?;
    }
    let opened = find_checkpoint(&run, &options.resume)?
        .map(Opened::read)
        .transpose()?;

    let config = &skipping(config, opened.as_ref(), options.skip_bad)?;
    let Scan { samples, warnings } = scan(&config.dataset)?;
    let digests = sample_digests(&samples);
    let samples = Samples::new(config, samples)?;
    let cache_folder = run.cache_path();
    let mut known = FileDigests::load(&cache_folder);
    let base_model = known.of_all(&base_paths(config, family))?;
    let fingerprint = Fingerprint::of(device).context("read the program to fingerprint it")?;
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
    let outline = check_start(config, family, &samples.all, device)?;
    let begin = match opened {
        Some(opened) => Begin::Resumed(Box::new(opened)),
        None => {
            if !options.distilled {
                refuse_distilled(family)?;
            }
            Begin::New(check_new(config, family, &run, &samples.all, &outline)?)
        }
    };
    let plan = memory::plan(
        config,
        family,
        &samples.all,
        trained(&outline, config)?,
        &devices,
    )?;
    info!("memory: {}", plan.describe());
    if let Some(warning) = plan.warning() {
        warn!("{warning}");
    }
    drop(outline);
    if matches!(begin, Begin::New(_)) || options.accepted.data {
        let warnings = [warnings, samples.warnings.clone()].concat();
        say_what_is_lost(warnings, &samples.all, config, family)?;
    }

    // From here on the folder is written to: what is refused above leaves it as it was, or not there.
    let lock = match lock {
        Some(lock) => lock,
        None => first_lock(options, &begin)?,
    };
    lock.begin(&RealFs)?;
    create_dir_durably(&cache_folder)?;
    known.save()?;
    let mut peaks = Peaks::begin();
    let cache = Cache::build(
        &cache_folder,
        &samples,
        config,
        &prompts_of(config, family),
        family,
        device,
    )?;
    peaks.end("encode");
    Ok(Prepared {
        config: config.clone(),
        devices,
        run,
        lock,
        samples,
        digests,
        base_model,
        fingerprint,
        events,
        begin,
        cache,
        plan,
        peaks,
    })
}

fn train_family<F: Family>(
    family: F,
    config: &RunConfig,
    options: &TrainOptions,
) -> anyhow::Result<Outcome> {
    let Prepared {
        config,
        devices,
        run,
        lock,
        samples,
        digests,
        base_model,
        fingerprint,
        events,
        begin,
        cache,
        plan,
        mut peaks,
    } = prepare(&family, &named(config, &family), options)?;
    let (config, device) = (&config, &devices[0]);

    let loras = config.lora.configs();
    let optimizer = UpdateRule::from(&config.optimizer.rule);
    let kept = kept(&family, plan.base.dtype, &base_model, &device.device);
    let load = |device: &NamedDevice| -> anyhow::Result<Prompted<F>> {
        let autodiff = device.device.clone().autodiff();
        let network = family.network_with(plan.base, kept.clone(), &autodiff);
        Ok(Prompted {
            network: network.context("load the transformer")?,
            text: text_modules(config, &family, false, &autodiff)?,
        })
    };
    let begun = |model, device: &NamedDevice| match &begin {
        Begin::New(adapters) => start(model, adapters, optimizer.clone()),
        Begin::Resumed(opened) => {
            let record = opened.record()?;
            restore(record, model, &loras, optimizer.clone(), &device.device)
        }
    };
    let model = load(device)?;
    let resumes_ema = config.ema.is_some() && matches!(begin, Begin::Resumed(_));
    let bare = resumes_ema.then(|| model.clone());
    let mut training = begun(model, device)?;
    let mut workers: Workers<Prompted<F>> = Workers::alone(&device.device.clone().autodiff());
    for (rank, other) in devices.iter().enumerate().skip(1) {
        let mut before = devices[..rank].iter();
        let same = before.position(|device| device.name == other.name);
        let copy = match same.filter(|_| !plan.base.is_streamed) {
            Some(0) => training.model.clone(),
            Some(rank) => workers.copy(rank).clone(),
            None => begun(load(other)?, other)?.model,
        };
        workers.add(&other.device.clone().autodiff(), copy);
    }
    let factors = trainable_parameters(&training.model);
    let factors = config.optimizer.rate_factors(factors.keys())?;
    training.optimizer.set_rate_factors(factors);
    let mut ema = match (&config.ema, &begin, bare) {
        (None, ..) => None,
        (Some(ema), Begin::Resumed(opened), Some(bare)) => {
            let average =
                (opened.average()?).context("the checkpoint has no average to go on from")?;
            let average = attach_all(bare, &average.restored(&loras)?)?;
            Some(Ema::new(&average, ema.decay))
        }
        (Some(ema), ..) => Some(Ema::new(&training.model, ema.decay)),
    };
    let batch_size = config.train.batch_size;
    let order = Order::new(&cache, batch_size, config.train.seed);
    let reader = Reader::new(config, &family)?;
    let data = Data {
        order,
        reader: &reader,
        table: family.scheduler().training_sigmas(),
        family: &family,
        cache: &cache,
        names: (samples.all.iter())
            .map(|sample| sample.name.clone())
            .collect(),
    };
    let validation = Validation::new(config, &samples, &cache, &reader, &family);
    let (mut resumed, mut best, mut best_adapter) = (None, None, None);
    if let Begin::Resumed(opened) = &begin {
        resumed = Some(opened.state.progress.step);
        (best, best_adapter) = (opened.state.best.clone(), opened.best()?);
    }
    let state = State {
        progress: training.progress,
        epoch: 0,
        config: config.to_toml()?,
        base_model,
        samples: digests,
        fingerprint,
        events,
        optimizer: Default::default(),
        best,
    };
    if let Begin::Resumed(opened) = begin {
        lock.rewind_to(&RealFs, &opened.verified)?;
    }
    let mut saver = Saver::new(config, &loras, state, &data.order, &run, &lock, resumed)?;
    let of = validation.as_ref().map(|validation| validation.of.as_str());
    saver.restore_best(best_adapter, of, &training.model)?;
    let previews = Previews::new(config, &cache, &reader, &family, &run)?;
    summary(config, &training, &data, samples.trained, &devices);

    peaks.end("load");
    let mut report = progress::TrainReport::new(training.progress.step, config.train.steps);
    if training.progress.step == 0
        && config.sample.as_ref().is_some_and(|sample| sample.at_start)
        && previews.render_if_due(0, || training.model.clone(), &report, device)?
    {
        peaks.end("preview");
    }
    let exhausted = |step, best: Option<&Best>| {
        let validation = validation.as_ref();
        validation.is_some_and(|validation| validation.is_exhausted(step, best))
    };
    let try_update = |model: &Prompted<F>, step| {
        let drawn = data.draw(config, first_micro_step(config, step) - 1, &device.device)?;
        check_update(model, step, drawn, config.train.divergence_factor)
    };
    let [first, last] =
        [training.progress.step, config.train.steps].map(|step| first_micro_step(config, step));
    let stopped = thread::scope(|scope| -> anyhow::Result<bool> {
        let ahead = Ahead::start(scope, &data, config, first..last, workers.count())
            .context("start the thread that reads data")?;
        // A step is saved once the next one's micro-batches have shown that its update can be, and an error there does not lose it.
        let mut is_unsaved = false;
        while training.progress.step < config.train.steps
            && !exhausted(training.progress.step, saver.best())
        {
            let started = Instant::now();
            let step = training.progress.step;
            let rule = rule(config, &plan, step);
            let draw = |micro_step, device: &Device| ahead.draw(micro_step, device);
            let computed = compute(&training.model, step, &rule, &mut workers, draw);
            let mut saving = Duration::ZERO;
            if is_unsaved {
                let began = Instant::now();
                report.doing("saving");
                if computed.is_err() {
                    try_update(&training.model, step)?;
                }
                saver.save(&training, averaged(&training, ema.as_ref()).as_ref())?;
                saving = began.elapsed();
            }
            let stepped = update(&mut training, &rule, computed?)?;
            let step = training.progress.step;
            let timing = Timing::of_step(step, started.elapsed() - saving, stepped.waited);
            if let Some(ema) = &mut ema {
                ema.update(&training.model, step);
            }
            let due = validation
                .as_ref()
                .filter(|validation| validation.is_due(step));
            let validated = match due {
                None => None,
                Some(validation) => {
                    report.doing("validating");
                    let model = to_use(&training, ema.as_ref(), config.exports_ema());
                    let (plain, device) = (model.valid(), &device.device);
                    let found = validation.measure(&plain, saver.best(), device)?;
                    if found.best {
                        let (loss, of) = (found.loss, validation.of.clone());
                        saver.new_best(&model, Best { step, loss, of })?;
                    }
                    found.say(step);
                    Some(found)
                }
            };
            let accumulation = rule.accumulation as f64;
            let losses = stepped.losses.iter();
            let metrics = StepMetrics {
                step,
                epoch: data
                    .order
                    .epoch(first_micro_step(config, training.progress.step - 1)),
                loss: losses.fold(0.0, |sum, &loss| sum + f64::from(loss) / accumulation),
                grad_norm: stepped.grad_norm,
                lr: rule.lr,
                d: training.optimizer.found_step_size(),
                validation: validated,
            };
            drop(stepped);
            saver.log(&metrics, Some(&timing))?;
            report.step(metrics.loss, metrics.grad_norm, metrics.lr, &timing);

            let stopped = options.stop.load(Ordering::SeqCst);
            let last = step == config.train.steps || exhausted(step, saver.best());
            is_unsaved = stopped || last || step.is_multiple_of(config.checkpoint.every);
            if is_unsaved && (stopped || last || previews.is_due(step)) {
                report.doing("saving");
                try_update(&training.model, step)?;
                saver.save(&training, averaged(&training, ema.as_ref()).as_ref())?;
                is_unsaved = false;
            }
            peaks.end("train");
            let sample_ema = config.ema.as_ref().is_some_and(|ema| ema.sample);
            let model = || to_use(&training, ema.as_ref(), sample_ema);
            if previews.render_if_due(step, model, &report, device)? {
                peaks.end("preview");
            }
            if stopped && !last {
                return Ok(true);
            }
        }
        Ok(false)
    })?;
    report.finish();
    saver.finish_logs();
    let step = training.progress.step;
    if stopped {
        peaks.say();
        return Ok(Outcome::Stopped { step });
    }
    if let Some(validation) = &validation
        && step < config.train.steps
    {
        validation.say_exhausted(step, saver.best());
    }
    let model = to_use(&training, ema.as_ref(), config.exports_ema());
    let lora = saver.export(&model, step)?;
    peaks.end("export");
    peaks.say();
    Ok(Outcome::Finished { lora })
}

/// The model with the average that a run has of its weights: that of `[ema]`, or of a schedule-free optimizer.
fn averaged<M: Module>(training: &RunTraining<M>, ema: Option<&Ema>) -> Option<M> {
    let ema = ema.map(|ema| ema.applied(&training.model));
    ema.or_else(|| training.optimizer.averaged(&training.model))
}

/// The model to be used: `wants_ema` says whether that is the average of `[ema]`; that of a schedule-free optimizer always is.
fn to_use<M: Module>(training: &RunTraining<M>, ema: Option<&Ema>, wants_ema: bool) -> M {
    match ema {
        Some(_) if !wants_ema => training.model.clone(),
        ema => averaged(training, ema).unwrap_or_else(|| training.model.clone()),
    }
}

/// The lock of a folder that had none when the start began to be checked: looks again at what was found there.
fn first_lock(options: &TrainOptions, begin: &Begin) -> anyhow::Result<RunLock> {
    let run = RunDir::open_or_create(&options.output)?;
    let lock = run.lock()?;
    if run.has_checkpoints()? != matches!(begin, Begin::Resumed(_)) {
        let run = run.path().display();
        bail!("another process has used {run} just now: start again, or choose another --output");
    }
    Ok(lock)
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
    /// What was found on held-out pictures, in steps that validate.
    #[serde(skip_serializing_if = "Option::is_none")]
    validation: Option<Validated>,
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
        "{} was distilled to few steps, and training undoes that: train on {base} (`model.path = \"black-forest-labs/{base}\"` downloads it once); the LoRA works on both. --yes-distilled trains on this one all the same",
        family.folder().root().display()
    )))
}

/// The files whose weights are adapted.
fn base_paths<F: Family>(config: &RunConfig, family: &F) -> Vec<PathBuf> {
    let folder = family.folder();
    let text = config.lora.text_encoders().into_iter();
    let text = text.map(|encoder| folder.root().join(encoder.to_string()));
    [folder.transformer_path().into()]
        .into_iter()
        .chain(text)
        .collect()
}

/// The text encoders that are trained, if any.
fn text_modules<F: Family>(
    config: &RunConfig,
    family: &F,
    is_outline: bool,
    device: &Device,
) -> anyhow::Result<Option<F::TextModules>> {
    let encoders = config.lora.text_encoders();
    let known = |encoder: &&Component| F::TRAINABLE_TEXT.contains(encoder);
    if let Some(encoder) = encoders.iter().find(|encoder| !known(encoder)) {
        bail!(
            "`lora.{encoder}`: the text encoder of {} cannot be trained, for no program loads a LoRA of it: remove the section",
            F::NAME
        );
    }
    if encoders.is_empty() {
        return Ok(None);
    }
    let text = family.text_modules(&encoders, is_outline, device);
    Ok(Some(text.context("load the text encoders")?))
}

/// What a run goes on from.
enum Begin {
    New(NewAdapters),
    Resumed(Box<Opened>),
}

/// Finds what would go wrong later and can be known from configurations and headers; the model without its weights.
pub(crate) fn check_start<F: Family>(
    config: &RunConfig,
    family: &F,
    samples: &[Sample],
    device: &NamedDevice,
) -> anyhow::Result<Prompted<F>> {
    for warning in config.warnings() {
        warn!("{warning}");
    }
    if let Some(problem) = config.model.base_dtype.problem(&device.device) {
        bail!("`model.base_dtype`: {problem}");
    }
    if let Some(problem) = config.model.compute.problem(&device.device) {
        bail!("`model.compute`: {problem}");
    }
    let outline = family
        .outline(&device.device)
        .context("open the transformer")?;
    if let Some(problem) = family.problem(&outline) {
        bail!("{problem}");
    }
    let references = samples.iter().any(|sample| !sample.references.is_empty());
    let (references_name, mask_name) = match config.dataset.folders.is_empty() {
        true => (
            "reference pictures (`dataset.reference`, or a list)",
            "`dataset.mask`",
        ),
        false => (
            "reference pictures (`reference` in `dataset.folders`, or a list)",
            "`mask` in `dataset.folders`",
        ),
    };
    let pictures = Pictures {
        references: references.then_some(references_name),
        mask: samples.iter().any(|sample| sample.mask.is_some()),
        mask_name,
    };
    pictures.check(family, &outline)?;
    if references && config.dataset.random_crops > 1 {
        bail!(
            "`dataset.random_crops` is {}, and references are cropped at their centre: image and reference would not lie on each other; leave it at 1",
            config.dataset.random_crops
        );
    }
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
    Ok(Prompted {
        text: text_modules(config, family, true, &device.device)?,
        network: outline,
    })
}

/// How many numbers are trained, by the layers that are adapted and what is trained in full.
pub(crate) fn trained<F: Family>(
    outline: &Prompted<F>,
    config: &RunConfig,
) -> anyhow::Result<usize> {
    let loras = config.lora.configs();
    let mut count = whole_of(outline, &loras)?.values().sum();
    for (component, layers) in targeted_all(outline, &loras)? {
        for (layer, [inputs, outputs]) in layers {
            let (rank, _) = loras[&component].resolve(&layer)?;
            count += rank * (inputs + outputs);
        }
    }
    Ok(count)
}

/// The same for what only a run that begins needs: layers and ranks, the file it continues from, room on the disk. (A
/// checkpoint fits its model, and a save takes the place of another.)
pub(crate) fn check_new<F: Family>(
    config: &RunConfig,
    family: &F,
    run: &RunDir,
    samples: &[Sample],
    outline: &Prompted<F>,
) -> anyhow::Result<NewAdapters> {
    let loras = config.lora.configs();
    space::check(config, family, run, samples, trained(outline, config)?)?;
    let adapters = adapters(config, &loras, outline)?;
    // The magnitudes of DoRA are those of the weights, which an outline has not.
    if config.lora.init_from.is_some() && !config.lora.use_dora {
        plan_all(outline, &adapters)?;
    }
    Ok(adapters)
}

/// The adapters of a run that begins; `model` may be an outline.
fn adapters<F: Family>(
    config: &RunConfig,
    loras: &Loras,
    model: &Prompted<F>,
) -> anyhow::Result<NewAdapters> {
    let fresh = |(&component, lora): (_, &LoraConfig)| {
        (component, lora.clone().fresh(config.train.seed).fast())
    };
    let mut adapters: NewAdapters = loras.iter().map(fresh).collect();
    if let Some(path) = &config.lora.init_from {
        let found = to_train_on(path, &model.shape(), loras).context("`lora.init_from`")?;
        adapters.extend(found.stored(loras));
    }
    Ok(adapters)
}

/// A run that has made no step.
fn start<F: Family>(
    model: Prompted<F>,
    adapters: &NewAdapters,
    optimizer: UpdateRule,
) -> anyhow::Result<RunTraining<Prompted<F>>> {
    Ok(Training {
        model: attach_all(model, adapters)?,
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
    training: &RunTraining<Prompted<F>>,
    data: &Data<'_, F>,
    trained: usize,
    devices: &[NamedDevice],
) {
    let device = &devices[0];
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    let count = count_parameters(&training.model);
    let accumulation = config.train.gradient_accumulation_steps as u64;
    info!(
        device = names.join(","),
        hardware = device.hardware,
        base_dtype = %config.model.base_dtype,
        compute = %config.model.compute,
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
        samples = trained,
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
