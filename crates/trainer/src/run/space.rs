//! Whether the disk has room for a run, before it begins.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use flux_model::family::Family;
use lora_core::training::optimizers::OptimizerConfig;

use crate::config::RunConfig;
use crate::data::cache::has_texts;
use crate::data::sample::Sample;
use crate::progress::shown;
use crate::run::folder::RunDir;

/// Bytes that a run needs on its disk, from sizes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    /// Encoded samples that are not there yet.
    pub(crate) cache: u64,
    /// Checkpoints, as many as are there at once.
    pub(crate) checkpoints: u64,
}

/// Refuses a run that surely does not fit on its disk; `trained` numbers are.
///
/// # Errors
/// Too little room; the error says how much is free and what for it is needed.
pub(crate) fn check<F: Family>(
    config: &RunConfig,
    family: &F,
    run: &RunDir,
    samples: &[Sample],
    trained: usize,
) -> anyhow::Result<()> {
    let (need, free) = need(config, family, run, samples, trained)?;
    judge(need, free, run.path())
}

/// What a run needs, and what is free.
///
/// # Errors
/// A disk that does not say how much is free.
pub(crate) fn need<F: Family>(
    config: &RunConfig,
    family: &F,
    run: &RunDir,
    samples: &[Sample],
    trained: usize,
) -> anyhow::Result<(Need, u64)> {
    let mut need = Need {
        cache: cache(config, family, samples)?,
        checkpoints: checkpoints(config, trained as u64),
    };
    let cache = run.cache_path();
    need.cache = need.cache.saturating_sub(size_of(&cache));
    if fs::symlink_metadata(&cache).is_ok_and(|cache| cache.is_symlink()) {
        need.cache = 0; // on another disk
    }
    let free = fs4::available_space(run.nearest_existing())
        .with_context(|| format!("ask for the free space of {}", run.path().display()))?;
    Ok((need, free))
}

/// Sizes are known to about a tenth.
fn judge(need: Need, free: u64, run: &Path) -> anyhow::Result<()> {
    let all = need.cache + need.checkpoints;
    if all / 10 * 9 > free {
        bail!(
            "the disk of {} has {} free, and this run needs about {}: {} for its encoded samples, {} for its checkpoints; free some, or choose an --output on another disk",
            run.display(),
            shown(free),
            shown(all),
            shown(need.cache),
            shown(need.checkpoints)
        );
    }
    Ok(())
}

/// Latents of every sample and one embedding of every text, all f32.
fn cache<F: Family>(config: &RunConfig, family: &F, samples: &[Sample]) -> anyhow::Result<u64> {
    let resolutions = config.dataset.resolution.as_slice();
    let sides = || resolutions.iter().map(|&side| side as usize);
    let latents = |side| family.latent_shape(side, side).iter().product::<usize>();
    let latents: usize = sides().map(latents).sum();
    let pixels: usize = sides().map(|side| side * side).sum();
    let mirrored = if config.dataset.random_flip { 2 } else { 1 };
    let copies = mirrored * config.dataset.random_crops;
    let of_image = F::LATENTS.len() * copies * latents;
    let shape = F::shape(family.folder())?;
    let t5 = shape.t5.map(|t5| t5.d_model);
    let flux2 = shape.flux2.map(|flux2| flux2.joint_attention_dim);
    let width = t5.or(flux2).unwrap_or(0);
    let text = width * config.dataset.max_sequence_length;
    let captions: BTreeSet<&str> = samples.iter().map(|s| s.caption.as_str()).collect();
    let masked = of_image + copies * pixels;
    let images = samples.iter().map(|sample| {
        let beside = sample.references.len() * of_image;
        of_image + beside + sample.mask.as_ref().map_or(0, |_| masked)
    });
    let texts = match config.dataset.varies_captions() {
        _ if !has_texts::<F>(config) => 0,
        true => captions.len() * config.dataset.caption_variants,
        false => captions.len(),
    };
    Ok(4 * (images.sum::<usize>() + texts * text) as u64)
}

/// Adapters and what the optimizer keeps of them, as often as checkpoints are there at once.
fn checkpoints(config: &RunConfig, trained: u64) -> u64 {
    let saves = config.train.steps.div_ceil(config.checkpoint.every);
    // One more while a save is under way.
    let at_once = saves.min(config.checkpoint.keep as u64 + 1);
    let rule = &config.optimizer.rule;
    let averages = config.ema.is_some() || matches!(rule, OptimizerConfig::ScheduleFreeAdamw(_));
    let adapters = 1 + u64::from(averages) + u64::from(config.validation.is_some());
    (4 * adapters + rule.state_bytes()) * trained * at_once
}

fn size_of(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files
        .filter_map(|file| Some(file.metadata().ok()?.len()))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_surely_does_not_fit_is_refused_with_what_it_needs() {
        let mut config = RunConfig::default();
        config.train.steps = 1000;
        config.checkpoint.every = 100;
        config.checkpoint.keep = 2;
        let trained = 16 * (3072 + 3072);
        // Three at once, of factors and two moments in f32.
        let size = trained * 4 * 3;
        assert_eq!(checkpoints(&config, trained), 3 * size);
        config.train.steps = 150;
        assert_eq!(checkpoints(&config, trained), 2 * size);

        let need = Need {
            cache: 2_000_000_000,
            checkpoints: 500_000_000,
        };
        judge(need, 2_400_000_000, Path::new("run")).expect("it may fit");
        let refused = judge(need, 900_000, Path::new("run")).expect_err("it cannot fit");
        assert_eq!(
            refused.to_string(),
            "the disk of run has 0.9 MB free, and this run needs about 2.5 GB: 2.0 GB for its encoded samples, 500.0 MB for its checkpoints; free some, or choose an --output on another disk"
        );
    }
}
