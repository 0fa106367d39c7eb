//! The samples of a run: those that are trained on, and those that are held out.

use anyhow::bail;
use lora_core::random::Stream;

use crate::config::RunConfig;
use crate::data::sample::Sample;
use crate::data::scan::{Scan, scan};

/// The samples of a run: those that are trained on, then those that are held out.
pub(crate) struct Samples {
    /// All of them.
    pub(crate) all: Vec<Sample>,
    /// How many are trained on.
    pub(crate) trained: usize,
    /// What is said of the files in the folder of held-out samples.
    pub(crate) warnings: Vec<String>,
}

impl Samples {
    /// Holds out what the configuration says, a share of `samples` or another folder.
    ///
    /// # Errors
    /// A folder that is no dataset, or that has other pictures beside its own than the dataset; a share of so few samples that
    /// none would be left, or held out.
    pub(crate) fn new(config: &RunConfig, samples: Vec<Sample>) -> anyhow::Result<Self> {
        let Some(section) = &config.validation else {
            return Ok(Self::trained(samples));
        };
        if let Some(path) = &section.path {
            let mut dataset = config.dataset.clone();
            dataset.path = path.clone();
            dataset.folders.clear();
            dataset.reference = section.reference.clone();
            dataset.mask = section.mask.clone();
            dataset.skip.clear(); // images of the dataset
            let Scan {
                samples: held,
                warnings,
            } = scan(&dataset)?;
            check_alike(&samples, &held)?;
            let trained = samples.len();
            let all = samples.into_iter().chain(held).collect();
            return Ok(Self {
                all,
                trained,
                warnings,
            });
        }
        let share = section.share.unwrap_or_default();
        let held = (share * samples.len() as f64).round() as usize;
        if held == 0 || held == samples.len() {
            bail!(
                "`validation.share` = {share} of {} samples holds out {held}: at least one must be held out, and one trained on",
                samples.len()
            );
        }
        let order = Stream::new(section.seed, "validation_share", 0, 0).permutation(samples.len());
        let mut is_held = vec![false; samples.len()];
        for &index in &order[..held] {
            is_held[index] = true;
        }
        let trained = samples.len() - held;
        let mut all: Vec<_> = samples.into_iter().zip(is_held).collect();
        all.sort_by_key(|(_, held)| *held); // stable
        Ok(Self {
            all: all.into_iter().map(|(sample, _)| sample).collect(),
            trained,
            warnings: Vec::new(),
        })
    }

    fn trained(all: Vec<Sample>) -> Self {
        Self {
            trained: all.len(),
            all,
            warnings: Vec::new(),
        }
    }

    pub(crate) fn held(&self) -> &[Sample] {
        &self.all[self.trained..]
    }
}

/// Refuses held-out samples with references where the dataset has none, and the other way round, and the same of masks: their
/// loss would be of something else than what is trained.
fn check_alike(trained: &[Sample], held: &[Sample]) -> anyhow::Result<()> {
    type Has = fn(&Sample) -> bool;
    let kinds: [(&str, &str, Has); 2] = [
        ("references", "reference", |sample| {
            !sample.references.is_empty()
        }),
        ("masks", "mask", |sample| sample.mask.is_some()),
    ];
    for (what, key, has) in kinds {
        match (trained.iter().any(has), held.iter().any(has)) {
            (true, false) => bail!(
                "the dataset has {what}, and `validation.path` has none: name their folder as `validation.{key}`"
            ),
            (false, true) => bail!(
                "`validation.path` has {what}, and the dataset has none: remove `validation.{key}`, or give the dataset its own"
            ),
            _ => {}
        }
    }
    Ok(())
}
