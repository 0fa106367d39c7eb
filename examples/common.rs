//! What the examples share: the bundled photographs, a tiny pipeline with random weights, a short run.

use std::path::{Path, PathBuf};

use anyhow::Context;
use flux_lora::config::RunConfig;
use flux_lora::train::{Outcome, TrainOptions, train};

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// The configuration of the photographs, shortened, on a model made from a seed.
///
/// # Errors
/// A folder that cannot be written.
pub fn short_config(runs: &Path, steps: u64) -> anyhow::Result<RunConfig> {
    let model = runs.join("tiny-flux");
    if !model
        .join("transformer/diffusion_pytorch_model.safetensors")
        .is_file()
    {
        flux_lora::dev::random_weights::fill(&root().join("examples/tiny-flux"), &model, 0)?;
    }
    let overrides = [
        format!(
            "model.path=\"{}\"",
            std::fs::canonicalize(&model)?.display()
        ),
        format!("train.steps={steps}"),
        "sample.every=1000000".into(),
        "checkpoint.every=5".into(),
    ];
    Ok(RunConfig::load(
        &root().join("examples/photos.toml"),
        &overrides,
    )?)
}

/// An empty run folder.
///
/// # Errors
/// A folder that cannot be emptied.
pub fn fresh_run(runs: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let run = runs.join(name);
    if run.exists() {
        std::fs::remove_dir_all(&run).with_context(|| format!("empty {}", run.display()))?;
    }
    Ok(run)
}

/// Ten steps on `device`.
///
/// # Errors
/// Whatever training says.
pub fn train_on(device: &str) -> anyhow::Result<()> {
    let runs = root().join("runs");
    let config = short_config(&runs, 10)?;
    let run = fresh_run(&runs, &format!("example-{device}"))?;
    if let Outcome::Finished { lora } = train(&config, &TrainOptions::new(&run, device))? {
        println!("trained on {device}: {}", lora.display());
        print!("{}", std::fs::read_to_string(run.join("metrics.jsonl"))?);
    }
    Ok(())
}
