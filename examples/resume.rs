//! Trains, drops everything, resumes, and compares: the same bits as the run that was never stopped.
//!
//! `cargo run --release --example resume`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use flux_lora::device::default_name;
use flux_lora::run::resume::Resume;
use flux_lora::train::{Outcome, TrainOptions, train};
use flux_lora_examples::{fresh_run, root, short_config};

fn main() -> anyhow::Result<()> {
    let runs = root().join("runs");
    let config = short_config(&runs, 12)?;

    let straight = fresh_run(&runs, "example-straight")?;
    train(&config, &TrainOptions::new(&straight, default_name()))?;

    // A raised flag stops a run after its present step, as Ctrl-C does: this one is stopped after every single step.
    let stopped = fresh_run(&runs, "example-stopped")?;
    let stop = Arc::new(AtomicBool::new(true));
    let options = TrainOptions {
        stop: stop.clone(),
        ..TrainOptions::new(&stopped, default_name())
    }
    .resume(Resume::Newest);
    let mut parts = 1;
    while let Outcome::Stopped { step } = train(&config, &options)? {
        println!("stopped after step {step}");
        parts += 1;
        stop.store(parts < 8, Ordering::SeqCst); // the eighth part may run to the end
    }

    for file in [
        "lora.safetensors",
        "metrics.jsonl",
        "ckpt-0000000012/optimizer.safetensors",
    ] {
        let equal = std::fs::read(straight.join(file))? == std::fs::read(stopped.join(file))?;
        ensure!(equal, "{file} differs");
        println!("{file}: identical");
    }
    println!("resumed in {parts} parts to the same bits");
    Ok(())
}
