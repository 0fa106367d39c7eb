//! What a checkpoint of a training run holds, and how a run is restored from it.
//!
//! `folder` and `transaction` keep folders of bytes safe; this file says what the bytes are: `lora.safetensors`, the
//! adapter as diffusers loads it; `optimizer.safetensors`, the moments; `state.json`, everything else. Where a run uses an
//! average of its weights rather than the last ones, `average.safetensors` is that average, and where it validates,
//! `best.safetensors` is the adapter of the best validation so far; both in the form of `lora.safetensors`.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail};
use burn::module::Module;
use flux_model::family::Family;
use flux_model::prompted::Prompted;
use lora_core::files::safetensors::TensorFile;
use lora_core::files::strict_json::{parse_json, read_file};
use lora_core::training::optimizers::UpdateRule;
use lora_core::training::{OptimizerScalars, OptimizerState};
use lora_core::{Training, TrainingRecord};
use serde::{Deserialize, Serialize};

use crate::config::{Loras, RunConfig};
use crate::data::digest::SampleDigest;
use crate::fingerprint::Fingerprint;
use crate::run::adapter::{RunAdapter, attach_all};
use crate::run::manifest::{ManifestFields, Verified};
use crate::run::transaction::Files;
use crate::run::vfs::Content;

/// The adapter that training goes on from.
pub(crate) const LORA: &str = "lora.safetensors";
/// The average of a run that keeps one.
pub(crate) const AVERAGE: &str = "average.safetensors";
const BEST: &str = "best.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimizer steps taken; the position in the data follows from it.
    pub step: u64,
}

/// The validation that found least so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Steps taken.
    pub step: u64,
    /// The loss.
    pub loss: f64,
    /// What it is the loss of, see `Validation::of`.
    pub of: String,
}

/// Something that happened to a run and that its result depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Steps taken when it happened.
    pub step: u64,
    /// What happened, in one line.
    pub what: String,
}

/// `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// How far the run is.
    pub progress: Progress,
    /// Epoch the next micro-batch belongs to, from 0; for people, since it follows from the step.
    pub epoch: u64,
    /// The resolved configuration, as TOML.
    pub config: String,
    /// Digest of the base model's transformer.
    pub base_model: String,
    /// What the run trains on.
    pub samples: Vec<SampleDigest>,
    /// Binary and device of the last part of the run.
    pub fingerprint: Fingerprint,
    /// Changes made between parts of the run.
    pub events: Vec<Event>,
    /// The part of the optimizer's state that is not tensors.
    pub optimizer: OptimizerScalars,
    /// The best validation so far; its adapter is `best.safetensors`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
}

/// A run on the host, to be written as a checkpoint.
pub struct Snapshot {
    adapters: RunAdapter,
    average: Option<RunAdapter>,
    best: Option<RunAdapter>,
    optimizer: OptimizerState,
    state: Vec<u8>,
}

impl Snapshot {
    /// Copies a run to the host.
    ///
    /// # Errors
    /// A weight or moment that is not finite: such a state is never saved.
    pub fn take<M: Module>(
        training: &RunTraining<M>,
        average: Option<&M>,
        best: Option<&RunAdapter>,
        state: State,
        loras: &Loras,
    ) -> anyhow::Result<Self> {
        let adapters = RunAdapter::of_model(&training.model, loras)?;
        let average = average.map(|model| RunAdapter::of_model(model, loras));
        let optimizer = training.optimizer.state();
        if let Some((name, _)) = optimizer
            .tensors
            .iter()
            .find(|(_, t)| t.first_non_finite().is_some())
        {
            bail!(
                "optimizer state `{name}` is not finite after step {}; nothing was saved",
                training.progress.step
            );
        }
        let state = State {
            optimizer: optimizer.scalars.clone(),
            ..state
        };
        Ok(Self {
            adapters,
            average: average.transpose()?,
            best: best.cloned(),
            optimizer,
            state: serde_json::to_vec_pretty(&state).context("write state.json")?,
        })
    }

    /// Does something with the name and content of every file.
    pub fn with_files<T>(&self, work: impl FnOnce(Files) -> T) -> T {
        let lora = |out: &mut dyn Write| self.adapters.write(out);
        let optimizer = |out: &mut dyn Write| self.optimizer.write(out);
        let state = |out: &mut dyn Write| out.write_all(&self.state);
        let write = |file: &Option<RunAdapter>, out: &mut dyn Write| match file {
            Some(file) => file.write(out),
            None => Ok(()),
        };
        let average = |out: &mut dyn Write| write(&self.average, out);
        let best = |out: &mut dyn Write| write(&self.best, out);
        let mut files: Vec<(&str, Content)> =
            vec![(LORA, &lora), (OPTIMIZER, &optimizer), (STATE, &state)];
        if self.average.is_some() {
            files.push((AVERAGE, &average));
        }
        if self.best.is_some() {
            files.push((BEST, &best));
        }
        work(&files)
    }
}

/// Manifest entries that follow from the state.
pub fn manifest_fields(
    state: &State,
    config_digest: String,
    dataset_digest: String,
) -> anyhow::Result<ManifestFields> {
    Ok(ManifestFields {
        config_digest,
        dataset_digest,
        fingerprint: serde_json::to_value(&state.fingerprint)?,
    })
}

/// A run in memory.
pub type RunTraining<M> = Training<M, Progress>;

/// A verified checkpoint of which everything but the tensors is read.
pub struct Opened {
    /// `state.json`.
    pub state: State,
    /// The configuration inside it.
    pub config: RunConfig,
    /// The files.
    pub verified: Verified,
}

impl Opened {
    /// Reads the state, and the headers of the other files.
    ///
    /// # Errors
    /// A checkpoint of another format, or one that contradicts itself.
    pub fn read(verified: Verified) -> anyhow::Result<Self> {
        let path = verified.path(STATE)?;
        let state = read_state(&verified.dir)?;
        if state.progress.step != verified.manifest.step {
            bail!(
                "`{}` says step {}, the folder step {}",
                path.display(),
                state.progress.step,
                verified.manifest.step
            );
        }
        let config = RunConfig::from_toml(&state.config, &path, &[])
            .context("the checkpoint's configuration")?;
        for name in [LORA, OPTIMIZER] {
            TensorFile::open(&verified.path(name)?)?;
        }
        Ok(Self {
            state,
            config,
            verified,
        })
    }

    /// The average of the weights, if the run had one.
    ///
    /// # Errors
    /// Tensors that are no adapter.
    pub fn average(&self) -> anyhow::Result<Option<RunAdapter>> {
        self.adapter(AVERAGE)
    }

    /// The adapter of the best validation, if there was one.
    ///
    /// # Errors
    /// Tensors that are no adapter.
    pub fn best(&self) -> anyhow::Result<Option<RunAdapter>> {
        self.adapter(BEST)
    }

    fn adapter(&self, name: &str) -> anyhow::Result<Option<RunAdapter>> {
        let mut files = self.verified.manifest.files.iter();
        if !files.any(|file| file.name == name) {
            return Ok(None);
        }
        Ok(Some(RunAdapter::load(&self.verified.path(name)?)?))
    }

    /// Reads the tensors, to be restored onto a model.
    ///
    /// # Errors
    /// Tensors that are no adapter, and files that are no longer what was verified.
    pub fn record(&self) -> anyhow::Result<TrainingRecord<Progress, RunAdapter>> {
        let adapters = RunAdapter::load(&self.verified.path(LORA)?)?;
        let moments = TensorFile::open(&self.verified.path(OPTIMIZER)?)?;
        let optimizer = OptimizerState::from_file(&moments, self.state.optimizer.clone())?;
        // What was parsed is what was verified.
        self.verified.check()?;
        #[cfg(feature = "canary")]
        let optimizer = crate::canary::resumed(optimizer);
        Ok(TrainingRecord::new(
            adapters,
            optimizer,
            self.state.progress,
        ))
    }
}

/// `state.json` of a checkpoint folder, to be shown; what is resumed is verified first.
///
/// # Errors
/// A file that is not there, or not valid.
pub(crate) fn read_state(dir: &Path) -> anyhow::Result<State> {
    let path = dir.join(STATE);
    let length = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
    let bytes = read_file(&path, length).with_context(|| format!("read {}", path.display()))?;
    parse_json(&bytes).with_context(|| format!("`{}` is not valid", path.display()))
}

/// Restores adapters, then optimizer, then progress.
///
/// # Errors
/// A record that does not fit the model, or a configuration that disagrees with it.
pub fn restore<F: Family>(
    record: TrainingRecord<Progress, RunAdapter>,
    model: Prompted<F>,
    loras: &Loras,
    optimizer: UpdateRule,
    device: &burn::tensor::Device,
) -> anyhow::Result<RunTraining<Prompted<F>>> {
    Ok(record
        .restore_by(|adapters| attach_all(model, &adapters.restored(loras)?))?
        .restore_optimizer(optimizer, device)?
        .restore_progress())
}

/// The run folder or checkpoint that `--resume PATH` names.
pub fn is_checkpoint_folder(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with("ckpt-"))
}
