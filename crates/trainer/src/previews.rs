//! Preview images during training. They draw from streams of their own, so they change nothing about the run.
//!
//! A model that edits needs pictures beside the prompt: the first prompt gets those of the first sample, and so on.

use std::path::PathBuf;

use anyhow::Context;
use burn::module::Module;
use flux_model::family::Family;
use flux_model::prompted::{Prompted, Prompts, TokensOf};

use crate::condition::condition;
use crate::config::{RunConfig, SampleSection};
use crate::data::bucket::Bucket;
use crate::data::cache::{Beside, Cache};
use crate::data::reader::Reader;
use crate::device::NamedDevice;
use crate::generate::{ImageSettings, decode, generate_latents};
use crate::progress::TrainReport;
use crate::run::folder::RunDir;

/// All prompts that the previews of a run need encoded.
pub fn prompts_of<F: Family>(config: &RunConfig, family: &F) -> Vec<String> {
    let Some(section) = &config.sample else {
        return Vec::new();
    };
    let negative = negative_prompt(section, family).map(String::from);
    section.prompts.iter().cloned().chain(negative).collect()
}

fn negative_prompt<F: Family>(section: &SampleSection, family: &F) -> Option<&'static str> {
    family.negative_prompt(section.guidance_scale as f32)
}

/// What is rendered, and when.
pub struct Previews<'a, F: Family> {
    section: Option<&'a SampleSection>,
    prompts: Vec<Prompts<TokensOf<F>>>,
    negative: Option<Prompts<TokensOf<F>>>,
    beside: Vec<(Beside, Bucket)>,
    family: &'a F,
    folder: PathBuf,
}

impl<'a, F: Family> Previews<'a, F> {
    /// The previews that `config` asks for; their prompts are in the cache.
    ///
    /// # Errors
    /// A folder that cannot be made, a cache entry that has vanished.
    pub fn new(
        config: &'a RunConfig,
        cache: &Cache,
        reader: &Reader<F>,
        family: &'a F,
        run: &RunDir,
    ) -> anyhow::Result<Self> {
        let folder = run.samples_path();
        if config.sample.is_some() {
            std::fs::create_dir_all(&folder)
                .with_context(|| format!("create {}", folder.display()))?;
        }
        let section = config.sample.as_ref();
        let prompts = section.into_iter().flat_map(|section| &section.prompts);
        let negative = section.and_then(|section| negative_prompt(section, family));
        let count = section.map_or(0, |section| section.prompts.len());
        let beside = (0..count).map(|index| {
            let entry = index % cache.trained();
            anyhow::Ok((cache.beside(entry, 0, false)?, cache.bucket(entry)))
        });
        Ok(Self {
            beside: beside.collect::<Result<_, _>>()?,
            section,
            prompts: prompts
                .map(|prompt| reader.prompt(cache, prompt))
                .collect::<Result<_, _>>()?,
            negative: (negative.map(|prompt| reader.prompt(cache, prompt))).transpose()?,
            family,
            folder,
        })
    }

    /// Whether this step is one to make pictures at.
    pub fn is_due(&self, step: u64) -> bool {
        (self.section).is_some_and(|section| step.is_multiple_of(section.every))
    }

    /// Renders every prompt if this step is one to do so, with the model that `model` gives; says whether it was.
    ///
    /// # Errors
    /// An autoencoder that cannot be loaded, a full disk.
    pub fn render_if_due(
        &self,
        step: u64,
        model: impl FnOnce() -> Prompted<F>,
        report: &TrainReport,
        device: &NamedDevice,
    ) -> anyhow::Result<bool> {
        let Some(section) = self.section.filter(|_| self.is_due(step)) else {
            return Ok(false);
        };
        report.doing("making samples");
        let model = model().valid();
        let text = |prompt: &Prompts<_>| model.text(prompt, &device.device);
        let negative = self.negative.as_ref().map(text).transpose()?;
        let latents: Vec<_> = self
            .prompts
            .iter()
            .zip(&self.beside)
            .enumerate()
            .map(|(index, (prompt, (beside, bucket)))| {
                // what a mask is of has its size
                let (height, width) = match beside.masked {
                    Some(_) => (bucket.height_px, bucket.width_px),
                    None => (section.height, section.width),
                };
                let settings = ImageSettings {
                    height_px: height as usize,
                    width_px: width as usize,
                    num_inference_steps: section.num_inference_steps,
                    guidance_scale: section.guidance_scale as f32,
                    seed: section.seed.wrapping_add(index as u64),
                    start: None,
                };
                let condition =
                    condition(self.family, std::slice::from_ref(beside), &device.device)?;
                anyhow::Ok(generate_latents(
                    self.family,
                    &model.network,
                    &text(prompt)?,
                    negative.as_ref(),
                    &condition,
                    settings,
                    &device.device,
                    |_| {},
                )?)
            })
            .collect::<Result<_, _>>()?;
        drop(model);
        let path = section.preview_vae.as_deref();
        let path = path.unwrap_or(self.family.folder().autoencoder_path());
        let autoencoder = self.family.autoencoder_at(path, &device.device);
        let autoencoder = autoencoder.context("load the autoencoder")?;
        for (index, latents) in latents.into_iter().enumerate() {
            let path = self.folder.join(format!("step-{step:07}-{index}.png"));
            decode::<F>(&autoencoder, latents)
                .save(&path)
                .with_context(|| format!("write {}", path.display()))?;
            tracing::debug!(path = %path.display(), "sample");
        }
        Ok(true)
    }
}
