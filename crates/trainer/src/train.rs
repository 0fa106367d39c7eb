//! The training run: prepare, loop, save. Read top to bottom.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use burn::module::Module;
use burn::optim::{AdamW, AdamWConfig};
use flux_model::lora::{Component, LoraFormat, LoraSet, ModelShape, WriteOptions, write};
use flux_model::pipeline::PipelineFolder;
use flux_model::transformer::FluxTransformer;
use lora_core::{
    AdapterSource, DEFAULT_ADAPTER, DropoutScope, ForwardPath, Gradients, LoraConfig,
    PathOptimizer, PeftType, Plan, Training, count_parameters,
};
use serde::Serialize;
use tracing::{info, warn};

use crate::adapters;
use crate::backward::{loss_and_gradients, loss_of};
use crate::batch::{Data, Drawn, Order};
use crate::cache::{Cache, FileDigests};
use crate::checkpoint::{
    Event, FluxTraining, Opened, Progress, Snapshot, State, manifest_fields, restore,
};
use crate::config::{ExportFormat, RunConfig};
use crate::dataset::{self, ImageLimits, SampleDigest};
use crate::device::{self, NamedDevice};
use crate::fingerprint::Fingerprint;
use crate::lr_schedule;
use crate::preview::Previews;
use crate::progress;
use crate::run_dir::{MetricsLog, Retention, RunDir, RunLock};
use crate::transaction::{Verified, verify};
use crate::vfs::{RealFs, replace_file};

/// How a run is started, besides its configuration.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// The run folder.
    pub output: PathBuf,
    /// Device name, see [`device::open`].
    pub device: String,
    /// Where to go on from.
    pub resume: Resume,
    /// Resume although binary, device or CPU features differ.
    pub allow_inexact: bool,
    /// Resume although the data changed; the new data is trained on.
    pub adopt_data: bool,
    /// Resume although settings changed that decide what earlier steps would have done.
    pub adopt_config: bool,
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
            allow_inexact: false,
            adopt_data: false,
            adopt_config: false,
            stop: Arc::default(),
        }
    }

    /// The same, resumed.
    #[must_use]
    pub fn resume(self, resume: Resume) -> Self {
        Self { resume, ..self }
    }
}

/// Where a run goes on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// A new run; a folder that already holds one is an error.
    No,
    /// The newest valid checkpoint of the run folder; a run that was stopped before its first checkpoint starts again.
    Newest,
    /// This checkpoint folder.
    Checkpoint(PathBuf),
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

/// One line of `metrics.jsonl`: only what a resumed run would write again in the same bits, so no times.
#[derive(Debug, Serialize)]
struct StepMetrics {
    step: u64,
    epoch: u64,
    loss: f64,
    grad_norm: f64,
    lr: f64,
}

/// Runs `config` to its end, or until it is stopped.
///
/// # Errors
/// Anything wrong with configuration, data, model, run folder or disk; what was saved before stays.
pub fn train(config: &RunConfig, options: &TrainOptions) -> anyhow::Result<Outcome> {
    let run = RunDir::open_or_create(&options.output)?;
    let lock = run.lock()?;
    lock.remove_stale(&RealFs)?;
    let device = device::open(&options.device)?;
    let verified = find_checkpoint(&run, options)?;
    let resumed = verified.as_ref().map(|verified| verified.manifest.step);
    let opened = verified.as_ref().map(Opened::parse).transpose()?;

    let samples = dataset::scan(&config.dataset)?;
    let digests = dataset::sample_digests(&samples, &ImageLimits::default())?;
    let pipeline = pipeline(config)?;
    let cache_folder = run.path().join("cache");
    let prompts = config
        .sample
        .as_ref()
        .map(|sample| sample.prompts.clone())
        .unwrap_or_default();
    let cache = Cache::build(
        &cache_folder,
        &samples,
        &config.dataset,
        &prompts,
        &pipeline,
        &device,
    )?;
    let base_model = base_model_digest(&pipeline, config, &cache_folder)?;

    let fingerprint = Fingerprint::of(&device).context("read the program to fingerprint it")?;
    let lora = config.lora.config();
    let optimizer = adamw(config);
    let model = load_model(&pipeline, &device)?;
    let (mut training, events) = match opened {
        Some(opened) => {
            let events = check_resume(
                &opened,
                config,
                options,
                &digests,
                &base_model,
                &fingerprint,
            )?;
            (
                restore(
                    opened.into_record(),
                    model,
                    &lora,
                    optimizer,
                    &device.device,
                )?,
                events,
            )
        }
        None => (start(model, config, &lora, optimizer)?, Vec::new()),
    };
    let order = Order::new(&cache, config.train.batch_size, config.train.seed);
    let scheduler = pipeline.scheduler()?;
    let data = Data {
        order,
        table: scheduler.training_sigmas(),
        scheduler,
        autoencoder: pipeline.autoencoder_config()?,
        cache: &cache,
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
    if let Some(verified) = verified {
        lock.rewind_to(&RealFs, &verified)?; // nothing was written before: a refused resume leaves the folder as it was
    }
    let mut saver = Saver::new(config, &lora, state, &data, &run, &lock, resumed)?;
    let previews = Previews::new(config, &cache, &prompts, &pipeline, run.path())?;
    summary(config, &training, &data, &device);

    let names: Vec<&str> = samples.iter().map(|sample| sample.name.as_str()).collect();
    let mut report = progress::TrainReport::new(training.progress.step, config.train.steps);
    while training.progress.step < config.train.steps {
        let started = Instant::now();
        let metrics = step(&mut training, config, &data, &names, &device)?;
        saver.metrics.append(&RealFs, &metrics)?;
        report.step(metrics.step, metrics.loss, metrics.lr, started.elapsed());

        let stopped = options.stop.load(Ordering::SeqCst);
        let last = training.progress.step == config.train.steps;
        if stopped
            || last
            || training
                .progress
                .step
                .is_multiple_of(config.checkpoint.every)
        {
            check_update(&training, config, &data, &names, &device)?;
            saver.save(&training)?;
        }
        previews.render_if_due(&training, &report, &device)?;
        if stopped && !last {
            report.finish();
            return Ok(Outcome::Stopped {
                step: training.progress.step,
            });
        }
    }
    report.finish();
    let lora = saver.export(&training)?;
    Ok(Outcome::Finished { lora })
}

/// One optimizer step: micro-batches, clipping, update.
fn step(
    training: &mut FluxTraining,
    config: &RunConfig,
    data: &Data<'_>,
    names: &[&str],
    device: &NamedDevice,
) -> anyhow::Result<StepMetrics> {
    let step = training.progress.step;
    let accumulation = config.train.gradient_accumulation_steps;
    let first = step * accumulation as u64;
    let guard = config.train.divergence_factor;
    let mut gradients = Gradients::default();
    let (mut loss, mut drawn_from) = (0.0, Vec::new());
    for micro_step in first..first + accumulation as u64 {
        let drawn = data.draw(config, micro_step, &device.device)?;
        drawn_from.extend(describe(&drawn, names));
        let scope = DropoutScope::enter(config.train.seed, micro_step);
        let (micro_loss, micro_gradients) = loss_and_gradients(
            &training.model,
            drawn.batch,
            accumulation,
            config.train.recompute,
        );
        scope.finish()?;
        #[cfg(feature = "canary")]
        let micro_loss = crate::canary::poison("loss", step + 1).map_or(micro_loss, |v| v as f32);
        if let Some(fault) = fault_of(micro_loss, drawn.loss_of_zero, guard) {
            bail!(
                "{fault} at step {}, for {}; the last checkpoint is untouched",
                step + 1,
                drawn_from.join(", ")
            );
        }
        loss += f64::from(micro_loss) / accumulation as f64;
        gradients.accumulate(micro_gradients);
    }
    let place = || {
        format!(
            "at step {}, for {}; the last checkpoint is untouched",
            step + 1,
            drawn_from.join(", ")
        )
    };
    #[cfg(feature = "canary")]
    let gradients = match crate::canary::poison("gradient", step + 1) {
        Some(factor) => gradients.clip(0.0, factor),
        None => gradients,
    };
    let grad_norm = gradients.norm().with_context(place)?;
    if grad_norm == 0.0 && guard.is_some() {
        bail!(
            "the run has collapsed (every gradient is 0, so nothing is learned; a lower `optimizer.learning_rate` may help) {}",
            place()
        );
    }
    let gradients = match config.optimizer.max_grad_norm {
        Some(max_norm) => gradients.clip(grad_norm, max_norm),
        None => gradients,
    };
    let schedule = &config.lr_scheduler;
    let factor = lr_schedule::factor(
        schedule.name,
        step,
        schedule.warmup_steps,
        config.train.steps,
        schedule.num_cycles,
    );
    let lr = config.optimizer.learning_rate * factor;
    #[cfg(feature = "canary")]
    let lr = crate::canary::poison("update", step + 1).unwrap_or(lr);
    // The model is taken out for the step: a failed step leaves no half-updated model behind that could be saved.
    training.model = training
        .optimizer
        .step(lr, training.model.clone(), gradients)
        .with_context(place)?;
    crate::checkpoint::adapter_file(&training.model, &config.lora.config()).with_context(place)?;
    training.progress.step += 1;
    Ok(StepMetrics {
        step: step + 1,
        epoch: data.order.epoch(first),
        loss,
        grad_norm,
        lr,
    })
}

/// The samples of a micro-batch, for people.
fn describe(drawn: &Drawn, names: &[&str]) -> Vec<String> {
    let samples = drawn.samples.iter().zip(&drawn.sigmas);
    samples
        .map(|(&sample, sigma)| format!("{} (sigma {sigma})", names[sample]))
        .collect()
}

/// What is wrong with a loss, if anything: it is no number, or more than `factor` times the loss of predicting 0.
///
/// That loss is of the same samples and noise, so the verdict depends on nothing that came before: a resumed run stops
/// where the uninterrupted one would.
fn fault_of(loss: f32, loss_of_zero: f64, factor: Option<f64>) -> Option<String> {
    if !loss.is_finite() {
        return Some(format!("the loss is {loss}"));
    }
    let factor = factor?;
    (f64::from(loss) > factor * loss_of_zero).then(|| {
        format!(
            "the run has diverged (the loss is {loss}; `train.divergence_factor` allows {factor} times the {loss_of_zero:.3} of predicting 0; a lower `optimizer.learning_rate` may help)"
        )
    })
}

/// Tries an update that is about to be saved on the last micro-batch it was made from: one too large shows in a loss, and
/// that of the next step would come after the save.
fn check_update(
    training: &FluxTraining,
    config: &RunConfig,
    data: &Data<'_>,
    names: &[&str],
    device: &NamedDevice,
) -> anyhow::Result<()> {
    let step = training.progress.step;
    let last = step * config.train.gradient_accumulation_steps as u64 - 1;
    let drawn = data.draw(config, last, &device.device)?;
    let drawn_from = describe(&drawn, names);
    let loss = loss_of(&training.model.valid(), drawn.batch);
    if let Some(fault) = fault_of(loss, drawn.loss_of_zero, config.train.divergence_factor) {
        bail!(
            "{fault} after the update at step {step}, for {}; the last checkpoint is untouched",
            drawn_from.join(", ")
        );
    }
    Ok(())
}

/// A run that has made no step.
fn start(
    model: FluxTransformer,
    config: &RunConfig,
    lora: &LoraConfig,
    optimizer: AdamW,
) -> anyhow::Result<FluxTraining> {
    let source = match &config.lora.init_from {
        None => AdapterSource::Fresh {
            seed: config.train.seed,
        },
        Some(path) => {
            let shape = ModelShape {
                transformer: Some(model.config().clone()),
                ..ModelShape::default()
            };
            let (file, residuals) =
                adapters::load(path, &shape)?.to_adapter(Component::Transformer)?;
            if let Some(residual) = residuals.first() {
                bail!(
                    "`lora.init_from` {} changes `{}` by more than low-rank factors, so it cannot be trained on",
                    path.display(),
                    residual.parameter
                );
            }
            AdapterSource::File(file.with_dropout(lora.lora_dropout))
        }
    };
    let plan = Plan::new(
        &model,
        DEFAULT_ADAPTER,
        Some(lora),
        source,
        ForwardPath::Fast,
    )?;
    Ok(Training {
        model: plan.apply(model),
        optimizer: PathOptimizer::new(optimizer),
        progress: Progress::default(),
    })
}

fn adamw(config: &RunConfig) -> AdamW {
    let optimizer = &config.optimizer;
    AdamWConfig::new()
        .with_beta_1(optimizer.betas[0] as f32)
        .with_beta_2(optimizer.betas[1] as f32)
        .with_epsilon(optimizer.eps as f32)
        .with_weight_decay(optimizer.weight_decay as f32)
        .build()
}

/// The pipeline folder, with the single files that the configuration puts in place of its components.
pub fn pipeline(config: &RunConfig) -> anyhow::Result<PipelineFolder> {
    let mut pipeline = PipelineFolder::open(&config.model.path).context("open `model.path`")?;
    if let Some(file) = &config.model.transformer {
        pipeline = pipeline.with_transformer(file);
    }
    if let Some(file) = &config.model.vae {
        pipeline = pipeline.with_autoencoder(file);
    }
    Ok(pipeline)
}

fn load_model(pipeline: &PipelineFolder, device: &NamedDevice) -> anyhow::Result<FluxTransformer> {
    let model = pipeline
        .transformer(&device.device.clone().autodiff())
        .context("load the transformer")?;
    let (inputs, latent) = (
        model.config().in_channels,
        4 * pipeline.autoencoder_config()?.latent_channels,
    );
    if inputs != latent || model.config().out_channels() != latent {
        bail!(
            "this transformer reads {inputs} channels, the autoencoder gives {latent}: models that read a condition (Fill, Canny, Depth) cannot be trained yet"
        );
    }
    Ok(model)
}

fn base_model_digest(
    pipeline: &PipelineFolder,
    config: &RunConfig,
    cache: &Path,
) -> anyhow::Result<String> {
    let transformer = config
        .model
        .transformer
        .clone()
        .unwrap_or_else(|| pipeline.root().join("transformer"));
    let mut digests = FileDigests::load(cache);
    let digest = digests.of_all(&[transformer])?;
    digests.save()?;
    Ok(digest)
}

/// The checkpoint to go on from, if any.
fn find_checkpoint(run: &RunDir, options: &TrainOptions) -> anyhow::Result<Option<Verified>> {
    let verified: Option<Verified> = match &options.resume {
        Resume::No if run.has_checkpoints()? => bail!(
            "run folder {} already holds checkpoints: add --resume to continue that run, or choose another --output",
            run.path().display()
        ),
        Resume::No => None,
        Resume::Newest if !run.has_checkpoints()? => {
            info!(run = %run.path().display(), "no checkpoint yet: the run starts from its beginning");
            None
        }
        Resume::Newest => {
            let (verified, rejected) = run.newest_valid()?;
            for rejected in rejected {
                warn!("passed over: {rejected}");
            }
            Some(verified)
        }
        Resume::Checkpoint(path) => {
            Some(verify(path).with_context(|| format!("checkpoint {}", path.display()))?)
        }
    };
    if let Some(verified) = &verified {
        info!(checkpoint = %verified.dir.display(), step = verified.manifest.step, "resuming");
    }
    Ok(verified)
}

/// Refuses what would make the resumed run differ from one that was never stopped; returns the run's events.
fn check_resume(
    opened: &Opened,
    config: &RunConfig,
    options: &TrainOptions,
    samples: &[SampleDigest],
    base_model: &str,
    fingerprint: &Fingerprint,
) -> anyhow::Result<Vec<Event>> {
    let state = &opened.state;
    let step = state.progress.step;
    let mut events = state.events.clone();
    let mut note = |what: String| {
        info!(step, "{what}");
        events.push(Event { step, what });
    };
    for change in opened.config.diff(config)? {
        let text = format!(
            "`{}` was {} and is now {}",
            change.key, change.old, change.new
        );
        if change.key.starts_with("lora.") {
            bail!(
                "{text}: an adapter keeps its shape and scale for the whole run; restore the old value, or start a new run in another --output"
            );
        }
        if !change.allowed && !options.adopt_config {
            bail!(
                "{text}: the resumed run would not be the one that was started; restore the old value, or add --adopt-config to go on with the new one"
            );
        }
        note(text);
    }
    let changes = dataset::changes(&state.samples, samples);
    if !changes.is_empty() {
        let list = changes.join("; ");
        if !options.adopt_data {
            bail!(
                "the data has changed since step {step}: {list}; restore it, or add --adopt-data to go on with what is there now"
            );
        }
        note(format!("data changed: {list}"));
    }
    if state.base_model != base_model {
        if !options.adopt_data {
            bail!(
                "the base model's transformer is not the one this run was started with; restore it, or add --adopt-data to go on with this one"
            );
        }
        note("base model changed".into());
    }
    let differences = state.fingerprint.differences(fingerprint);
    if let Some((name, stored, present)) = differences.first() {
        if !options.allow_inexact {
            bail!(
                "the run was made with another {name} ({stored}; now {present}), so going on would not give the same bits; use the same one, or add --allow-inexact"
            );
        }
        for (name, stored, present) in differences {
            note(format!("{name} changed from {stored} to {present}"));
        }
    }
    Ok(events)
}

/// Writes checkpoints and the finished LoRA.
struct Saver<'a> {
    config: &'a RunConfig,
    lora: &'a LoraConfig,
    state: State,
    data: &'a Data<'a>,
    run: &'a RunDir,
    lock: &'a RunLock,
    metrics: MetricsLog,
    config_digest: String,
    dataset_digest: String,
}

impl<'a> Saver<'a> {
    fn new(
        config: &'a RunConfig,
        lora: &'a LoraConfig,
        state: State,
        data: &'a Data<'a>,
        run: &'a RunDir,
        lock: &'a RunLock,
        resumed: Option<u64>,
    ) -> anyhow::Result<Self> {
        let metrics = MetricsLog::open(&RealFs, lock, resumed)?;
        replace_file(&RealFs, &run.config_path(), state.config.as_bytes())?;
        let (config_digest, dataset_digest) =
            (config.digest()?, dataset::dataset_digest(&state.samples));
        Ok(Self {
            config,
            lora,
            state,
            data,
            run,
            lock,
            metrics,
            config_digest,
            dataset_digest,
        })
    }

    fn save(&mut self, training: &FluxTraining) -> anyhow::Result<()> {
        let step = training.progress.step;
        let accumulation = self.config.train.gradient_accumulation_steps as u64;
        let epoch = self.data.order.epoch(step * accumulation);
        let state = State {
            progress: training.progress,
            epoch,
            ..self.state.clone()
        };
        let fields = manifest_fields(
            &state,
            self.config_digest.clone(),
            self.dataset_digest.clone(),
        )?;
        let snapshot = Snapshot::take(training, state, self.lora)?;
        let retention = Retention {
            keep: self.config.checkpoint.keep,
            keep_every: None,
        };
        self.lock.save(
            &RealFs,
            &mut self.metrics,
            step,
            &snapshot.files(),
            &fields,
            &retention,
        )?;
        Ok(())
    }

    /// The finished LoRA, beside the checkpoints.
    fn export(&self, training: &FluxTraining) -> anyhow::Result<PathBuf> {
        let adapter = crate::checkpoint::adapter_file(&training.model, self.lora)?.fold_scale();
        let bytes = adapter.to_bytes(crate::checkpoint::TRANSFORMER_PREFIX);
        let path = self.run.path().join("lora.safetensors");
        replace_file(&RealFs, &path, &bytes)?;
        for format in &self.config.export.formats {
            let format = match format {
                ExportFormat::Diffusers => continue, // the file above
                ExportFormat::Peft => LoraFormat::Peft,
                ExportFormat::Kohya => LoraFormat::Kohya,
                ExportFormat::Comfyui => LoraFormat::ComfyUi,
            };
            let shape = ModelShape {
                transformer: Some(training.model.config().clone()),
                ..ModelShape::default()
            };
            let out = crate::commands::beside(&path, format);
            if format == LoraFormat::Peft && adapter.peft_type() != PeftType::Lora {
                adapter.save_peft(&out)?;
                continue;
            }
            let set = LoraSet::from_adapter(&adapter, Component::Transformer, shape);
            let report = write(&set, format, &out, &WriteOptions::default())
                .with_context(|| format!("write {}", out.display()))?;
            for note in report.notes {
                info!("{}: {note}", out.display());
            }
        }
        Ok(path)
    }
}

/// What is about to happen; most mis-set runs show here.
fn summary(config: &RunConfig, training: &FluxTraining, data: &Data<'_>, device: &NamedDevice) {
    let count = count_parameters(&training.model);
    let accumulation = config.train.gradient_accumulation_steps as u64;
    info!(
        device = device.name,
        hardware = device.hardware,
        dtype = "f32",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_judged_by_the_loss_of_predicting_0() {
        assert_eq!(fault_of(20.0, 2.0, Some(10.0)), None);
        let fault = fault_of(20.1, 2.0, Some(10.0)).unwrap_or_default();
        assert!(
            fault.contains(
                "diverged (the loss is 20.1; `train.divergence_factor` allows 10 times the 2.000"
            ),
            "{fault}"
        );
        assert_eq!(fault_of(f32::MAX, 2.0, None), None);
        // A loss that is no number stops every run.
        let said = |loss, factor| fault_of(loss, 2.0, factor).unwrap_or_default();
        assert_eq!(said(f32::INFINITY, None), "the loss is inf");
        assert_eq!(said(f32::NAN, Some(10.0)), "the loss is NaN");
    }
}
