//! Preview images during training. They draw from streams of their own, so they change nothing about the run.

use std::path::{Path, PathBuf};

use anyhow::Context;
use burn::module::Module;
use flux_model::pipeline::PipelineFolder;

use crate::config::{RunConfig, SampleSection};
use crate::data::cache::{Cache, CachedText};
use crate::device::NamedDevice;
use crate::generate::{ImageSettings, decode, generate_latents, text_embedding};
use crate::progress::TrainReport;
use crate::run::checkpoint::FluxTraining;

/// What is rendered, and when.
pub struct Previews<'a> {
    section: Option<&'a SampleSection>,
    prompts: Vec<CachedText>,
    pipeline: &'a PipelineFolder,
    folder: PathBuf,
}

impl<'a> Previews<'a> {
    /// The previews that `config` asks for; their prompts are in the cache.
    ///
    /// # Errors
    /// A folder that cannot be made, a cache entry that has vanished.
    pub fn new(
        config: &'a RunConfig,
        cache: &Cache,
        prompts: &[String],
        pipeline: &'a PipelineFolder,
        run: &Path,
    ) -> anyhow::Result<Self> {
        let folder = run.join("samples");
        if config.sample.is_some() {
            std::fs::create_dir_all(&folder)
                .with_context(|| format!("create {}", folder.display()))?;
        }
        let prompts = prompts
            .iter()
            .map(|prompt| cache.prompt(prompt))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            section: config.sample.as_ref(),
            prompts,
            pipeline,
            folder,
        })
    }

    /// Renders every prompt if this step is one to do so.
    ///
    /// # Errors
    /// An autoencoder that cannot be loaded, a full disk.
    pub fn render_if_due(
        &self,
        training: &FluxTraining,
        report: &TrainReport,
        device: &NamedDevice,
    ) -> anyhow::Result<()> {
        let step = training.progress.step;
        let Some(section) = self
            .section
            .filter(|section| step.is_multiple_of(section.every))
        else {
            return Ok(());
        };
        let model = training.model.valid();
        let scheduler = self.pipeline.scheduler()?;
        let downscale = self.pipeline.autoencoder_config()?.downscale();
        let latents: Vec<_> = self
            .prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| {
                let settings = ImageSettings {
                    height_px: section.height as usize,
                    width_px: section.width as usize,
                    num_inference_steps: section.num_inference_steps,
                    guidance_scale: section.guidance_scale as f32,
                    seed: section.seed.wrapping_add(index as u64),
                };
                let text = text_embedding(prompt, &device.device);
                generate_latents(&model, &scheduler, downscale, &text, settings, |_, _, _| {})
            })
            .collect();
        drop(model);
        let autoencoder = self
            .pipeline
            .autoencoder(&device.device)
            .context("load the autoencoder")?;
        for (index, (latents, settings)) in latents.into_iter().enumerate() {
            let path = self.folder.join(format!("step-{step:07}-{index}.png"));
            decode(&autoencoder, latents, settings)
                .save(&path)
                .with_context(|| format!("write {}", path.display()))?;
            report.suspend(|| tracing::debug!(path = %path.display(), "sample"));
        }
        Ok(())
    }
}
