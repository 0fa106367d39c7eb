//! Saving: checkpoints while a run goes, the finished LoRA at its end.

use std::path::{Path, PathBuf};

use anyhow::Context;
use burn::module::Module;
use flux_model::family::Family;
use flux_model::lora::{LoraFormat, LoraSet, WriteReport, write};
use flux_model::prompted::Prompted;
use lora_core::peft::PeftType;
use serde::Serialize;
use tracing::{info, warn};

use crate::config::{ExportFormat, Loras, RunConfig};
use crate::convert::table;
use crate::data::batch::Order;
use crate::data::digest::dataset_digest;
use crate::run::adapter::RunAdapter;
use crate::run::checkpoint::{Best, RunTraining, Snapshot, State, manifest_fields};
use crate::run::folder::{RunDir, RunLock};
use crate::run::header::header;
use crate::run::logs::Logs;
use crate::run::metrics::MetricsLog;
use crate::run::timings::{Timing, TimingLog};
use crate::run::transaction;
use crate::run::vfs::{RealFs, discard, replace_file};

/// Writes checkpoints and the finished LoRA.
pub(crate) struct Saver<'a> {
    config: &'a RunConfig,
    loras: &'a Loras,
    state: State,
    order: &'a Order,
    run: &'a RunDir,
    lock: &'a RunLock,
    metrics: MetricsLog,
    timings: TimingLog,
    logs: Logs,
    config_digest: String,
    dataset_digest: String,
    best: Option<RunAdapter>,
}

impl<'a> Saver<'a> {
    pub(crate) fn new(
        config: &'a RunConfig,
        loras: &'a Loras,
        state: State,
        order: &'a Order,
        run: &'a RunDir,
        lock: &'a RunLock,
        resumed: Option<u64>,
    ) -> anyhow::Result<Self> {
        let metrics = MetricsLog::open(&RealFs, lock, resumed)?;
        let mut timings = TimingLog::open(&RealFs, run.timings_path(), resumed);
        timings.append(&Timing::of_start(
            resumed.unwrap_or(0),
            &state.fingerprint.device,
        ));
        let logs = Logs::open(&config.logging, run);
        replace_file(&RealFs, &run.config_path(), &|out| {
            out.write_all(state.config.as_bytes())
        })?;
        let (config_digest, dataset_digest) = (config.digest()?, dataset_digest(&state.samples));
        Ok(Self {
            config,
            loras,
            state,
            order,
            run,
            lock,
            metrics,
            timings,
            logs,
            config_digest,
            dataset_digest,
            best: None,
        })
    }

    /// Adds a line to the metrics log, and to what is made of it; `timing` if it is that of a step.
    pub(crate) fn log(
        &mut self,
        line: &impl Serialize,
        timing: Option<&Timing>,
    ) -> anyhow::Result<()> {
        self.metrics.append(&RealFs, line)?;
        if let Some(timing) = timing {
            self.timings.append(timing);
        }
        self.logs.append(&serde_json::to_value(line)?, timing);
        Ok(())
    }

    /// Completes what is made of the metrics log, when no line follows.
    pub(crate) fn finish_logs(&mut self) {
        self.logs.finish();
    }

    /// The best validation so far.
    pub(crate) fn best(&self) -> Option<&Best> {
        self.state.best.as_ref()
    }

    /// Goes on from what a checkpoint says of the best validation, and puts its LoRA where it was; a loss of something else than
    /// what is validated now, `of`, is forgotten. What lies there from steps that were gone back on is removed.
    pub(crate) fn restore_best<F: Family>(
        &mut self,
        adapter: Option<RunAdapter>,
        of: Option<&str>,
        model: &Prompted<F>,
    ) -> anyhow::Result<()> {
        let path = self.run.best_path();
        let best = self.state.best.take();
        if let (Some(best), Some(adapter)) = (best, adapter) {
            if of.is_none_or(|of| of == best.of) {
                self.write_lora(&adapter, model, best.step, &path)?;
                (self.state.best, self.best) = (Some(best), Some(adapter));
                return Ok(());
            }
            warn!(
                "what is validated on has changed, so the best validation so far, {:.4} at step {}, is no measure any more and is forgotten",
                best.loss, best.step
            );
        }
        if path.exists() {
            discard(&RealFs, self.run.path(), &[path])?;
        }
        Ok(())
    }

    /// Notes that a validation found less than all before, with the model it was of.
    pub(crate) fn new_best<F: Family>(
        &mut self,
        model: &Prompted<F>,
        best: Best,
    ) -> anyhow::Result<()> {
        let adapter = RunAdapter::of_model(model, self.loras)?;
        self.write_lora(&adapter, model, best.step, &self.run.best_path())?;
        (self.state.best, self.best) = (Some(best), Some(adapter));
        Ok(())
    }

    /// Saves a run, with the average of its weights if it has one.
    pub(crate) fn save<M: Module>(
        &mut self,
        training: &RunTraining<M>,
        average: Option<&M>,
    ) -> anyhow::Result<()> {
        let step = training.progress.step;
        let accumulation = self.config.train.gradient_accumulation_steps as u64;
        let epoch = self.order.epoch(step * accumulation);
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
        let snapshot = Snapshot::take(training, average, self.best.as_ref(), state, self.loras)?;
        let keep = self.config.checkpoint.keep;
        let (lock, metrics) = (self.lock, &mut self.metrics);
        snapshot.with_files(|files| {
            transaction::save(&RealFs, lock, metrics, step, files, &fields, keep)
        })?;
        Ok(())
    }

    /// Writes the file that programs which load LoRAs read, after so many steps. Back come what it holds, for other formats, and
    /// who reads it; an adapter of a kind that diffusers has none of with its scale folded.
    fn write_lora<F: Family>(
        &self,
        adapter: &RunAdapter,
        model: &Prompted<F>,
        steps: u64,
        path: &Path,
    ) -> anyhow::Result<(LoraSet, Option<RunAdapter>, Option<WriteReport>)> {
        let lycoris = (adapter.peft_type() != PeftType::Lora).then(|| adapter.clone().fold_scale());
        let source = lycoris.as_ref().unwrap_or(adapter);
        let shape = model.shape();
        let header = header(
            self.config,
            &self.state,
            &self.dataset_digest,
            steps,
            &shape,
        )?;
        let mut set = source.set(shape);
        set.metadata.extend(header);
        let mut report = None;
        match &lycoris {
            Some(lycoris) => {
                replace_file(&RealFs, path, &|out| lycoris.write(out))?;
            }
            // Unlike a checkpoint's, this file is read by programs that know only tensors: the scale is folded.
            None => {
                report = Some(write(
                    &set,
                    LoraFormat::Diffusers,
                    path,
                    &self.config.write_options(),
                )?);
            }
        }
        Ok((set, lycoris, report))
    }

    /// The finished LoRA, beside the checkpoints.
    pub(crate) fn export<F: Family>(
        &self,
        model: &Prompted<F>,
        steps: u64,
    ) -> anyhow::Result<PathBuf> {
        let adapter = RunAdapter::of_model(model, self.loras)?;
        let path = self.run.lora_path();
        let (set, lycoris, report) = self.write_lora(&adapter, model, steps, &path)?;
        if let Some(report) = report {
            tell(&path, &report);
        }
        for format in &self.config.export.formats {
            let format = match format {
                ExportFormat::Diffusers => continue, // the file above
                ExportFormat::Peft => LoraFormat::Peft,
                ExportFormat::Kohya => LoraFormat::Kohya,
                ExportFormat::Comfyui => LoraFormat::ComfyUi,
            };
            let out = crate::convert::beside(&path, format);
            if let (LoraFormat::Peft, Some(lycoris)) = (format, &lycoris) {
                for file in lycoris.0.values() {
                    file.save_peft(&out)?; // of the transformer alone
                }
                continue;
            }
            let report = write(&set, format, &out, &self.config.write_options())
                .with_context(|| format!("write {}", out.display()))?;
            tell(&out, &report);
        }
        Ok(path)
    }
}

/// Says what programs make of an export.
fn tell(path: &Path, report: &WriteReport) {
    for line in report.lost_lines() {
        warn!("{}: {line}", path.display());
    }
    for line in report.notes.iter().cloned().chain(table(&report.readings)) {
        info!("{}: {line}", path.display());
    }
}
