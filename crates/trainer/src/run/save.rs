//! Saving: checkpoints while a run goes, the finished LoRA at its end.

use std::path::{Path, PathBuf};

use anyhow::Context;
use burn::module::Module;
use flux_model::family::Network;
use flux_model::lora::{Component, LoraFormat, LoraSet, WriteOptions, WriteReport, write};
use lora_core::LoraConfig;
use lora_core::peft::PeftType;
use serde::Serialize;
use tracing::info;

use crate::config::{ExportFormat, RunConfig};
use crate::convert::table;
use crate::data::batch::Order;
use crate::data::digest::dataset_digest;
use crate::run::checkpoint::{
    RunTraining, Snapshot, State, TRANSFORMER_PREFIX, adapter_file, manifest_fields,
};
use crate::run::folder::{RunDir, RunLock};
use crate::run::header::header;
use crate::run::logs::Logs;
use crate::run::metrics::MetricsLog;
use crate::run::timings::{Timing, TimingLog};
use crate::run::transaction;
use crate::run::vfs::{RealFs, replace_file};

/// Writes checkpoints and the finished LoRA.
pub(crate) struct Saver<'a> {
    config: &'a RunConfig,
    lora: &'a LoraConfig,
    state: State,
    order: &'a Order,
    run: &'a RunDir,
    lock: &'a RunLock,
    metrics: MetricsLog,
    timings: TimingLog,
    logs: Logs,
    config_digest: String,
    dataset_digest: String,
}

impl<'a> Saver<'a> {
    pub(crate) fn new(
        config: &'a RunConfig,
        lora: &'a LoraConfig,
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
            lora,
            state,
            order,
            run,
            lock,
            metrics,
            timings,
            logs,
            config_digest,
            dataset_digest,
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

    pub(crate) fn save<M: Module>(&mut self, training: &RunTraining<M>) -> anyhow::Result<()> {
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
        let snapshot = Snapshot::take(training, state, self.lora)?;
        let keep = self.config.checkpoint.keep;
        let (lock, metrics) = (self.lock, &mut self.metrics);
        snapshot.with_files(|files| {
            transaction::save(&RealFs, lock, metrics, step, files, &fields, keep)
        })?;
        Ok(())
    }

    /// The finished LoRA, beside the checkpoints.
    pub(crate) fn export<N: Network>(&self, training: &RunTraining<N>) -> anyhow::Result<PathBuf> {
        let average = training.optimizer.averaged(&training.model);
        let model = average.as_ref().unwrap_or(&training.model);
        let adapter = adapter_file(model, self.lora)?;
        let lycoris = (adapter.peft_type() != PeftType::Lora).then(|| adapter.clone().fold_scale());
        let source = lycoris.as_ref().unwrap_or(&adapter);
        let shape = training.model.shape();
        let steps = training.progress.step;
        let header = header(
            self.config,
            &self.state,
            &self.dataset_digest,
            steps,
            &shape,
        )?;
        let mut set = LoraSet::from_adapter(source, Component::Transformer, shape);
        set.metadata.extend(header);
        let path = self.run.lora_path();
        match &lycoris {
            Some(lycoris) => {
                let bytes = lycoris.to_bytes(TRANSFORMER_PREFIX);
                replace_file(&RealFs, &path, &|out| out.write_all(&bytes))?;
            }
            // Unlike a checkpoint's, this file is read by programs that know only tensors: the scale is folded.
            None => {
                let report = write(&set, LoraFormat::Diffusers, &path, &WriteOptions::default())?;
                tell(&path, &report);
            }
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
                lycoris.save_peft(&out)?;
                continue;
            }
            let report = write(&set, format, &out, &WriteOptions::default())
                .with_context(|| format!("write {}", out.display()))?;
            tell(&out, &report);
        }
        Ok(path)
    }
}

/// Says what programs make of an export.
fn tell(path: &Path, report: &WriteReport) {
    for line in report.notes.iter().cloned().chain(table(&report.readings)) {
        info!("{}: {line}", path.display());
    }
}
