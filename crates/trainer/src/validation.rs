//! The loss on pictures that are not trained on, at noise and noise levels that never change: it falls for no other reason than
//! that something was learned.
//!
//! It runs forward only, on the plain device, and draws from streams of its own: it changes nothing about the run.

use std::ops::Range;

use anyhow::bail;
use burn::tensor::Device;
use flux_model::family::Family;
use flux_model::prompted::Prompted;
use lora_core::random::Stream;
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::backward::loss_of;
use crate::config::{RunConfig, ValidationSection};
use crate::data::batch::{Shot, micro_batch};
use crate::data::cache::Cache;
use crate::data::digest::{dataset_digest, sample_digests};
use crate::data::reader::Reader;
use crate::data::samples::Samples;
use crate::run::checkpoint::Best;

/// What a validation found; part of a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validated {
    /// Mean of `bands`.
    pub loss: f64,
    /// Mean loss of noise levels in `[0, 1/n)`, `[1/n, 2/n)` ...
    pub bands: Vec<f64>,
    /// Whether no validation before found less.
    pub best: bool,
}

impl Validated {
    /// Says so.
    pub(crate) fn say(&self, step: u64) {
        let bands = self.bands.iter().map(|loss| format!("{loss:.4}"));
        let bands: Vec<String> = bands.collect();
        info!(
            step,
            loss = format!("{:.4}", self.loss),
            bands = bands.join(" "),
            best = self.best,
            "validation"
        );
    }
}

/// What is measured, and when.
pub(crate) struct Validation<'a, F: Family> {
    config: &'a RunConfig,
    section: &'a ValidationSection,
    family: &'a F,
    cache: &'a Cache,
    reader: &'a Reader<F>,
    held: Range<usize>,
    /// A digest of all that its losses depend on but the weights: losses of the same can be compared.
    pub(crate) of: String,
}

impl<'a, F: Family> Validation<'a, F> {
    /// The validation that `config` asks for; its samples are the last in the cache.
    pub(crate) fn new(
        config: &'a RunConfig,
        samples: &Samples,
        cache: &'a Cache,
        reader: &'a Reader<F>,
        family: &'a F,
    ) -> Option<Self> {
        let section = config.validation.as_ref()?;
        let data = dataset_digest(&sample_digests(samples.held()));
        let (bands, seed) = (section.bands, section.seed);
        Some(Self {
            config,
            section,
            family,
            cache,
            reader,
            held: cache.trained()..cache.len(),
            of: format!("{bands} bands, seed {seed}, {data}"),
        })
    }

    /// Whether there is one after this step.
    pub(crate) fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.section.every)
    }

    /// The losses of `model`, which is on the plain `device`.
    ///
    /// # Errors
    /// A cache entry that has vanished, a block that cannot be read.
    pub(crate) fn measure(
        &self,
        model: &Prompted<F>,
        best: Option<&Best>,
        device: &Device,
    ) -> anyhow::Result<Validated> {
        let count = self.section.bands;
        let mut sums = vec![0.0; count];
        for (index, entry) in self.held.clone().enumerate() {
            for (band, sum) in sums.iter_mut().enumerate() {
                let stream = |name| Stream::new(self.section.seed, name, index as u64, band as u64);
                let within = stream("validation_sigma").uniform();
                let sigma = (band as f64 + within) / count as f64;
                let mut shot = Shot::new(
                    self.family,
                    self.cache.latents(entry, 0, false)?,
                    self.reader.text(self.cache, entry, Some(0))?,
                    sigma as f32,
                    |n| stream("validation_posterior").normals(n),
                    |n| stream("validation_noise").normals(n),
                )?;
                shot.beside = self.cache.beside(entry, 0, false)?;
                let batch = micro_batch(self.family, vec![shot], &self.config.train, device)?;
                *sum += f64::from(loss_of(model, batch.batch)?);
            }
        }
        let entries = self.held.len() as f64;
        let bands: Vec<f64> = sums.into_iter().map(|sum| sum / entries).collect();
        let loss = bands.iter().sum::<f64>() / count as f64;
        if !loss.is_finite() {
            bail!("the validation loss is {loss}; the last checkpoint is untouched");
        }
        Ok(Validated {
            best: best.is_none_or(|best| loss < best.loss),
            loss,
            bands,
        })
    }

    /// Whether the run is to end at this step, for no validation of the last `patience` found less than the best.
    pub(crate) fn is_exhausted(&self, step: u64, best: Option<&Best>) -> bool {
        let (Some(patience), Some(best)) = (self.section.patience, best) else {
            return false;
        };
        let since = step.saturating_sub(best.step) / self.section.every;
        self.is_due(step) && since >= patience
    }

    /// Says why the run ends before its last step.
    pub(crate) fn say_exhausted(&self, step: u64, best: Option<&Best>) {
        let best = best.map_or(0, |best| best.step);
        info!(
            step,
            "stopped early: the validation loss has not fallen since step {best}, whose LoRA is best.safetensors"
        );
    }
}
