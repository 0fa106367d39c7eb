//! LoRA on a Burn model that knows nothing of LoRA, in a training loop of one's own: `lora-core` alone, nothing of FLUX.
//!
//! The model is a small picture classifier made of `burn::nn` layers. It learns from which of six photographs a crop is
//! (task A), then sees the photographs as film negatives (task B), which it gets wrong. An adapter repairs that, and the
//! base stays what it was. Test crops come from parts of the photographs that training never sees.
//!
//! `cargo run --release --example other_model`

mod crops;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{
    TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput,
};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor};
use flux_lora_examples::{fresh_run, root};
use lora_core::state::count_parameters;
use lora_core::{
    AdapterFile, LoraConfig, Training, TrainingRecord, attach, detach, merge, set_adapters,
};

use crops::{Batch, Film, PATCH_VALUES, PATCHES, PHOTOS, Photographs, Split};

const ADAPTER: &str = "negatives";

// ---- The model: any Burn module will do, and this one is not written for LoRA. ----

const WIDTH: usize = 64;

#[derive(Module, Debug)]
struct Classifier {
    patch: Linear,
    position: Embedding,
    encoder: TransformerEncoder,
    head: Linear,
}

impl Classifier {
    fn new(device: &Device) -> Self {
        // No dropout: Burn draws it from one generator of the whole process, which no checkpoint can save.
        let encoder = TransformerEncoderConfig::new(WIDTH, 2 * WIDTH, 4, 2)
            .with_dropout(0.0)
            .with_norm_first(true);
        Self {
            patch: LinearConfig::new(PATCH_VALUES, WIDTH).init(device),
            position: EmbeddingConfig::new(PATCHES, WIDTH).init(device),
            encoder: encoder.init(device),
            head: LinearConfig::new(WIDTH, PHOTOS.len()).init(device),
        }
    }

    /// `[batch, patches, values]` to logits `[batch, photos]`.
    fn forward(&self, patches: Tensor<3>) -> Tensor<2> {
        let positions = Tensor::<1, Int>::arange(0..PATCHES as i64, &patches.device()).unsqueeze();
        let x = self.patch.forward(patches) + self.position.forward(positions);
        let x = self.encoder.forward(TransformerEncoderInput::new(x));
        self.head.forward(x.mean_dim(1).squeeze_dim(1))
    }

    fn loss(&self, (patches, photos): Batch) -> Tensor<1> {
        let loss = CrossEntropyLossConfig::new().init(&patches.device());
        loss.forward(self.forward(patches), photos)
    }
}

// ---- Plain Burn: the base model is trained in full. ----

fn pretrain(mut model: Classifier, data: &Photographs, device: &Device) -> Result<Classifier> {
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..400 {
        let loss = model.loss(data.batch(Split::Train, Film::Positive, 32, step, device));
        report(step, &loss)?;
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(2e-3, model, gradients);
    }
    Ok(model)
}

// ---- The same loop with an adapter: optimizer state by parameter path, so that it can be saved. ----

/// The model with its adapter, the optimizer, and the number of steps made.
type Run = Training<Classifier, u64>;

fn lora_config() -> LoraConfig {
    // Endings of paths, as in PEFT; `"all-linear".into()` would be all of them.
    let layers = ["patch", "query", "value", "linear_inner", "linear_outer"];
    LoraConfig {
        r: 8,
        lora_alpha: 16.0,
        target_modules: layers.into(),
        ..LoraConfig::default()
    }
}

fn start(base: Classifier) -> Result<Run> {
    let model = attach(base, lora_config().fresh(42).named(ADAPTER))?;
    Ok(Training::new(model, AdamWConfig::new().build(), 0))
}

fn train(mut run: Run, until: u64, data: &Photographs, device: &Device) -> Result<Run> {
    while run.progress < until {
        let batch = data.batch(Split::Train, Film::Negative, 32, run.progress, device);
        let loss = run.model.loss(batch);
        report(run.progress, &loss)?;
        run.step(2e-3, &loss)?;
        run.progress += 1;
    }
    Ok(run)
}

/// Onto the bare base: the adapter first, then the optimizer, then the position. No other order compiles.
fn resume(base: Classifier, dir: &Path, device: &Device) -> Result<Run> {
    let run = TrainingRecord::load(dir)?
        .restore_adapters(base, |file| file.stored().named(ADAPTER))?
        .restore_optimizer(AdamWConfig::new().build(), device)?
        .restore_progress();
    Ok(run)
}

fn main() -> Result<()> {
    let device = Device::flex(); // the only line that names a backend
    let autodiff = device.clone().autodiff();
    device.seed(0); // of burn-nn's initial weights
    let data = Photographs::load()?;
    let dir = fresh_run(&root().join("runs"), "example-other-model")?;
    let accuracy = |model: &Classifier, film| accuracy(model, &data, film, &device);

    println!("task A, all parameters:");
    let base = pretrain(Classifier::new(&autodiff), &data, &autodiff)?;
    let before = accuracy(&base, Film::Negative)?;
    println!(
        "  right: {:.3} of the photographs",
        accuracy(&base, Film::Positive)?
    );
    println!("  right: {before:.3} of the negatives");

    println!("task B, the adapter alone:");
    let run = start(base.clone())?;
    let count = count_parameters(&run.model);
    println!(
        "  {} layers adapted; {} of {} parameters trained",
        count.adapted_layers, count.trainable, count.total
    );
    let run = train(run, 200, &data, &autodiff)?;
    let after = accuracy(&run.model, Film::Negative)?;
    println!("  right: {after:.3} of the negatives");
    ensure!(after > before + 0.2, "the adapter did not learn");

    // A run that is stopped after 80 steps, saved, dropped and resumed.
    println!("stopped and resumed:");
    let stopped = train(start(base.clone())?, 80, &data, &autodiff)?;
    stopped.save(&dir, ADAPTER, Some(&lora_config()))?;
    let resumed = train(resume(base.clone(), &dir, &device)?, 200, &data, &autodiff)?;
    let logits = |model: &Classifier| -> Vec<u32> {
        let (patches, _) = data.batch(Split::Test, Film::Negative, 256, 0, &device);
        let logits = model.valid().forward(patches).into_data();
        logits.iter::<f32>().map(f32::to_bits).collect()
    };
    let same_bits = |what: &str, a: &Classifier, b: &Classifier| -> Result<()> {
        ensure!(logits(a) == logits(b), "{what}: the logits differ");
        println!("{what}: the same bits");
        Ok(())
    };
    same_bits("resumed and never stopped", &resumed.model, &run.model)?;
    ensure!(
        resumed.optimizer.state().tensors == run.optimizer.state().tensors,
        "the resumed optimizer differs"
    );

    AdapterFile::from_model(&run.model, ADAPTER, Some(&lora_config()))?.save_peft(&dir)?;
    let loaded = attach(base.clone(), AdapterFile::load_peft(&dir)?.stored())?;
    same_bits("loaded from its folder and trained", &loaded, &run.model)?;

    let off = set_adapters(run.model.clone(), &[])?; // `&[(ADAPTER, 0.5)]` would be half of it
    same_bits("switched off and never attached", &off, &base)?;
    same_bits(
        "detached and never attached",
        &detach(run.model.clone()),
        &base,
    )?;

    let merged = merge(run.model.clone())?;
    let accuracy = accuracy(&merged, Film::Negative)?;
    println!("merged: right {accuracy:.3} of the negatives");
    ensure!(accuracy == after, "merging has changed what the model says");
    Ok(())
}

fn report(step: u64, loss: &Tensor<1>) -> Result<()> {
    if step.is_multiple_of(40) {
        let loss = loss.to_data().iter::<f32>().next().context("a loss")?;
        println!("  step {step:3}: loss {loss:.3}");
    }
    Ok(())
}

/// Share of 600 test crops that the model gets right.
fn accuracy(model: &Classifier, data: &Photographs, film: Film, device: &Device) -> Result<f64> {
    let (patches, photos) = data.batch(Split::Test, film, 600, 0, device);
    let found = model.valid().forward(patches).argmax(1).squeeze_dim(1);
    let right = found.equal(photos).int().sum().into_data();
    Ok(right.iter::<f64>().next().context("a count")? / 600.0)
}
