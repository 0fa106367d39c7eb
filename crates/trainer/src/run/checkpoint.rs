//! What a checkpoint of a training run holds, and how a run is restored from it.
//!
//! `folder` and `transaction` keep folders of bytes safe; this file says what the bytes are: `lora.safetensors`, the
//! adapter as diffusers loads it; `optimizer.safetensors`, the moments; `state.json`, everything else.

use std::path::Path;

use anyhow::{Context, bail};
use burn::module::Module;
use burn::optim::AdamW;
use lora_core::files::strict_json::parse_json;
use lora_core::{
    AdapterFile, DEFAULT_ADAPTER, ForwardPath, LoraConfig, OptimizerScalars, OptimizerState,
    Training, TrainingRecord,
};
use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::data::digest::SampleDigest;
use crate::fingerprint::Fingerprint;
use crate::run::manifest::{ManifestFields, Verified};

/// Prefix of the transformer's keys in a diffusers LoRA file.
pub const TRANSFORMER_PREFIX: &str = "transformer.";
const LORA: &str = "lora.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimizer steps taken; the position in the data follows from it.
    pub step: u64,
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
}

/// The files of a checkpoint.
pub struct Snapshot {
    /// Bytes of the adapter file.
    pub lora: Vec<u8>,
    optimizer: Vec<u8>,
    state: Vec<u8>,
}

impl Snapshot {
    /// Copies a run to the host.
    ///
    /// # Errors
    /// A weight or moment that is not finite: such a state is never saved.
    pub fn take<M: Module>(
        training: &RunTraining<M>,
        state: State,
        lora: &LoraConfig,
    ) -> anyhow::Result<Self> {
        let adapters = adapter_file(&training.model, lora)?;
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
            lora: adapters.to_bytes(TRANSFORMER_PREFIX),
            optimizer: optimizer.to_bytes(),
            state: serde_json::to_vec_pretty(&state).context("write state.json")?,
        })
    }

    /// Name and content of every file.
    pub fn files(&self) -> [(&str, &[u8]); 3] {
        [
            (LORA, &self.lora),
            (OPTIMIZER, &self.optimizer),
            (STATE, &self.state),
        ]
    }
}

/// The adapter of a run, checked to be finite.
///
/// # Errors
/// A weight that is NaN or infinite; the error names it.
pub fn adapter_file<M: Module>(model: &M, lora: &LoraConfig) -> anyhow::Result<AdapterFile> {
    let file = AdapterFile::from_model(model, DEFAULT_ADAPTER, Some(lora))?;
    file.check_finite()?;
    Ok(file)
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
pub type RunTraining<M> = Training<M, AdamW, Progress>;

/// A verified checkpoint, parsed but not yet restored.
pub struct Opened {
    /// `state.json`.
    pub state: State,
    /// The configuration inside it.
    pub config: RunConfig,
    record: TrainingRecord<Progress>,
}

impl Opened {
    /// Parses the bytes that were verified.
    ///
    /// # Errors
    /// A checkpoint of another format, or one that contradicts itself.
    pub fn parse(verified: &Verified) -> anyhow::Result<Self> {
        let dir = &verified.dir;
        let bytes = |name: &str| {
            verified
                .files
                .get(name)
                .with_context(|| format!("checkpoint {} has no {name}", dir.display()))
        };
        let (lora, optimizer, state) = (
            bytes(LORA)?.clone(),
            bytes(OPTIMIZER)?.clone(),
            bytes(STATE)?,
        );
        let state_path = dir.join(STATE);
        let state: State = parse_json(state)
            .with_context(|| format!("`{}` is not valid", state_path.display()))?;
        if state.progress.step != verified.manifest.step {
            bail!(
                "`{}` says step {}, the folder step {}",
                state_path.display(),
                state.progress.step,
                verified.manifest.step
            );
        }
        let config = RunConfig::from_toml(&state.config, &state_path, &[])
            .context("the checkpoint's configuration")?;
        let adapters = AdapterFile::from_bytes(&dir.join(LORA), lora, TRANSFORMER_PREFIX)?;
        let optimizer =
            OptimizerState::from_bytes(&dir.join(OPTIMIZER), optimizer, state.optimizer.clone())?;
        #[cfg(feature = "canary")]
        let optimizer = crate::canary::resumed(optimizer);
        let record = TrainingRecord::new(adapters, optimizer, state.progress);
        Ok(Self {
            state,
            config,
            record,
        })
    }

    /// The record, to be restored onto a model.
    pub fn into_record(self) -> TrainingRecord<Progress> {
        self.record
    }
}

/// Restores adapters, then optimizer, then progress.
///
/// # Errors
/// A record that does not fit the model, or a configuration that disagrees with it.
pub fn restore<M: Module>(
    record: TrainingRecord<Progress>,
    model: M,
    lora: &LoraConfig,
    optimizer: AdamW,
    device: &burn::tensor::Device,
) -> anyhow::Result<RunTraining<M>> {
    Ok(record
        .restore_adapters(model, DEFAULT_ADAPTER, Some(lora), ForwardPath::Fast)?
        .restore_optimizer(optimizer, device)?
        .restore_progress())
}

/// The run folder or checkpoint that `--resume PATH` names.
pub fn is_checkpoint_folder(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with("ckpt-"))
}
