//! Which checkpoint a run goes on from, and what would make the resumed run differ from one that was never stopped.

use std::path::PathBuf;

use anyhow::bail;
use tracing::{info, warn};

use crate::config::RunConfig;
use crate::data::digest::{self, SampleDigest};
use crate::fingerprint::Fingerprint;
use crate::run::checkpoint::{Event, Opened};
use crate::run::folder::RunDir;
use crate::run::manifest::{Verified, verify};

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

/// What may differ from the part of the run before; otherwise it is refused.
#[derive(Debug, Clone, Copy, Default)]
pub struct Accepted {
    /// Binary, device or CPU features.
    pub inexact: bool,
    /// Images, captions or the base model; what is there now is trained on.
    pub data: bool,
    /// Settings that decide what earlier steps would have done.
    pub config: bool,
}

/// The checkpoint to go on from, if any.
pub(crate) fn find_checkpoint(run: &RunDir, resume: &Resume) -> anyhow::Result<Option<Verified>> {
    let verified: Option<Verified> = match resume {
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
        Resume::Checkpoint(path) => Some(verify(path)?),
    };
    if let (None, Some(lora)) = (&verified, run.finished()?) {
        bail!(
            "{} is the LoRA of a run whose checkpoints are gone, and a new run would replace it; move it elsewhere, or choose another --output",
            lora.display()
        );
    }
    if let Some(verified) = &verified {
        run.later_than(verified)?;
        info!(checkpoint = %verified.dir.display(), step = verified.manifest.step, "resuming");
    }
    Ok(verified)
}

/// Refuses what would make the resumed run differ from one that was never stopped; returns the run's events.
pub(crate) fn check_resume(
    opened: &Opened,
    config: &RunConfig,
    accepted: Accepted,
    samples: &[SampleDigest],
    base_model: &str,
    fingerprint: &Fingerprint,
) -> anyhow::Result<Vec<Event>> {
    let state = &opened.state;
    let step = state.progress.step;
    if config.train.steps < step {
        bail!(
            "the run has done {step} steps, and `train.steps` asks for {}: the result would be that of {step} steps; ask for {step} or more, or go back to an earlier checkpoint with --resume PATH",
            config.train.steps
        );
    }
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
        if !change.allowed && !accepted.config {
            bail!(
                "{text}: the resumed run would not be the one that was started; restore the old value, or add --adopt-config to go on with the new one"
            );
        }
        note(text);
    }
    let (before, now) = (
        opened.config.learning_rate(step),
        config.learning_rate(step),
    );
    if before != now && step < config.train.steps {
        info!("the learning rate goes on at {now:.3e}, where it would have been {before:.3e}");
    }
    let changes = digest::changes(&state.samples, samples);
    if !changes.is_empty() {
        let list = changes.join("; ");
        if !accepted.data {
            bail!(
                "the data has changed since step {step}: {list}; restore it, or add --adopt-data to go on with what is there now"
            );
        }
        note(format!("data changed: {list}"));
    }
    if state.base_model != base_model {
        if !accepted.data {
            bail!(
                "the base model's transformer is not the one this run was started with; restore it, or add --adopt-data to go on with this one"
            );
        }
        note("base model changed".into());
    }
    let differences = state.fingerprint.differences(fingerprint);
    if let Some((name, stored, present)) = differences.first() {
        if !accepted.inexact {
            bail!(
                "the run was made with another {name} ({stored}; now {present}), so going on would not give the same bits; use the same one, or add --allow-inexact"
            );
        }
        for (name, stored, present) in differences {
            note(format!("{name} changed from {stored} to {present}"));
        }
    }
    if step == config.train.steps {
        warn!(
            "all {step} steps are done, so nothing is left to do but to write the result again; to train on, ask for more with --steps"
        );
    }
    Ok(events)
}
